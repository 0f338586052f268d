"""Muon for matrices and AdamW for all else, as one optimizer: PyTorch's own two, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Groups = list[dict[str, Any]]  # as torch.optim takes them: `params`, and what differs from the optimizer's own settings


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) beside AdamW.

    Muon moves a matrix along its Nesterov momentum (0.95), made nearly orthogonal by five Newton-Schulz steps, in
    bfloat16 on a GPU and in float32 on a CPU. It is scaled so that its entries move as far as AdamW's do, which lets
    AdamW's learning rate and weight decay stand (Liu et al. 2025, arXiv:2502.16982, section 2.2).

    `param_groups` and `state` are those of both parts, Muon's groups first.

    Args:
        matrices: Muon's groups, of tensors with two dimensions.
        others: AdamW's.
        learning_rate: of both.
        betas: AdamW's.
    """

    def __init__(self, matrices: Groups, others: Groups, learning_rate: float, betas: tuple[float, float]) -> None:
        muon = torch.optim.Muon(matrices, lr=learning_rate, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, lr=learning_rate, betas=betas, fused=True)
        self._parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        on_cpu = all(parameter.device.type == "cpu" for group in self.param_groups for parameter in group["params"])
        with _InFloat32() if on_cpu else nullcontext():
            for part in self._parts:
                part.step()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What `load_state_dict` ends with: new groups and a new state, so the parts have to be given them."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        first = 0
        for part in self._parts:
            part.param_groups = self.param_groups[first : first + len(part.param_groups)]
            part.state = self.state
            first += len(part.param_groups)


class _InFloat32(TorchFunctionMode):
    """Makes `tensor.bfloat16()`, with which PyTorch's Muon begins its products, a copy in float32.

    Most CPUs have no products in bfloat16: a step of the nano preset takes 4.0 s with them, and 0.1 in float32.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return args[0].clone() if func is torch.Tensor.bfloat16 else func(*args, **(kwargs or {}))
