"""AdamW with both moments in 8 bits: torchao's, and its state as plain tensors.

A moment is a code of 8 bits for each parameter, a float32 scale for each block of 256, and a map of 256 values that
codes stand for (Dettmers et al. 2022, arXiv:2110.02861): 2.03 bytes a parameter for both, where float32 takes 8.
torchao leaves tensors in float32 that have fewer than 4,096 elements, or no whole number of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

from andromeda.errors import AndromedaError
from andromeda.training.imports import no_warnings
from andromeda.training.muon import Groups

PARTS = ("codes", "scale", "qmap")  # of a moment: OptimState8bit.tensor_attrs


def build_adamw8bit(groups: Groups, learning_rate: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """torchao's AdamW8bit. Its learning rates are tensors, and have to stay these tensors.

    torchao compiles a step for each shape. On a CPU that takes a C++ compiler and most of a minute, so there it runs
    uncompiled.

    Raises:
        AndromedaError: torchao is not installed.
    """
    check_installed()
    with no_warnings():
        from torchao.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=learning_rate, betas=betas)
    if all(parameter.device.type == "cpu" for group in groups for parameter in group["params"]):
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)  # type: ignore[method-assign]
    return optimizer


def check_installed() -> None:
    """Raises AndromedaError where torchao is not."""
    if find_spec("torchao") is None:
        raise AndromedaError(
            "recipe: optimizer='adamw8bit' needs torchao, which is not installed; pip install 'andromeda-lm[train]'"
        )


def to_plain(key: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of an optimizer's state as {key: value}, or, in 8 bits, as {key.codes, key.scale, key.qmap}."""
    if not hasattr(value, "qmap"):
        return {key: value}
    return {f"{key}.{part}": getattr(value, part) for part in PARTS}


def from_plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's state of what `to_plain` made of it.

    Raises:
        AndromedaError: a moment in 8 bits of which something is missing, or torchao is not installed.
    """
    moments: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key, dot, part = name.partition(".")
        if dot:
            moments.setdefault(key, {})[part] = tensor
        else:
            state[key] = tensor
    return state | {key: _moment(key, parts) for key, parts in moments.items()}


def _moment(key: str, parts: Mapping[str, Tensor]) -> Tensor:
    if set(parts) != set(PARTS):
        raise AndromedaError(f"the optimizer's {key!r} in 8 bits has {sorted(parts)}, and needs {sorted(PARTS)}")
    check_installed()
    with no_warnings():
        from torchao.optim.subclass_8bit import OptimState8bit

    signed = bool((parts["qmap"] < 0).any())
    return OptimState8bit(*(parts[part] for part in PARTS), signed=signed, dtype=torch.float32)
