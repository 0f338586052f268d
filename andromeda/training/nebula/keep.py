"""Tasks in a checkpoint: heads beside the model, for whoever opens it; what a balance has learned in `training/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from andromeda.errors import AndromedaError
from andromeda.tensorfile import load_tensors, save_tensors
from andromeda.training.nebula.heads import HeadSpec, load_heads, save_heads
from andromeda.training.nebula.objective import ATTACHED, Tasks
from andromeda.training.state import FOLDER

BALANCE = "balance.safetensors"  # TENSOR of `Nebula.balance`; not there where it learns nothing
OF_HEADS, OF_BALANCE = f"{ATTACHED}.heads.to_", f"{ATTACHED}.nebula.balance."


@dataclass(frozen=True)
class KeptTasks:
    """What a checkpoint has of tasks: the specs of its heads, and tensors by their names in the model."""

    specs: Mapping[str, HeadSpec]
    tensors: Mapping[str, Tensor]


def split(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a plain model, and what tasks attached to it."""
    plain: dict[str, Tensor] = {}
    tasks: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        (tasks if name.startswith(f"{ATTACHED}.") else plain)[name] = tensor
    return plain, tasks


def save_tasks(folder: Path, tasks: Tasks, tensors: Mapping[str, Tensor]) -> None:
    """Into a checkpoint that is being made, whose `training/` is there.

    Args:
        tensors: the second part of `split`.
    """
    if tasks.heads:
        specs = {name: tasks.head(name).spec for name in tasks.names if tasks.has_head(name)}
        save_heads(folder, specs, _under(OF_HEADS, tensors))
    if balance := _under(OF_BALANCE, tensors):
        save_tensors(folder / FOLDER / BALANCE, balance)


def load_tasks(folder: Path) -> KeptTasks:
    """Of a checkpoint; empty where it has none.

    Raises:
        AndromedaError: a file is damaged, or one of two is missing.
    """
    heads = load_heads(folder)
    tensors = {f"{OF_HEADS}{name}.{key}": x for name, head in heads.items() for key, x in head.state_dict().items()}
    path = folder / FOLDER / BALANCE
    if path.exists():
        tensors |= {f"{OF_BALANCE}{name}": tensor for name, tensor in load_tensors(path)[0].items()}
    return KeptTasks({name: head.spec for name, head in heads.items()}, tensors)


def restore_tasks(tasks: Tasks, kept: KeptTasks) -> None:
    """Puts heads and balance where they were.

    Raises:
        AndromedaError: the checkpoint has those of other tasks.
    """
    own = tasks.state_dict(prefix=f"{ATTACHED}.")
    for name in sorted(own.keys() ^ kept.tensors.keys()):
        what = "lacks" if name in own else "has, beyond the recipe's tasks,"
        raise AndromedaError(f"the checkpoint {what} {name!r}; it belongs to another recipe")
    shapes = [name for name, tensor in own.items() if tensor.shape != kept.tensors[name].shape]
    if shapes:
        raise AndromedaError(f"the checkpoint's {shapes[0]!r} is of another size; it belongs to another recipe")
    tasks.load_state_dict({name.removeprefix(f"{ATTACHED}."): tensor for name, tensor in kept.tensors.items()})


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
