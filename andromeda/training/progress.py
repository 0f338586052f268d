"""Training as a person sees it: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console

from andromeda.training.nebula.curves import describe_tasks

LINE_SECONDS = 10.0  # between lines where there is no terminal


class Progress(Protocol):
    def advance(self, step: int) -> None:
        """A step is done."""

    def log(self, values: dict[str, Any]) -> None:
        """A line of metrics."""


class Silent:
    """Of a process that does not speak."""

    def advance(self, step: int) -> None: ...

    def log(self, values: dict[str, Any]) -> None: ...


@contextmanager
def show_progress(steps: int, done: int, console: Console) -> Iterator[Progress]:
    """Progress from step `done` to `steps`."""
    if not console.is_terminal:
        yield _Lines(steps, console)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TimeRemainingColumn(), TextColumn("{task.description}"))
    with RichProgress(*columns, console=console) as bar:
        yield _Bar(bar, steps, done)


class _Bar:
    def __init__(self, bar: Any, steps: int, done: int) -> None:
        self._bar, self._steps = bar, steps
        self._task = bar.add_task("", total=steps, completed=done)
        self._validation: float | None = None

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def log(self, values: dict[str, Any]) -> None:
        validated = any("validation" in name for name in values)
        self._validation = values.get("validation_bits_per_byte", self._validation)
        self._bar.update(self._task, description=", ".join(describe(values, self._validation)))
        if validated:
            self._bar.console.print(f"step {values['step']}/{self._steps}: {', '.join(describe(values)[:-2])}")


class _Lines:
    def __init__(self, steps: int, console: Console) -> None:
        self._steps, self._console, self._last = steps, console, time.monotonic()

    def advance(self, step: int) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        now = time.monotonic()
        if (
            any("validation" in name for name in values)
            or values["step"] == self._steps
            or now - self._last >= LINE_SECONDS
        ):
            line = f"step {values['step']}/{self._steps}: {', '.join(describe(values))}"
            self._console.print(line, soft_wrap=True, highlight=False)
            self._last = now


def describe(values: dict[str, Any], validation: float | None = None) -> list[str]:
    """A line of metrics in words: the loss, the validation (this line's or the last), and the speed."""
    validation = values.get("validation_bits_per_byte", validation)
    achieved, possible = values["flops_per_second"], values["possible_flops_per_second"]
    held_out = "held-out pairs {validation_loss:.3f}, {validation_reward_accuracy:.0%} right"
    unit, size = next((unit, size) for unit, size in (("T", 1e12), ("G", 1e9)) if possible >= size or unit == "G")
    return [
        f"loss {values['loss']:.3f}",
        *([f"margin {values['reward_margin']:.3f}"] if "reward_margin" in values else []),
        *([] if validation is None else [f"validation {validation:.3f} bits/byte"]),
        *([held_out.format(**values)] if "validation_loss" in values else []),
        *(f"{name}: {figures}" for name, figures in describe_tasks(values).items()),
        f"{values['tokens_per_second']:,.0f} tokens/s",
        f"{achieved / size:,.0f} of {possible / size:,.0f} {unit}FLOP/s",
    ]
