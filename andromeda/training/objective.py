"""What training makes small: the cross-entropy of the next token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from andromeda.context import Context
from andromeda.model import IGNORED, Andromeda

# (B, T) ids, targets (IGNORED where none is to be predicted) and document numbers or None, on the CPU.
Batch = tuple[Tensor, Tensor, Tensor | None]
Objective = Callable[[Batch], Tensor]  # -> (B, T) nats, 0 where there is no target


class NextToken(nn.Module):
    """Cross-entropy of each target, in nats: float32, from activations in the given precision.

    A module, so that what spreads a model over processes can be put around all that a step computes.

    Attributes:
        figures: names of the means that it gives beside the loss.
        is_text: whether the loss is what a text costs, so that it can be told in bits per byte.
        team: processes that share each sequence; None: this one has it alone.

    Args:
        model: its weights are float32.
        precision: of matrix products; bfloat16 by autocast.
    """

    figures: tuple[str, ...] = ()
    is_text: ClassVar[bool] = True

    def __init__(self, model: Andromeda, device: torch.device, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.device, self.precision = model, device, precision
        self.team: ProcessGroup | None = None

    def forward(self, batch: Batch) -> Tensor:
        """(B, T) nats; in a team those of this process' tokens alone."""
        context = None if self.team is None else Context(batch[0].shape[1], self.team)
        parts = batch if context is None else (None if x is None else context.split(x) for x in batch)
        ids, targets, documents = (None if x is None else x.to(self.device, non_blocking=True) for x in parts)
        assert ids is not None and targets is not None
        lower = self.precision is not torch.float32
        with torch.autocast(self.device.type, self.precision if lower else torch.bfloat16, enabled=lower):
            losses = self.model.token_losses(ids, targets, documents=documents, context=context)
        return losses.clone()  # no view: FSDP hangs its gathering on the output

    def count(self, batch: Batch) -> int:
        """Of what a step's loss is the mean: targets."""
        return int((batch[1] != IGNORED).sum())

    def totals(self, losses: Tensor) -> Tensor:
        """(1 + len(figures),) sums of what `forward` gave: of the loss, to be differentiated, and of each figure."""
        return losses.sum()[None]


def total_nats(objective: Objective, batches: Iterable[Batch]) -> Tensor:
    """() float64: what all targets cost together."""
    with torch.no_grad():  # inference mode would keep FSDP from gathering weights
        return sum((objective(batch).double().sum() for batch in batches), start=torch.zeros((), dtype=torch.float64))


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """How many bits a text costs, a byte of UTF-8, whose tokens cost so many nats together."""
    return nats / math.log(2) / num_bytes
