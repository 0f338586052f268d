"""`andromeda train` under torchrun: as one process trains, mistakes told once, and on again when a process dies."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from andromeda.commands.train import train
from tests.commands.launcher import Launcher
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
def test_two_train_as_one_does_and_one_goes_on(engine: str, launch: Launcher, recipe: Path) -> None:
    one, two = recipe.parent / "one", recipe.parent / "two"
    train(str(recipe), [f"output={one}", "schedule=constant"])
    said = launch(recipe, f"output={two}", f"engine={engine}", "steps=10", "schedule=constant").finish()
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


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_kill_9_twenty_times(engine: str, recipe: Path) -> None:
    """Any process at any moment, while they start too; torchrun starts all of them again."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    moments, kills, runs = random.Random(seed), 20, 0
    whole = recipe.parent / "whole"
    keys = [f"engine={engine}", "steps=60", "save_every=5", "validate_every=20", "log_every=5"]
    begin = time.monotonic()
    finished(torchrun(recipe, f"output={whole}", *keys))
    seconds = time.monotonic() - begin
    while kills:
        output = recipe.parent / f"killed-{runs}"
        launched = torchrun(recipe, f"output={output}", *keys, restarts=kills)
        while kills and launched.poll() is None:
            time.sleep(moments.uniform(0.05, 1.0) * seconds)
            if living := ranks_of(launched):
                moments.choice(living).kill()
                kills -= 1
        finished(launched)
        assert_same_run(output, whole)
        runs += 1
