"""What a step of training is made with: one process, or several that share a model or its data."""

from __future__ import annotations

from andromeda.model import Andromeda
from andromeda.training.engines.single import Engine
from andromeda.training.processes import Processes
from andromeda.training.recipe import Recipe

__all__ = ["Engine", "build_engine"]


def build_engine(recipe: Recipe, model: Andromeda, processes: Processes) -> Engine:
    """The recipe's, around a model that lies whole on the CPU, the same in every process; one alone needs none."""
    if processes.ranks == 1:
        return Engine(recipe, model, processes)
    if recipe.engine == "fsdp":
        from andromeda.training.engines.fsdp import FSDP

        return FSDP(recipe, model, processes)
    from andromeda.training.engines.ddp import DDP

    return DDP(recipe, model, processes)
