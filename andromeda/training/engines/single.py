"""One process and one device; the engines of many processes differ from it where they must."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from andromeda.model import Andromeda
from andromeda.training.objective import Batch, NextToken
from andromeda.training.optimizer import build_optimizer, set_learning_rate
from andromeda.training.processes import Processes
from andromeda.training.recipe import Recipe
from andromeda.training.state import optimizer_tensors, restore


class Engine:
    """A model, its optimizer and the device they are on.

    Where there are several processes, all call each of its methods, in the same order.

    Attributes:
        objective: (B, T) nats of a batch.
        averaged_over: how many processes' gradients it takes the mean of, where their sum is wanted.

    Args:
        model: whole, the same in every process.
    """

    def __init__(self, recipe: Recipe, model: Andromeda, processes: Processes) -> None:
        self.recipe, self.processes = recipe, processes
        self.averaged_over = 1
        self.model = model.to(processes.device)
        self.objective: nn.Module = NextToken(model, processes.device, getattr(torch, recipe.precision))
        self.wrap()
        self.optimizer = build_optimizer(self.model, recipe)

    def wrap(self) -> None:
        """Puts around the objective what spreads it, before the optimizer sees the parameters."""

    def accumulate(self, batch: Batch, divisor: Tensor | float, last: bool) -> Tensor:
        """Adds a batch's gradient to those of its step, divided by `divisor`; returns the sum of its losses.

        After the `last` batch of a step the gradients are those of the sum over all processes.
        """
        with self.adding_up(last):
            loss: Tensor = self.objective(batch).sum()
            (loss * self.averaged_over / divisor).backward()
        return loss.detach()

    def adding_up(self, last: bool) -> AbstractContextManager[None]:  # noqa: ARG002 - for engines of many processes
        """Within it a batch runs forward and backward; behind the `last` one of a step gradients are exchanged."""
        return nullcontext()

    def clip(self) -> Tensor:
        """Clips the gradient of a step. Returns the norm of all of it before."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm or math.inf)

    def move(self, learning_rate: float) -> None:
        """Moves the weights, and forgets the gradient."""
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drops the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it every process has all weights."""
        yield

    def weights(self) -> Mapping[str, Tensor]:
        """The model's state, for a checkpoint. The first process has it whole; others may have none."""
        return self.model.state_dict()

    def optimizer_tensors(self) -> Mapping[str, Tensor]:
        """The optimizer's, likewise, under names that do not depend on the engine."""
        return optimizer_tensors(self.model, self.optimizer)

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Puts whole weights, given to every process, in place of the model's."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.part(weights[name], parameter))

    def part(self, tensor: Tensor, parameter: Tensor) -> Tensor:  # noqa: ARG002 - for engines that share weights out
        """What this process holds of a whole tensor that belongs to a parameter."""
        return tensor

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `optimizer_tensors` gave, of any engine and number of processes.

        Raises:
            AndromedaError: the tensors belong to another model or optimizer.
        """
        restore(tensors, self.model, self.optimizer, self.part)
