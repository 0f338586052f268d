"""Groups of DiLoCo and of local SGD move together, and go on when others leave, join, or are not found."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from andromeda.training.metrics import read_metrics
from andromeda.training.recipe import Method
from tests.commands.launcher import Launched, Launcher

LIGHTHOUSE = Path(sys.executable).with_name("torchft_lighthouse")


class Lighthouse:
    """A process at a port of its own."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, groups: int) -> None:
        arguments = ["--bind", f"[::]:{self.port}", "--min_replicas", str(groups), "--join_timeout_ms", "60000"]
        times = ["--quorum_tick_ms", "20", "--heartbeat_timeout_ms", "5000"]
        self.process = subprocess.Popen(
            [LIGHTHOUSE, *arguments, *times], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert self.process.poll() is None
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def lighthouse() -> Iterator[Lighthouse]:
    house = Lighthouse()
    house.start(2)
    yield house
    house.kill()


class Groups:
    def __init__(self, launch: Launcher, recipe: Path, lighthouse: Lighthouse, every: int, *keys: str) -> None:
        self.launch, self.recipe = launch, recipe
        self.keys = (
            "schedule=constant",
            f"diloco={{lighthouse: '{lighthouse.address}', host: 127.0.0.1, every: {every}}}",
            *keys,
        )

    def output(self, number: int) -> Path:
        return self.recipe.parent / f"group-{number}"

    def start(self, number: int) -> Launched:
        return self.launch.one(self.recipe, f"output={self.output(number)}", f"seed={number}", *self.keys)

    def lines(self, number: int) -> list[dict[str, Any]]:
        return read_metrics(self.output(number) / "metrics.jsonl")

    def step(self, number: int) -> int:
        return max([line["step"] for line in self.lines(number)], default=0)

    def newest(self, number: int) -> tuple[bytes, bytes]:
        """The weights of the newest checkpoint, and what the groups share."""
        folder = max((self.output(number) / "checkpoints").glob("step-*"))
        return (folder / "model.safetensors").read_bytes(), (folder / "training" / "diloco.safetensors").read_bytes()


def together(*launched: Launched) -> str:
    return "".join(group.finish() for group in launched)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow if name == "local_sgd" else ()) for name in get_args(Method)]
)
def test_two_move_together_and_go_on(method: str, launch: Launcher, recipe: Path, lighthouse: Lighthouse) -> None:
    groups = Groups(launch, recipe, lighthouse, 4, "steps=8", f"diloco.method={method}")
    together(groups.start(0), groups.start(1))
    assert [line["groups"] for line in groups.lines(0) if "groups" in line] == [2, 2]
    assert losses(groups, 0) != losses(groups, 1)  # each reads the text in an order of its own
    whole, _ = groups.newest(0)
    assert groups.newest(0) == groups.newest(1)
    for number in range(2):
        shutil.rmtree(groups.output(number) / "checkpoints" / "step-00000008")
    said = together(groups.start(0), groups.start(1))
    assert said.count("beginning at step 4, an exchange every 4 steps") == 2
    assert groups.newest(0) == groups.newest(1) and groups.newest(0)[0] == whole


@pytest.mark.slow
def test_it_goes_on_as_if_it_had_not_been_stopped(launch: Launcher, recipe: Path, lighthouse: Lighthouse) -> None:
    groups = Groups(launch, recipe, lighthouse, 4)
    together(groups.start(0), groups.start(1))
    whole = [groups.newest(number)[0] for number in range(2)]
    for number in range(2):
        shutil.rmtree(groups.output(number))
    for steps in (4, 8, 12):
        groups.keys += (f"steps={steps}",)
        together(groups.start(0), groups.start(1))
    assert [groups.newest(number)[0] for number in range(2)] == whole


LONG = "steps=100", "save_every=50", "validate_every=100", "learning_rate=0.003"


def validation(groups: Groups, number: int) -> float:
    return groups.lines(number)[-1]["validation_bits_per_byte"]


@pytest.mark.slow
def test_one_of_three_is_killed_another_joins_and_the_lighthouse_is_lost(
    launch: Launcher, recipe: Path, lighthouse: Lighthouse
) -> None:
    """The loss is at most 2% above that of three that nothing disturbs.

    An exchange that failed for one of two counts for the other, who is that much behind from there on; so one may take
    its last exchange when the others have ended, or before theirs.
    """
    lighthouse.kill()
    lighthouse.start(3)
    undisturbed = Groups(launch, recipe, lighthouse, 10, *LONG)
    together(*[undisturbed.start(number) for number in range(3)])
    expected = validation(undisturbed, 0)
    assert {validation(undisturbed, number) for number in range(3)} == {expected}
    for number in range(3):
        undisturbed.output(number).rename(recipe.parent / f"undisturbed-{number}")

    lighthouse.kill()
    lighthouse.start(3)
    groups = Groups(launch, recipe, lighthouse, 10, *LONG)
    running = [groups.start(number) for number in range(3)]
    until(lambda: groups.step(0) >= 20, running)
    running.pop(2).processes[0].kill()
    lighthouse.kill()  # started again, it knows nobody, and takes whoever is there
    lighthouse.start(1)
    until(lambda: groups.step(0) >= 40, running)
    running.append(groups.start(3))
    together(*running)
    counts = {number: [line["groups"] for line in groups.lines(number) if "groups" in line] for number in (0, 1, 3)}
    assert all(3 in counts[number] for number in counts)
    assert len({groups.newest(number) for number in counts}) <= 2
    for number in counts:
        assert validation(groups, number) <= 1.02 * expected


def until(holds: Callable[[], bool], running: list[Launched]) -> None:
    while not holds():
        assert all(group.processes[0].is_alive() for group in running), [group.said() for group in running]
        time.sleep(0.02)


def losses(groups: Groups, number: int) -> list[float]:
    return [line["loss"] for line in groups.lines(number) if "loss" in line]


@pytest.mark.slow
def test_a_lighthouse_that_does_not_come_back(launch: Launcher, recipe: Path, lighthouse: Lighthouse) -> None:
    lighthouse.kill()
    lighthouse.start(1)
    groups = Groups(launch, recipe, lighthouse, 4, "patience=3", "steps=40", "log_every=1")
    running = groups.start(0)
    until(lambda: groups.step(0) >= 8, [running])
    lighthouse.kill()
    said = running.finish()
    assert "the lighthouse does not answer" in said and "going on without the others" in said
    assert groups.step(0) == 40
    with pytest.raises(AssertionError, match=r"diloco\.lighthouse=.* does not answer .*start torchft_lighthouse there"):
        groups.output(0).rename(recipe.parent / "before")
        groups.start(0).finish()
