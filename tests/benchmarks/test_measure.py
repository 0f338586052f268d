"""The clocks: how often is called, what is taken of the times, and what is said of the machine."""

from __future__ import annotations

import re
from typing import Any

import pytest

from andromeda.benchmarks import measure
from andromeda.benchmarks.measure import Deadline, WrongResultError


class Clock:
    """Each call takes the next of these milliseconds; behind the last one it takes that again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *milliseconds: float) -> None:
        self.now, self.calls, self.milliseconds = 0.0, 0, milliseconds
        monkeypatch.setattr(measure, "CUDA", False)
        monkeypatch.setattr("andromeda.benchmarks.measure.perf_counter", lambda: self.now)

    def run(self) -> None:
        self.now += self.milliseconds[min(self.calls, len(self.milliseconds) - 1)] / 1e3
        self.calls += 1


def test_the_median_leaves_out_what_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 900, 100, 5, 70, 6)
    assert measure.milliseconds(clock.run, budget=0.35) == pytest.approx(6)
    assert clock.calls == 2 + 3


@pytest.mark.parametrize(
    ("each", "settings", "calls"),
    [
        (10.0, {"budget": 0.2}, 20),
        (10.0, {"budget": 0.0}, 3),
        (500.0, {"budget": 0.5}, 3),
        (1.0, {"budget": 0.5}, 50),
        (1.0, {"budget": 0.5, "most": 200}, 200),
        (10.0, {"budget": 0.2, "apart": True}, 20),
    ],
)
def test_as_many_calls_as_fit(
    each: float, settings: dict[str, Any], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, each)
    times = measure.times(clock.run, **settings)
    assert times == pytest.approx([each] * len(times))
    assert abs(len(times) - calls) <= (calls > 3)  # the clock rounds
    assert clock.calls == len(times) + (1 if 3 * each > 1e3 * settings["budget"] else 2)


def test_rates_of_this_machine_are_positive() -> None:
    assert measure.product_rate(64) > 0
    assert measure.copy_rate(2**16) > 0


@pytest.mark.parametrize("error", [0.1, 0.2, float("nan")])
def test_nothing_wrong_is_timed(error: float) -> None:
    measure.require("x", 0.09, 0.1)
    with pytest.raises(WrongResultError, match="x: the error is"):
        measure.require("x", error, 0.1)


def test_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr("andromeda.benchmarks.measure.monotonic", lambda: now[0])
    deadline = Deadline(10)
    assert not deadline.over()
    now[0] = 15.1
    assert deadline.over()


def test_the_facts_of_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/andromeda", "bench", "loss", "--json", "a b"])
    facts = measure.machine()
    assert set(facts) == {"device", "torch", "triton", "python", "commit", "command", "date"}
    assert facts["command"] == "andromeda bench loss --json 'a b'"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(facts["date"]))
    assert str(facts["torch"]) in measure.headline(facts)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    assert measure.machine()["commit"] is None
    assert measure.version("no-such-package") is None
