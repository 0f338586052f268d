"""What a block keeps for its backward pass, and whether it is compiled: applied to a model from outside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from andromeda.model import Andromeda
from andromeda.training.fp8 import to_fp8
from andromeda.training.recipe import Recipe

KEPT = {
    "aten::mm",
    "aten::addmm",
    "andromeda::flash_attention",
}  # dear to compute; tiled attention has products of its own


def prepare_blocks(model: Andromeda, recipe: Recipe) -> None:
    """Makes the model's blocks compute as the recipe's `precision`, `checkpointing` and `compile` say.

    The names of weights stay.
    With `selective` what is dear to compute, matrix products and attention, is kept, and the rest computed again
    (Korthikanti et al. 2022); with `full` a block keeps its input alone (Chen et al. 2016).
    """
    if recipe.precision == "fp8":
        to_fp8(model)
    for block in model.blocks:
        forward: Callable[..., Tensor] = block.forward
        if recipe.checkpointing == "selective":
            kept = partial(create_selective_checkpoint_contexts, _policy)
            forward = partial(checkpoint, forward, use_reentrant=False, context_fn=kept)
        if recipe.compile:
            forward = torch.compile(forward)
        if recipe.checkpointing == "full":
            forward = partial(checkpoint, forward, use_reentrant=False)
        block.forward = forward  # type: ignore[method-assign]


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
