"""float16's range: the loss is scaled up as far as gradients stay finite (Micikevicius et al. 2018, section 3.2).

PyTorch's GradScaler does the same on the device. Here the gradient's norm is known on the host anyway, one rule serves
every engine, and the scale is a number of the training state.
"""

from __future__ import annotations

from dataclasses import dataclass

START = 2.0**16
GROWS_AFTER = 2000  # finite steps in a row


@dataclass(frozen=True)
class LossScale:
    """What losses are multiplied by, and how many steps in a row it was not too much."""

    value: float = START
    finite: int = 0

    def after(self, finite: bool) -> LossScale:
        """Half as much after a gradient that is no number, twice as much after many that are."""
        if not finite:
            return LossScale(max(1.0, self.value / 2))
        if self.finite + 1 < GROWS_AFTER:
            return LossScale(self.value, self.finite + 1)
        return LossScale(2 * self.value)
