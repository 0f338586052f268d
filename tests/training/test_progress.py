"""What a person sees."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from andromeda.training.progress import describe, show_progress


def line(step: int, **values: Any) -> dict[str, Any]:
    speed = {"tokens_per_second": 12345.6, "flops_per_second": 61.2e9, "possible_flops_per_second": 140e9}
    return {"step": step, "loss": 3.14159, **speed, **values}


def show(lines: list[dict[str, Any]], terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
    with show_progress(30, 0, console) as progress:
        for values in lines:
            progress.advance(values["step"])
            progress.log(values)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_lines_come_with_validation_at_the_end_and_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines = [line(step) for step in range(1, 31)]
    lines[9]["validation_bits_per_byte"] = 2.5
    assert [text.split(":")[0] for text in show(lines, terminal=False).splitlines()] == ["step 10/30", "step 30/30"]
    ticks = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(ticks)))
    shown = show([line(step) for step in range(1, 30)], terminal=False).splitlines()
    assert [text.split(":")[0] for text in shown] == ["step 10/30", "step 20/30"]


def test_a_line_says_achieved_and_possible() -> None:
    text = show([line(30, validation_bits_per_byte=2.345)], terminal=False)
    assert text == "step 30/30: loss 3.142, validation 2.345 bits/byte, 12,346 tokens/s, 61 of 140 GFLOP/s\n"
    fast = line(30, flops_per_second=340e12, possible_flops_per_second=660e12)
    assert describe(fast, validation=2.0)[1:] == ["validation 2.000 bits/byte", "12,346 tokens/s", "340 of 660 TFLOP/s"]


def test_a_terminal_has_a_bar_and_keeps_the_validations() -> None:
    text = show([line(10), line(20, validation_bits_per_byte=2.345), line(30)], terminal=True)
    assert "30/30" in text and "61 of 140 GFLOP/s" in text
    assert "step 20/30: loss 3.142, validation 2.345 bits/byte" in text
    assert "loss 3.142, validation 2.345 bits/byte, 12,346 tokens/s" in text.splitlines()[-2]


def test_pairs_that_are_held_out() -> None:
    values = line(10, reward_margin=0.25, validation_loss=0.51234, validation_reward_accuracy=0.875)
    assert describe(values)[1:3] == ["margin 0.250", "held-out pairs 0.512, 88% right"]
    assert "step 10/30: loss 3.142, margin 0.250, held-out pairs 0.512, 88% right\n" in show([values], terminal=True)
