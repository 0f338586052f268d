"""Steps that would do harm: a gradient that is no number, or one far larger than those before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

REMEMBERED = 100  # norms of accepted steps
ENOUGH = 20  # of them, before one can be called large
PATIENCE = 5  # refused steps in a row, before training goes back to a checkpoint


def is_sound(norm: float, before: Sequence[float], spike: float | None) -> bool:
    """Whether the weights may follow a gradient.

    Args:
        norm: of the whole gradient, before it is clipped. It is finite only if the loss and all weights are.
        before: norms of the steps accepted last.
        spike: how many times their median it may be; None: any.
    """
    if not math.isfinite(norm):
        return False
    return spike is None or len(before) < ENOUGH or norm <= spike * median(before)


def remembered(norm: float, before: Sequence[float]) -> list[float]:
    """The norms with the newest."""
    return [*before, norm][-REMEMBERED:]
