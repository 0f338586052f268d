"""`andromeda train` under torchrun: as one process trains, mistakes told once, and on again when a process dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from andromeda.commands.train import train
from tests.commands.runs import ROOT, assert_same_run, untimed

ENGINES = ["ddp", "fsdp"]
PATIENCE = 240  # seconds


def torchrun(recipe: Path, *overrides: str, processes: int = 2, restarts: int = 0) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, f"--max-restarts={restarts}", "-m", "andromeda", "train", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *overrides], env=environment, cwd=recipe.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finished(launched: subprocess.Popen[str], code: int = 0) -> str:
    said, _ = launched.communicate(timeout=PATIENCE)
    assert launched.returncode == code, said
    return said


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("engine", ENGINES)
def test_two_train_as_one_does_and_one_goes_on(engine: str, recipe: Path) -> None:
    one, two = recipe.parent / "one", recipe.parent / "two"
    train(str(recipe), [f"output={one}", "schedule=constant"])
    said = finished(torchrun(recipe, f"output={two}", f"engine={engine}", "steps=10", "schedule=constant"))
    assert said.count(f"{two}: finished 10 steps") == 1
    assert f"2 processes, {engine}" in said
    train(str(recipe), [f"output={two}", "schedule=constant"])
    for ours, theirs in zip(untimed(two), untimed(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_mistake_is_told_once(recipe: Path) -> None:
    said = finished(torchrun(recipe, "no_such_key=1"), code=1)
    assert said.count("no key 'no_such_key' in a recipe") == 1
    assert "process 1 of 2: another process is gone" in said
    assert not (recipe.parent / "run").exists()


def ranks_of(launched: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return [child for child in psutil.Process(launched.pid).children() if child.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []


def kill_some(recipe: Path, engine: str, kills: int, seed: int) -> None:
    """Any rank at any moment after the first checkpoint or before it; torchrun starts all of them again."""
    moments = random.Random(seed)
    whole, killed = recipe.parent / "whole", recipe.parent / "killed"
    keys = [f"engine={engine}", "steps=60", "save_every=5", "validate_every=20", "log_every=5"]
    begin = time.monotonic()
    finished(torchrun(recipe, f"output={whole}", *keys))
    seconds = time.monotonic() - begin
    done = 0
    while done < kills:
        launched = torchrun(recipe, f"output={killed}", *keys, restarts=kills + 2)
        for wait in waits(moments, seconds):
            time.sleep(wait)
            living = ranks_of(launched)
            if not living or done == kills:
                break
            moments.choice(living).send_signal(signal.SIGKILL)
            done += 1
        finished(launched)
        if done < kills:  # it ended too soon to be killed often enough: once more
            (killed).rename(f"{killed}-{done}")
    assert_same_run(killed, whole)
    for other in recipe.parent.glob("killed-*"):
        assert_same_run(other, whole)


def waits(moments: random.Random, seconds: float) -> Iterator[float]:
    while True:
        yield moments.uniform(0.3, 1.0) * seconds


@pytest.mark.slow
def test_kill_9_of_one(recipe: Path) -> None:
    kill_some(recipe, "fsdp", 1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_kill_9_twenty_times(engine: str, recipe: Path) -> None:
    kill_some(recipe, engine, 20, seed=1)
