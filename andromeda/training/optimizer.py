"""How weights move: the learning rate as a function of the step, and the optimizer."""

from __future__ import annotations

import math

import torch
from torch import nn

from andromeda.training.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of the given step, counted from 0: it rises over the first warmup_steps, then follows the schedule.

    Both falling schedules would be at final_ratio in the step after the last.
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "cosine":
        left = 0.5 + 0.5 * math.cos(math.pi * _progress(step, recipe.warmup_steps, recipe.num_steps))
    elif recipe.schedule == "wsd":
        decay_steps = max(1, round(recipe.num_steps * recipe.decay_fraction))
        left = 1.0 - _progress(step, recipe.num_steps - decay_steps, recipe.num_steps)
    else:
        left = 1.0
    return recipe.learning_rate * (recipe.final_ratio + (1 - recipe.final_ratio) * left)


def _progress(step: int, first: int, last: int) -> float:
    return min(1.0, max(0.0, (step - first) / max(1, last - first)))


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019). Weight decay pulls at matrices alone.

    Not at gains and norms, whose size means something, nor at embeddings, whose rare rows would shrink while they wait
    for a gradient.
    """
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    groups: list[dict[str, object]] = [
        {"params": [p for p in model.parameters() if id(p) in matrices], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
