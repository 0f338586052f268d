"""Where training stands, apart from the weights: in a checkpoint, the folder `training/`.

state.json              the counts of TrainingState, the fingerprint of the data, and the checksum of this file: the
                        SHA-256 of its bytes with these 64 digits read as zeros, as in `andromeda.tensorfile`
optimizer.safetensors   the optimizer's tensors as NAME_OF_PARAMETER/KEY, and the random generators' as random/DEVICE;
                        what is held in 8 bits as three: KEY.codes, KEY.scale and KEY.qmap
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.errors import AndromedaError
from andromeda.tensorfile import NO_DIGEST, REMEDY, load_tensors, save_tensors
from andromeda.training import scaling
from andromeda.training.adamw8bit import from_plain, to_plain

FOLDER, COUNTS, TENSORS = "training", "state.json", "optimizer.safetensors"
RANDOM, DIGEST = "random", "sha256"


@dataclass
class TrainingState:
    """Counts since the start of the run."""

    step: int = 0  # optimizer steps done
    sequence: int = 0  # the next to train on: the position in the data
    tokens: int = 0  # targets trained on
    seconds: float = 0.0  # of training, without validation and saving
    loss_sum: float = 0.0  # nats since the last line of metrics
    figure_sums: list[float] = field(default_factory=list)  # of what the objective gives beside the loss
    loss_tokens: int = 0  # that loss_sum is of; pairs, of training on pairs
    loss_read: int = 0  # tokens that went through the model meanwhile: those that are not learned, and padding, too
    loss_seconds: float = 0.0
    examples_read: int = 0  # tokens of tasks' examples that went through the model meanwhile, about
    norms: list[float] = field(default_factory=list)  # of the gradients followed last
    refused: int = 0  # steps in a row whose gradient was not followed
    went_back: bool = False  # to a checkpoint, and followed no gradient since
    loss_scale: float = scaling.START  # of float16 alone, as is the next
    finite: int = 0  # steps in a row that this scale was not too much for
    data_key: str = ""  # fingerprint of the training data; of a build, the SHA-256 of its manifest


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer holds, as NAME_OF_PARAMETER/KEY."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(model, optimizer):
        for key, value in optimizer.state[parameter].items():
            tensors |= to_plain(f"{name}/{key}", value)
    return tensors


def save_state(folder: Path, state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    """Writes `training/`, with the optimizer's tensors, into a checkpoint that is being made."""
    random = {f"{RANDOM}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random[f"{RANDOM}/cuda"] = torch.cuda.get_rng_state()
    (folder / FOLDER).mkdir()
    save_tensors(folder / FOLDER / TENSORS, {**tensors, **random})
    text = json.dumps({DIGEST: NO_DIGEST.decode(), **asdict(state)}, indent=2) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / FOLDER / COUNTS).write_text(text.replace(NO_DIGEST.decode(), digest, 1), encoding="utf-8")


def load_state(checkpoint: Path) -> tuple[TrainingState, dict[str, Tensor]]:
    """The counts, and the tensors for `restore`.

    Raises:
        AndromedaError: a checkpoint that training did not write, or that is damaged.
    """
    return load_counts(checkpoint), load_tensors(checkpoint / FOLDER / TENSORS)[0]


def load_counts(checkpoint: Path) -> TrainingState:
    """`load_state` without the tensors."""
    path = checkpoint / FOLDER / COUNTS
    try:
        data = path.read_bytes()
        values: dict[str, Any] = json.loads(data)
        digest = values.pop(DIGEST, None)  # None: written before there was one
        state = TrainingState(**values)
    except FileNotFoundError as error:
        raise AndromedaError(f"{path}: no such file; training cannot go on from this checkpoint") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise AndromedaError(f"{path}: is not the state of a training run ({error})") from error
    if digest is not None and hashlib.sha256(data.replace(str(digest).encode(), NO_DIGEST, 1)).hexdigest() != digest:
        raise AndromedaError(f"{path}: corrupt, its bytes do not give the checksum it carries; {REMEDY}")
    for item in fields(state):
        if type(getattr(state, item.name)) is not type(getattr(TrainingState(), item.name)):
            raise AndromedaError(f"{path}: {item.name}={getattr(state, item.name)!r} is not of type {item.type}")
    return state


def restore(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    part: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Puts the optimizer and the random generators where they were.

    Args:
        part: (tensor, its parameter) -> what this process holds of it; None: all of it.

    Raises:
        AndromedaError: the tensors belong to another model, or a package that they need is not installed.
    """
    parameters = [name for name, _ in _named(model, optimizer)]
    held, generators = by_parameter(tensors, parameters)
    state = {index: from_plain(held[name]) for index, name in enumerate(parameters)}
    if part is not None:
        for index, (_, owner) in enumerate(_named(model, optimizer)):
            state[index] = {key: part(value, owner) for key, value in state[index].items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    set_generators(generators)


def by_parameter(
    tensors: Mapping[str, Tensor], parameters: Sequence[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """What an optimizer holds of each parameter, by key; and the states of the random generators.

    Raises:
        AndromedaError: the tensors belong to other parameters.
    """
    held: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        held.setdefault(parameter, {})[key] = tensor
    generators = held.pop(RANDOM, {})
    for name in sorted(held.keys() ^ set(parameters)):
        what = "lacks" if name not in held else "has, beyond the model's,"
        raise AndromedaError(f"{FOLDER}/{TENSORS}: {what} the parameter {name!r}; it belongs to another model")
    return held, generators


def set_generators(generators: Mapping[str, Tensor]) -> None:
    """Puts the random generators where they were."""
    if "cpu" in generators:
        torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])


def _named(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """The optimizer's parameters in its order, with the model's names."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)], parameter
