"""What tests on several processes share: a run of a tiny model that is left in a folder, and goes on from there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from andromeda.tensorfile import load_tensors, save_tensors
from andromeda.training.processes import Processes
from andromeda.training.state import TrainingState

CPU = torch.device("cpu")
COUNTS = "random/counts"  # among the optimizer's tensors


def processes_of(group: Any) -> Processes:
    """This one among those of a group; None: it is alone."""
    return Processes(0, 1, CPU) if group is None else Processes(group.rank(), group.size(), CPU, group)


def keep(folder: Path, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], state: TrainingState) -> None:
    """Args: tensors: of the optimizer."""
    save_tensors(folder / "weights", dict(weights))
    counts = torch.tensor([state.step, state.sequence, state.tokens])
    save_tensors(folder / "optimizer", {**tensors, COUNTS: counts})


def kept(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], TrainingState]:
    """What `keep` was given."""
    tensors = load_tensors(folder / "optimizer")[0]
    step, sequence, tokens = tensors.pop(COUNTS).tolist()
    return load_tensors(folder / "weights")[0], tensors, TrainingState(step=step, sequence=sequence, tokens=tokens)
