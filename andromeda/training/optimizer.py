"""How weights move: the learning rate as a function of the step, and the optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.training.adamw8bit import build_adamw8bit, check_installed
from andromeda.training.muon import Groups, MuonAndAdamW
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


def check_optimizer(recipe: Recipe) -> None:
    """Before any work. Raises AndromedaError where a package that the recipe's optimizer needs is not installed."""
    if recipe.optimizer == "adamw8bit":
        check_installed()


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of all groups. Where it is a tensor, as torchao wants it, the tensor stays."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's: AdamW (Loshchilov and Hutter 2019), the same with moments in 8 bits, or Muon beside it.

    Weight decay pulls at matrices alone. Not at gains and norms, whose size means something, nor at embeddings, whose
    rare rows would shrink while they wait for a gradient. Muon moves the matrices within blocks; one at the end of the
    model, such as the logits', stays with AdamW, as Muon's authors advise. What is frozen has no state.

    Raises:
        AndromedaError: a package that the optimizer needs is not installed.
    """
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linear = [(name, module.weight) for name, module in modules if module.weight.requires_grad]
    hidden = [weight for name, weight in linear if "blocks" in name.split(".")]
    ends = [weight for name, weight in linear if "blocks" not in name.split(".")]
    matrices = {id(weight) for _, weight in linear}
    decaying: dict[str, Any] = {"weight_decay": recipe.weight_decay}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in matrices]
    others = {"params": rest, "weight_decay": 0.0}
    if recipe.optimizer == "muon":
        by_adamw = [{"params": ends, **decaying}, others]
        return MuonAndAdamW([{"params": hidden, **decaying}], by_adamw, recipe.learning_rate, recipe.betas)
    groups: Groups = [{"params": hidden + ends, **decaying}, others]
    if recipe.optimizer == "adamw8bit":
        return build_adamw8bit(groups, recipe.learning_rate, recipe.betas)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
