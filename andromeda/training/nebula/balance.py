"""How much each task counts: what the sum over tasks weighs their mean losses by.

A balance gives coefficients, which are linear in the losses, so that a step may be made of several batches, on several
processes; what it learns, it learns from the means over the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

EPSILON = 1e-8  # a loss of 0 has no logarithm


class Balance(nn.Module):
    """Fixed weights, and the base of those that learn.

    Attributes:
        looks_again: whether `observe` needs the losses of the same data after the step, which takes a forward pass.

    Args:
        weights: of each task; others multiply them.
        scales: `Loss.scale` of each task.
    """

    looks_again: ClassVar[bool] = False
    weights: Tensor
    scales: Tensor

    def __init__(self, weights: Sequence[float], scales: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32), persistent=False)
        self.register_buffer("scales", torch.tensor(scales, dtype=torch.float32), persistent=False)

    def coefficients(self) -> Tensor:
        """(K,) what the tasks' mean losses are multiplied by."""
        return self.weights

    def penalty(self) -> Tensor:
        """What is added once a step."""
        return self.weights.new_zeros(())

    def observe(self, before: Tensor, after: Tensor) -> None:
        """Learns from (K,) mean losses of a step's data, before the step and after it; NaN where a task had none."""


class Uncertainty(Balance):
    """Each task's own noise, learned with the model (Kendall et al. 2018): scale * L / sigma^2 + log sigma.

    `log_variance` is log sigma^2, from 0 on. Where the losses stay, scale * L = sigma^2 / 2.
    """

    def __init__(self, weights: Sequence[float], scales: Sequence[float]) -> None:
        super().__init__(weights, scales)
        self.log_variance = nn.Parameter(torch.zeros(len(weights)))

    def coefficients(self) -> Tensor:
        return self.weights * self.scales * torch.exp(-self.log_variance)

    def penalty(self) -> Tensor:
        return (self.weights * self.log_variance).sum() / 2


class FAMO(Balance):
    """Fast adaptive multitask optimisation (Liu et al. 2023, algorithm 1): all logarithms of losses fall alike.

    The model follows the gradient of sum_i z_i log L_i, z = softmax(xi), divided by sum_i z_i / L_i; a task whose loss
    fell more than others' in a step loses weight. The losses in it are those last observed, all alike before.
    """

    looks_again: ClassVar[bool] = True
    LEARNING_RATE: ClassVar[float] = 0.025  # of xi, by Adam, and the decay, as the paper has them
    DECAY: ClassVar[float] = 1e-3
    xi: Tensor
    losses: Tensor

    def __init__(self, weights: Sequence[float], scales: Sequence[float]) -> None:
        super().__init__(weights, scales)
        count = len(weights)
        self.register_buffer("xi", torch.zeros(count))
        self.register_buffer("losses", torch.ones(count))
        for name, value in (
            ("step", torch.zeros(())),
            ("exp_avg", torch.zeros(count)),
            ("exp_avg_sq", torch.zeros(count)),
        ):
            self.register_buffer(f"adam_{name}", value)

    def coefficients(self) -> Tensor:
        shares = torch.softmax(self.xi, 0) / self.losses.clamp(min=EPSILON)
        return self.weights * shares / shares.sum()

    @torch.no_grad()
    def observe(self, before: Tensor, after: Tensor) -> None:
        seen = ~(before.isnan() | after.isnan())
        fallen = (before.clamp(min=EPSILON) / after.clamp(min=EPSILON)).log().masked_fill(~seen, 0.0)
        z = torch.softmax(self.xi, 0)
        gradient = z * (fallen - (z * fallen).sum())  # of the softmax's Jacobian with what fell
        self._adam(gradient)
        self.losses = torch.where(seen, after, self.losses)

    def _adam(self, gradient: Tensor) -> None:
        """PyTorch's, over a state that is saved with the module."""
        xi = nn.Parameter(self.xi)
        xi.grad = gradient.to(xi.dtype)
        adam = torch.optim.Adam([xi], lr=self.LEARNING_RATE, weight_decay=self.DECAY, foreach=False)
        adam.state[xi] = {name: getattr(self, f"adam_{name}") for name in ("step", "exp_avg", "exp_avg_sq")}
        adam.step()
        self.xi = xi.detach()


BALANCES: dict[str, type[Balance]] = {"fixed": Balance, "uncertainty": Uncertainty, "famo": FAMO}
