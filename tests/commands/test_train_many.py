"""`andromeda train` by several processes: as one trains, mistakes told once, and on again when one dies."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from andromeda.commands.train import train
from tests.commands.launcher import Launcher
from tests.commands.runs import ROOT, assert_same_run, heads, untimed

ENGINES = ["ddp", "fsdp", "zero3"]
PATIENCE = 240  # seconds
LOG = "launcher.log"
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
# With --cpu it starts one process, however many it is asked for.
ACCELERATE = (
    "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
    "--dynamo_backend=no",
)  # fmt: skip


def start(launcher: tuple[str, ...], recipe: Path, *overrides: str, restarts: int = 0) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", *launcher, f"--max_restarts={restarts}", "-m", "andromeda", "train", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (recipe.parent / LOG).open("w") as log:  # a pipe that nobody reads would fill
        return subprocess.Popen(
            [*command, *overrides], env=environment, cwd=recipe.parent, stdout=log, stderr=subprocess.STDOUT
        )  # fmt: skip


def finished(launched: subprocess.Popen[bytes], recipe: Path, code: int = 0) -> str:
    launched.wait(timeout=PATIENCE)
    said = (recipe.parent / LOG).read_text()
    assert launched.returncode == code, said
    return said


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("engine", "together"),
    [("ddp", 1), pytest.param("fsdp", 1, marks=pytest.mark.slow), ("fsdp", 2), ("zero3", 1)],
)
def test_two_train_as_one_does_and_one_goes_on(engine: str, together: int, launch: Launcher, recipe: Path) -> None:
    one, two = recipe.parent / "one", recipe.parent / "two"
    train(str(recipe), [f"output={one}", "schedule=constant"])
    keys = [f"engine={engine}", f"context_parallel={together}", "steps=10", "schedule=constant"]
    said = launch(recipe, f"output={two}", *keys).finish()
    assert said.count(f"{two}: finished 10 steps") == 1
    assert f"2 processes, {engine}" in said and ("2 to a sequence" in said) == (together == 2)
    train(str(recipe), [f"output={two}", "schedule=constant"])
    for ours, theirs in zip(untimed(two), untimed(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for ours, theirs in zip(heads(two), heads(one), strict=True):
        assert ours.keys() == theirs.keys() >= {"bounds", "windows", "entropies"}
        for key in ("bounds", "entropies"):
            torch.testing.assert_close(torch.tensor(ours[key]), torch.tensor(theirs[key]), rtol=1e-4, atol=2e-4)


def test_a_mistake_is_told_once(recipe: Path) -> None:
    """By torchrun itself, as in the slow tests; what trains in the quick ones are forks."""
    said = finished(start(TORCHRUN, recipe, "no_such_key=1"), recipe, code=1)
    assert said.count("no key 'no_such_key' in a recipe") == 1
    assert "process 1 of 2: another process is gone" in said
    assert not (recipe.parent / "run").exists()


def ranks_of(launched: subprocess.Popen[bytes]) -> list[psutil.Process]:
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
    finished(start(TORCHRUN, recipe, f"output={whole}", *keys), recipe)
    seconds = time.monotonic() - begin
    while kills:
        output = recipe.parent / f"killed-{runs}"
        launched = start(TORCHRUN, recipe, f"output={output}", *keys, restarts=kills)
        while kills and launched.poll() is None:
            time.sleep(moments.uniform(0.05, 1.0) * seconds)
            if living := ranks_of(launched):
                moments.choice(living).kill()
                kills -= 1
        finished(launched, recipe)
        assert_same_run(output, whole)
        runs += 1


@pytest.mark.slow
def test_accelerate_starts_them_and_again(recipe: Path) -> None:
    keys = ["engine=fsdp", "steps=60", "save_every=5", "validate_every=20", "log_every=5"]
    whole, output = recipe.parent / "whole", recipe.parent / "killed"
    assert "2 processes, fsdp" in finished(start(ACCELERATE, recipe, f"output={whole}", *keys), recipe)
    launched = start(ACCELERATE, recipe, f"output={output}", *keys, restarts=1)
    while not (output / "checkpoints" / "step-00000005").exists():
        assert launched.poll() is None
        time.sleep(0.05)
    ranks_of(launched)[0].kill()
    assert "going on from step" in finished(launched, recipe)
    assert_same_run(output, whole)
