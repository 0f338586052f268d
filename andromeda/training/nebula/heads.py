"""Heads: what turns a hidden state of the model into a class, labels or a number. They lie beside the model:

heads.json          what each head reads and tells, by the name of its task
heads.safetensors   their weights as TASK.weight (size, dim) and TASK.bias (size)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from andromeda.errors import AndromedaError
from andromeda.tensorfile import load_tensors, save_tensors
from andromeda.training.nebula.packing import Packed, pool
from andromeda.training.nebula.recipe import Pooling
from andromeda.training.nebula.targets import Target

SPECS, WEIGHTS = "heads.json", "heads.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class HeadSpec:
    """What a head reads and tells."""

    target: Target
    pooling: Pooling = "last"


class Head(nn.Linear):
    """Inputs of the model's -> (E, size) numbers, in float32. It begins at zero, which tells all classes alike."""

    def __init__(self, dim: int, spec: HeadSpec) -> None:
        super().__init__(dim, spec.target.size)
        self.spec = spec

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def read(self, hidden: Tensor, packed: Packed) -> Tensor:
        """The model's (R, T, dim) hidden states of the packed inputs -> (E, size)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self(pool(hidden, packed, self.spec.pooling))


def save_heads(folder: Path, heads: Mapping[str, HeadSpec], weights: Mapping[str, Tensor]) -> None:
    """Writes heads into a model directory that is being made.

    Args:
        weights: TASK.weight and TASK.bias of each.
    """
    save_tensors(folder / WEIGHTS, dict(weights))
    values = {"format_version": FORMAT_VERSION, "heads": {name: asdict(spec) for name, spec in heads.items()}}
    (folder / SPECS).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_heads(folder: Path) -> dict[str, Head]:
    """The heads of a model directory, on the CPU; none where it has none.

    Raises:
        AndromedaError: one of the files is missing, damaged, or not what the other calls for.
    """
    if not (folder / SPECS).exists() and not (folder / WEIGHTS).exists():
        return {}
    specs, weights = _read_specs(folder / SPECS), load_tensors(folder / WEIGHTS)[0]
    names = {f"{name}.{part}" for name in specs for part in ("weight", "bias")}
    for name in sorted(names ^ set(weights)):
        raise AndromedaError(
            f"{folder / WEIGHTS}: {name!r} is in one of it and {SPECS} alone; copy the directory again"
        )
    return {name: _built(name, spec, weights, folder / WEIGHTS) for name, spec in specs.items()}


def _built(name: str, spec: HeadSpec, weights: Mapping[str, Tensor], path: Path) -> Head:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    size = spec.target.size
    if weight.dim() != 2 or len(weight) != size or bias.shape != (size,):
        raise AndromedaError(f"{path}: the head {name!r} tells {size} numbers, and has {tuple(weight.shape)} weights")
    head = Head(weight.shape[1], spec)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head


def _read_specs(path: Path) -> dict[str, HeadSpec]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version is {values['format_version']!r}, not {FORMAT_VERSION}")
        return {name: _spec(**spec) for name, spec in values["heads"].items()}
    except FileNotFoundError as error:
        raise AndromedaError(f"{path}: no such file; {WEIGHTS} beside it needs it") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, AndromedaError) as error:
        raise AndromedaError(f"{path}: does not describe heads ({error}); copy the directory again") from error


def _spec(target: dict[str, Any], pooling: Any) -> HeadSpec:
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}")
    return HeadSpec(Target(**{**target, "labels": tuple(target["labels"])}), pooling)
