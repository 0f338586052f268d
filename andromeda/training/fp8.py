"""Matrix products of blocks in eight bits, by torchao: forward in e4m3, gradients in e5m2, scales by tensor."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from andromeda.errors import AndromedaError
from andromeda.model import Andromeda

CAPABILITY = (8, 9)  # the first with such products


def check_fp8() -> None:
    """Before any work. Raises AndromedaError where torchao is not installed, or the GPU has no such products."""
    if find_spec("torchao") is None:
        raise AndromedaError("recipe: precision='fp8' needs torchao; pip install 'andromeda-lm[train]'")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
        name = torch.cuda.get_device_name()
        raise AndromedaError(f"recipe: precision='fp8' needs a GPU of Ada, Hopper or later; {name} has bfloat16")


def to_fp8(model: Andromeda) -> None:
    """The linear maps of all blocks multiply in eight bits; weights stay float32 under their names.

    What is not on a GPU computes the same values by float32 products.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    emulate = next(model.parameters()).device.type != "cuda"
    convert_to_float8_training(
        model,
        config=Float8LinearConfig(emulate=emulate),
        module_filter_fn=lambda module, name: isinstance(module, nn.Linear) and name.startswith("blocks."),
    )
