"""What a step of training is made with: one process, or several that share a model or its data."""

from __future__ import annotations

from andromeda.model import Andromeda
from andromeda.training.engines.single import Engine
from andromeda.training.processes import Processes
from andromeda.training.recipe import Recipe

__all__ = ["Engine", "build_engine", "check_engine"]


def check_engine(recipe: Recipe, processes: Processes) -> None:
    """Before any work. Raises AndromedaError where something that the recipe's engine needs is missing."""
    if recipe.engine == "zero3" and not _alone(recipe, processes):
        from andromeda.training.engines import zero3

        zero3.check(recipe)


def build_engine(recipe: Recipe, model: Andromeda, processes: Processes) -> Engine:
    """The recipe's, around a model that lies whole on the CPU, the same in every process.

    One process alone needs none, unless things are to be kept off its device.
    """
    if _alone(recipe, processes):
        return Engine(recipe, model, processes)
    if recipe.engine == "zero3":
        from andromeda.training.engines.zero3 import ZeRO3

        return ZeRO3(recipe, model, processes)
    if recipe.engine == "fsdp":
        from andromeda.training.engines.fsdp import FSDP

        return FSDP(recipe, model, processes)
    from andromeda.training.engines.ddp import DDP

    return DDP(recipe, model, processes)


def _alone(recipe: Recipe, processes: Processes) -> bool:
    return processes.ranks == 1 and recipe.offload == "none"
