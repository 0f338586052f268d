"""Weights in eight bits, in place, by torchao."""

from __future__ import annotations

import torch
from torch import nn

from andromeda.errors import AndromedaError
from andromeda.model import Andromeda

KINDS = ("int8",)


def quantise(model: Andromeda, kind: str) -> None:
    """Rounds the weights of all products to integers of -128 to 127 with a scale a row; activations stay as they are.

    A weight moves by at most half a scale, 1/254 of the largest in its row. The embedding stays as it is, and a tied
    output with it.

    Raises:
        AndromedaError: an unknown kind, or torchao is not installed.
    """
    if kind not in KINDS:
        raise AndromedaError(f"engine: quantize={kind!r} must be one of {', '.join(KINDS)}")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise AndromedaError("engine: quantize='int8' needs torchao; install andromeda-lm[serve]") from error
    with torch.no_grad():
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, _: isinstance(module, nn.Linear))
