"""What training on pairs makes small: DPO's loss, against the model that training began with.

The reference's log-probabilities are computed once, before the first step, by the same processes that train, and lie in
every checkpoint: 16 bytes a pair. So training holds one model, and goes on exactly wherever its origin is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from andromeda.model import Andromeda
from andromeda.tensorfile import load_tensors, save_tensors
from andromeda.training.nebula.losses import Pair, Preference
from andromeda.training.objective import Batch, NextToken

FILE, LOG_PROBABILITIES, HELD_OUT = "reference.safetensors", "log_probabilities", "held_out"


class Preferences(NextToken):
    """(P, 3) of the P pairs of a batch: the loss, the reward margin, and whether the margin is positive.

    A row of a batch is two sequences, one behind the other: chosen answers, and rejected ones of the same pairs.

    A reward is beta times the log-probability of an answer, the reference's taken off; their difference is the margin
    (Rafailov et al. 2023, section 5). In evaluation mode a batch is any text: (B, T) nats, as of `NextToken`.

    Attributes:
        reference: (pairs, 2) float64 log-probabilities of chosen and rejected answers, by the pair's number.
    """

    figures: tuple[str, ...] = ("reward_margin", "reward_accuracy")
    is_text: ClassVar[bool] = False

    def __init__(self, model: Andromeda, device: torch.device, precision: torch.dtype, beta: float) -> None:
        super().__init__(model, device, precision)
        self.loss = Preference(beta)
        self.reference = torch.empty(0, 2, dtype=torch.float64)

    def forward(self, batch: Batch) -> Tensor:
        if not self.training:
            return super().forward(batch)
        nats = super().forward(halved(batch))
        numbers, learned = pair_log_probabilities(nats, batch[2])
        before = self.reference[numbers].to(learned.device)
        mine, reference = (Pair(x[:, 0], x[:, 1]) for x in (learned, before))
        margins = self.loss.beta * self.loss.margins(mine, reference).detach()
        return torch.stack([self.loss(mine, reference), margins, (margins > 0).double()], dim=1)

    def count(self, batch: Batch) -> int:
        """Pairs of a batch."""
        return len(pair_numbers(batch[2]))

    def totals(self, losses: Tensor) -> Tensor:
        return losses.sum(0)


def halved(batch: Batch) -> Batch:
    """(N, 2T) -> (2N, T): both sequences of each row."""
    ids, targets, documents = (None if x is None else x.reshape(2 * len(x), -1) for x in batch)
    assert ids is not None and targets is not None
    return ids, targets, documents


def pair_numbers(documents: Tensor | None) -> Tensor:
    """(P,) of the pairs of a batch in their order, by its (B, T) document numbers; None: there is none."""
    if documents is None:
        return torch.empty(0, dtype=torch.int64)
    found = documents.flatten().unique_consecutive()
    return found[(found >= 0) & (found % 2 == 0)] // 2


def pair_log_probabilities(nats: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """The numbers of a batch's pairs, (P,), and the log-probabilities of both answers, (P, 2) float64.

    Args:
        nats: of each target, 0 where there is none.
        documents: as many numbers, on the CPU: 2p where an answer of pair p is chosen, 2p + 1 where one is rejected, in
            the same order, and negative ones between. None: no pair.
    """
    if documents is None:  # of a batch with nothing to learn
        return pair_numbers(None), nats.double().sum() * nats.new_zeros(0, 2, dtype=torch.float64)
    found, lengths = documents.flatten().unique_consecutive(return_counts=True)
    sums = torch.segment_reduce(nats.double().flatten(), "sum", lengths=lengths.to(nats.device))
    answers = [-sums[((found >= 0) & (found % 2 == which)).to(nats.device)] for which in (0, 1)]
    return pair_numbers(documents), torch.stack(answers, dim=1)


def reference_log_probabilities(
    objective: Callable[[Batch], Tensor], batches: Iterable[Batch], num_pairs: int
) -> Tensor:
    """(num_pairs, 2) float64 on the CPU; 0 for pairs that no batch has.

    Args:
        objective: -> (B, T) nats.
    """
    reference = torch.zeros(num_pairs, 2, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            numbers, found = pair_log_probabilities(objective(halved(batch)), batch[2])
            reference[numbers] = found.cpu()
    return reference


def held_out_figures(loss: Preference, learned: Tensor, reference: Tensor) -> dict[str, float]:
    """Means over pairs, for a line of metrics.

    Args:
        learned, reference: (P, 2) log-probabilities of chosen and rejected answers.
    """
    mine, theirs = (Pair(x[:, 0], x[:, 1]) for x in (learned, reference))
    margins = loss.beta * loss.margins(mine, theirs)
    return {
        "validation_loss": loss(mine, theirs).mean().item(),
        "validation_reward_margin": margins.mean().item(),
        "validation_reward_accuracy": (margins > 0).double().mean().item(),
    }


@dataclass(frozen=True)
class Reference:
    """What the model that training began with makes of pairs: (pairs, 2) float64, as of `Preferences`.

    Attributes:
        trained_on, held_out: of which pairs; None: no pairs are held out.
        held_out_key: fingerprint of these.
    """

    trained_on: Tensor
    held_out: Tensor | None = None
    held_out_key: str = ""


def save_reference(folder: Path, reference: Reference) -> None:
    """Into the training state of a checkpoint that is being made."""
    held_out = {} if reference.held_out is None else {HELD_OUT: reference.held_out}
    key = dict.fromkeys(held_out, reference.held_out_key)
    save_tensors(folder / FILE, {LOG_PROBABILITIES: reference.trained_on, **held_out}, key)


def load_reference(folder: Path) -> Reference | None:
    """Of a checkpoint's training state; None: it has none. Raises AndromedaError where it is damaged."""
    if not (folder / FILE).exists():
        return None
    tensors, texts = load_tensors(folder / FILE)
    return Reference(tensors[LOG_PROBABILITIES], tensors.get(HELD_OUT), texts.get(HELD_OUT, ""))
