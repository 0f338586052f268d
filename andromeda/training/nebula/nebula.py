"""Nebula: one loss of several tasks, each of its own kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from andromeda.errors import AndromedaError
from andromeda.training.nebula.balance import BALANCES, Balance
from andromeda.training.nebula.kinds import loss_for
from andromeda.training.nebula.losses import Loss

Balancing = Literal["fixed", "uncertainty", "famo"]


@dataclass(frozen=True)
class Task:
    """What a task makes small.

    Attributes:
        loss: None: of the kind that its first prediction and target can only mean.
        weight: that the balance's is multiplied by.
    """

    loss: Loss | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise AndromedaError(f"nebula: weight={self.weight!r} must not be negative")


@dataclass(frozen=True)
class Given:
    """What a task is given in a batch.

    Attributes:
        prediction, target: as its loss takes them.
        weights: of each element, of the losses' shape; None: 1.
    """

    prediction: Any
    target: Any
    weights: Tensor | None = None


@dataclass(frozen=True)
class Total:
    """Of a batch, or of the part of a step that it is.

    Attributes:
        loss: () what to differentiate.
        sums: (K,) of each task's losses, in the order of the tasks.
        counts: (K,) how many elements they are of, by weight.
    """

    loss: Tensor
    sums: Tensor
    counts: Tensor

    @property
    def means(self) -> Tensor:
        """(K,); NaN where a task had no element."""
        return self.sums / self.counts


class Nebula(nn.Module):
    """The balanced sum of the mean losses of named tasks.

    What it learns itself (of the balance, none if fixed) are its parameters and buffers, which belong in a checkpoint.

    Args:
        tasks: by name.
        balance: `fixed` (the tasks' weights), `uncertainty` or `famo`; see `balance`.

    Raises:
        AndromedaError: there is no task.
    """

    def __init__(self, tasks: Mapping[str, Task], balance: Balancing = "fixed") -> None:
        super().__init__()
        if not tasks:
            raise AndromedaError("nebula: there is no task; name at least one")
        self.tasks = dict(tasks)
        self._losses = {name: task.loss for name, task in tasks.items()}
        scales = [1.0 if task.loss is None else task.loss.scale for task in tasks.values()]
        self.balance: Balance = BALANCES[balance]([task.weight for task in tasks.values()], scales)

    @property
    def names(self) -> list[str]:
        return list(self.tasks)

    def forward(self, given: Mapping[str, Given], counts: Tensor | None = None, share: float = 1.0) -> Total:
        """The loss of a batch; the losses of the batches of a step add up to the step's.

        Args:
            given: by task; one that is absent adds nothing.
            counts: (K,) elements of the whole step, as `count` has them; None: the batch is all of it.
            share: of the step that this batch is, for what is added once a step.

        Raises:
            AndromedaError: an unknown task, one whose kind is ambiguous, or shapes that do not fit together.
        """
        sums, mine = zip(*(self._sum(name, given.get(name)) for name in self._checked(given)), strict=True)
        device = next(x.device for x in sums if isinstance(x, Tensor))
        total = torch.stack([torch.as_tensor(x, device=device) for x in sums])
        held = torch.stack([torch.as_tensor(x, device=device, dtype=total.dtype) for x in mine])
        over = (held if counts is None else counts.to(total)).clamp(min=torch.finfo(total.dtype).tiny)
        if self.balance.weights.device != device:
            self.balance.to(device)
        coefficients = self.balance.coefficients().to(total.dtype)
        loss = (coefficients * total / over).sum() + share * self.balance.penalty()
        return Total(loss, total.detach(), held)

    def count(self, given: Mapping[str, Given]) -> Tensor:
        """(K,) elements, by weight, of a batch."""
        return torch.stack([
            torch.zeros((), dtype=torch.float64) if name not in given
            else self._weights(name, given[name]).sum(dtype=torch.float64).cpu()
            for name in self._checked(given)
        ])  # fmt: skip

    def _checked(self, given: Mapping[str, Given]) -> list[str]:
        for name in given:
            if name not in self.tasks:
                raise AndromedaError(f"nebula: no task {name!r}; tasks: {', '.join(self.tasks)}")
        if not given:
            raise AndromedaError("nebula: a batch of no task")
        return self.names

    def _loss(self, name: str, given: Given) -> Loss:
        """Of a task; found from what it is given where none is stated."""
        loss = self._losses[name]
        if loss is None:
            loss = self._losses[name] = loss_for(given.prediction, given.target, name)
            self.balance.scales[self.names.index(name)] = loss.scale
        return loss

    def _weights(self, name: str, given: Given) -> Tensor:
        counts = self._loss(name, given).counts(given.target)
        if given.weights is None:
            return counts
        if given.weights.shape != counts.shape:
            raise AndromedaError(
                f"nebula: task {name!r}: weights {tuple(given.weights.shape)} of losses {tuple(counts.shape)}"
            )
        return counts * given.weights

    def _sum(self, name: str, given: Given | None) -> tuple[Tensor | float, Tensor | float]:
        if given is None:
            return 0.0, 0.0
        try:
            losses, weights = self._loss(name, given)(given.prediction, given.target), self._weights(name, given)
        except AndromedaError as error:
            raise AndromedaError(
                f"{error}" if repr(name) in str(error) else f"nebula: task {name!r}: {error}"
            ) from error
        return (losses * weights).sum(), weights.sum()
