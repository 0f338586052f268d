"""One process and one device; the engines of many processes differ from it where they must."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from andromeda.model import Andromeda
from andromeda.training.activations import prepare_blocks
from andromeda.training.nebula.objective import Mixed, Multitask, attached
from andromeda.training.objective import Batch, NextToken
from andromeda.training.optimizer import build_optimizer, set_learning_rate
from andromeda.training.preference import Preferences
from andromeda.training.processes import Processes
from andromeda.training.recipe import Recipe
from andromeda.training.state import optimizer_tensors, restore


def build_objective(recipe: Recipe, model: Andromeda, device: torch.device) -> NextToken:
    """What the recipe asks to be made small."""
    precision = recipe.activations
    if attached(model) is not None:
        return Multitask(model, device, precision)
    if recipe.data.pairs_paths:
        return Preferences(model, device, precision, recipe.beta)
    return NextToken(model, device, precision)


class Engine:
    """A model, its optimizer and the device they are on.

    Where there are several processes, all call each of its methods, in the same order.

    Attributes:
        objective: what is made small, of a batch.
        plain: the same, before anything is put around it.
        loss_scale: what losses are multiplied by on the way back, so that gradients fit in float16.
        averaged_over: how many processes' gradients it takes the mean of, where their sum is wanted.

    Args:
        model: whole, the same in every process.
    """

    def __init__(self, recipe: Recipe, model: Andromeda, processes: Processes) -> None:
        self.recipe, self.processes = recipe, processes
        self.averaged_over, self.loss_scale = 1, 1.0
        self.model = self.place(model)
        prepare_blocks(self.model, recipe)
        self.plain = build_objective(recipe, model, processes.device)
        self.plain.team = processes.team
        self.objective: nn.Module = self.plain
        self.wrap()
        self.optimizer = build_optimizer(self.model, recipe)

    @property
    def num_learned(self) -> int:
        """Parameters that are not frozen, of all processes together."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def place(self, model: Andromeda) -> Andromeda:
        """Puts the model where it is trained."""
        return model.to(self.processes.device)

    def wrap(self) -> None:
        """Puts around the objective what spreads it, before the optimizer sees the parameters."""

    def accumulate(self, batch: Batch | Mixed, divisor: Tensor | float, last: bool) -> Tensor:
        """Adds a batch's gradient to those of its step, divided by `divisor`; returns its `totals`.

        After the `last` batch of a step the gradients are those of the sum over all processes.
        """
        with self.adding_up(last):
            totals = self.plain.totals(self.objective(batch))
            (totals[0] * (self.averaged_over * self.loss_scale) / divisor).backward()
        return totals.detach()

    def adding_up(self, last: bool) -> AbstractContextManager[None]:  # noqa: ARG002 - for engines of many processes
        """Within it a batch runs forward and backward; behind the `last` one of a step gradients are exchanged."""
        return nullcontext()

    def clip(self) -> Tensor:
        """Clips the gradient of a step. Returns the norm of all of it before; no number if loss_scale is too much."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if self.loss_scale != 1:
            for gradient in gradients:
                gradient.div_(self.loss_scale)
        norm = _norm(gradients)
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.recipe.clip_norm or math.inf, norm)
        return norm

    def move(self, learning_rate: float) -> None:
        """Moves the weights by the gradient, and forgets it."""
        set_learning_rate(self.optimizer, learning_rate)
        self.step()

    def step(self) -> None:
        """At the learning rate that the optimizer has."""
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drops the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the objective gives (B, T) nats of text, and draws no random numbers."""
        self.objective.eval()
        try:
            yield
        finally:
            self.objective.train()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it every process has all gains, from which bounds and windows follow, and maybe more."""
        yield

    def weights(self) -> Mapping[str, Tensor]:
        """The model's state, for a checkpoint. The first process has it whole; others may have none."""
        return self.model.state_dict()

    def optimizer_tensors(self) -> Mapping[str, Tensor]:
        """The optimizer's, likewise, under names that do not depend on the engine."""
        return optimizer_tensors(self.model, self.optimizer)

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Puts whole weights, given to every process, in place of those that the model learns."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if not parameter.requires_grad:
                    continue
                parameter.copy_(self.part(weights[name], parameter))
            for name, buffer in self.model.named_buffers():
                if name in weights:  # others are computed
                    buffer.copy_(weights[name])

    def part(self, tensor: Tensor, parameter: Tensor) -> Tensor:  # noqa: ARG002 - for engines that share weights out
        """What this process holds of a whole tensor that belongs to a parameter."""
        return tensor

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `optimizer_tensors` gave, of any engine and number of processes.

        Raises:
            AndromedaError: the tensors belong to another model or optimizer.
        """
        restore(tensors, self.model, self.optimizer, self.part)


def _norm(gradients: list[Tensor]) -> Tensor:
    """Of all together. On a CPU in float64: PyTorch's float32 is wrong by 1e-4 there for a matrix of a million."""
    if not gradients or gradients[0].device.type != "cpu":  # on a GPU float64 would take a copy
        return nn.utils.get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms)).float()
