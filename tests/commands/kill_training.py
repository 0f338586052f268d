"""Trains once undisturbed and once with kills at random moments, in a process that has computed nothing before.

Each training is a fork of that one. A training that ends before its kill is put by, and another one begun, until there
were as many kills as asked for.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from andromeda.commands.train import train  # before the forks
from tests.commands.quick_training import quick_training


def start(recipe: str, output: Path, log: Path) -> int:
    """Returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        train(recipe, [f"output={output}"])
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(pid: int) -> None:
    status = os.waitpid(pid, 0)[1]
    if status != 0:
        raise SystemExit(f"training failed with status {status}")


def main(recipe: str, folder: Path, kills: int, seed: int) -> None:
    with quick_training():
        _train_and_kill(recipe, folder, kills, random.Random(seed))


def _train_and_kill(recipe: str, folder: Path, kills: int, moments: random.Random) -> None:
    begin = time.monotonic()
    finish(start(recipe, folder / "whole", folder / "whole.log"))
    seconds = time.monotonic() - begin
    killed = ended = 0
    while killed < kills:
        pid = start(recipe, folder / "killed", folder / "killed.log")
        if killed < kills - 1:
            time.sleep(moments.uniform(0, seconds))
        else:  # this one comes after a checkpoint, however busy the machine
            while not list((folder / "killed").glob("checkpoints/step-*")):
                time.sleep(0.01)
            time.sleep(moments.uniform(0, seconds / 10))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
        elif status == 0:
            os.rename(folder / "killed", folder / f"killed-{ended}")
            ended += 1
        else:
            raise SystemExit(f"training failed with status {status}")
    finish(start(recipe, folder / "killed", folder / "killed.log"))
