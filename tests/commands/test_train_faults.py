"""One of several processes is killed, slow, hangs, or finds a full disk or a damaged file."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.commands import faults
from tests.commands.launcher import Launched, Launcher
from tests.commands.runs import assert_same_run, contents, flip, write_recipe
from tests.quick import quick

GONE = "another process is gone, so this one stops"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def whole(launch: Launcher, recipe: Path) -> Callable[[str], Path]:
    """Runs that nothing disturbs, one for each engine."""
    runs: dict[str, Path] = {}

    def run(engine: str) -> Path:
        if engine not in runs:
            runs[engine] = recipe.parent / f"whole-{engine}"
            launch(recipe, f"output={runs[engine]}", f"engine={engine}", "keep_last=3").finish()
        return runs[engine]

    return run


@pytest.fixture
def output(recipe: Path) -> Iterator[Path]:
    yield recipe.parent / "run"
    shutil.rmtree(recipe.parent / "run", ignore_errors=True)


def wait_for(what: Path, launched: Launched) -> None:
    while not what.exists():
        assert any(process.is_alive() for process in launched.processes), launched.said()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("engine", "victim"),
    [
        ("ddp", 0), ("fsdp", 1), pytest.param("ddp", 1, marks=pytest.mark.slow),
        pytest.param("zero3", 0, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_kill_9_of_one(
    engine: str, victim: int, launch: Launcher, recipe: Path, output: Path, whole: Callable[[str], Path]
) -> None:
    """The other stops by itself. Started again with what the dead left in the store, they go on."""
    keys = f"output={output}", f"engine={engine}", "keep_last=3"
    killed = launch(recipe, *keys)
    wait_for(output / "checkpoints" / "step-00000004", killed)
    killed.processes[victim].kill()
    codes = killed.codes()
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 2, killed.said()
    assert f"process {1 - victim} of 2: {GONE}" in killed.said() and "Traceback" not in killed.said()
    said = launch(recipe, *keys, fault=partial(faults.comes_late, victim, 0.3)).finish()
    assert "going on from step" in said
    assert_same_run(output, whole(engine))


def test_a_slow_one_is_waited_for(launch: Launcher, recipe: Path, output: Path, whole: Callable[[str], Path]) -> None:
    slow = partial(faults.sleeps, 1, 6, 0.5)
    launch(recipe, f"output={output}", "keep_last=3", "patience=60", fault=slow).finish()
    assert_same_run(output, whole("ddp"))


def test_one_that_hangs_is_named(launch: Launcher, recipe: Path, output: Path) -> None:
    launched = launch(recipe, f"output={output}", "patience=1", fault=partial(faults.hangs_in_a_step, 1, 6))
    assert launched.codes() == [1, 1]
    for rank in range(2):
        found = re.search(rf"error: process {rank} of 2: nothing has moved for 1 s; (.*)", launched.said())
        assert found and re.search(r"process 1, at loop\.py:\d+, faults\.py:\d+", found[1]), launched.said()


@pytest.mark.parametrize("engine", quick(["ddp", "fsdp"], ["ddp"]))
def test_a_gradient_that_is_no_number_in_one(engine: str, launch: Launcher, recipe: Path, output: Path) -> None:
    """All leave the step out, whichever it was."""
    runs = [output / str(rank) for rank in range(2)]
    for rank, run in enumerate(runs):
        said = launch(
            recipe, f"output={run}", f"engine={engine}", fault=partial(faults.has_no_gradient, rank, 6)
        ).finish()
        assert said.count("step 6: the gradient of sequences 20 to 23 is no number, so they are left out") == 1
    assert_same_run(*runs)


def test_a_full_disk(launch: Launcher, recipe: Path, output: Path, whole: Callable[[str], Path]) -> None:
    full = partial(faults.has_no_space, "step-00000008")
    keys = f"output={output}", "keep_last=3"
    stopped = launch(recipe, *keys, fault=full)
    assert stopped.codes() == [2, 2]
    assert "step-00000008: cannot be written" in stopped.said() and f"process 1 of 2: {GONE}" in stopped.said()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000004"]
    said = launch(recipe, *keys, "failed_save=go_on", fault=full).finish()
    assert "No space left on device; what was there before is unchanged; free space, or choose another place" in said
    assert not (output / "checkpoints" / "step-00000008").exists()
    last = "checkpoints/step-00000012/"
    ours, theirs = contents(output), contents(whole("ddp"))
    assert [ours[name] for name in ours if last in name] == [theirs[name] for name in theirs if last in name]


def test_a_damaged_checkpoint(launch: Launcher, recipe: Path, output: Path, whole: Callable[[str], Path]) -> None:
    """All take the one before; and none goes its own way."""
    shutil.copytree(whole("ddp"), output)
    shutil.rmtree(output / "checkpoints" / "step-00000012")
    keys = f"output={output}", "keep_last=3"
    refused = launch(recipe, *keys, fault=partial(faults.reads_damage, 1, "step-00000008"))
    assert refused.codes() == [2, 2]
    assert "step-00000008: cannot be read here" in refused.said()
    weights = output / "checkpoints" / "step-00000008" / "model.safetensors"
    flip(weights)
    said = launch(recipe, *keys).finish()
    assert said.count("set aside as step-00000008.1.damaged, going on from step-00000004") == 1
    shutil.rmtree(output / "checkpoints" / "step-00000008.1.damaged")
    assert_same_run(output, whole("ddp"))
