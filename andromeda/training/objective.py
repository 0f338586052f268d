"""What training makes small: the cross-entropy of the next token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from andromeda.model import Andromeda

# (B, T) ids, targets (IGNORED where none is to be predicted) and document numbers or None, on the CPU.
Batch = tuple[Tensor, Tensor, Tensor | None]
Objective = Callable[[Batch], Tensor]  # -> (B, T) nats, 0 where there is no target


class NextToken:
    """Cross-entropy of each target, in nats: float32, from activations in the given precision.

    Args:
        model: its weights are float32.
        precision: of matrix products; bfloat16 by autocast.
    """

    def __init__(self, model: Andromeda, device: torch.device, precision: torch.dtype = torch.float32) -> None:
        self.model, self.device, self.precision = model, device, precision

    def __call__(self, batch: Batch) -> Tensor:
        ids, targets, documents = (None if x is None else x.to(self.device, non_blocking=True) for x in batch)
        assert ids is not None and targets is not None
        lower = self.precision is not torch.float32
        with torch.autocast(self.device.type, self.precision if lower else torch.bfloat16, enabled=lower):
            return self.model.token_losses(ids, targets, documents=documents)


def bits_per_byte(objective: Objective, batches: Iterable[Batch], num_bytes: int) -> float:
    """How many bits the text costs, a byte of UTF-8.

    Args:
        batches: together they predict each token of the text once.
        num_bytes: of the text.
    """
    with torch.inference_mode():
        nats = sum((objective(batch).double().sum() for batch in batches), start=torch.zeros((), dtype=torch.float64))
    return float(nats) / math.log(2) / num_bytes
