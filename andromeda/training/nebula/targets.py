"""What a head tells, in words and in numbers: classes, labels, or a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from andromeda.errors import AndromedaError
from andromeda.model import IGNORED

HeadKind = Literal["classification", "multi_label", "regression"]
SHOWN = 5  # labels in a message
THRESHOLD = 0.0  # of the logit of a label that is told


@dataclass(frozen=True)
class Target:
    """How targets of a kind are written as numbers, and read from a head's.

    Attributes:
        labels: of classes or labels, in their order.
        mean, scale: of the training targets of a regression, whose head tells (target - mean) / scale.
    """

    kind: HeadKind
    labels: tuple[str, ...] = ()
    mean: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(HeadKind) or not 0 < self.scale < math.inf or not math.isfinite(self.mean):
            raise AndromedaError(f"target: {self.kind!r} with mean {self.mean!r} and scale {self.scale!r}")
        if (self.kind == "regression") == bool(self.labels) or len(set(self.labels)) < len(self.labels):
            raise AndromedaError(f"target: {self.kind} with labels {list(self.labels)}")

    @property
    def size(self) -> int:
        """Numbers that the head gives for an input."""
        return len(self.labels) or 1

    def encode(self, values: Sequence[Any], where: Callable[[int], str]) -> Tensor:
        """(N,) int64 of classes, (N, C) float32 of labels, or (N,) float32.

        Args:
            where: of the value with a number, for messages.

        Raises:
            AndromedaError: a value of another kind, or a label that is not known.
        """
        if self.kind == "regression":
            numbers = [_number(value, where(i)) for i, value in enumerate(values)]
            return ((torch.tensor(numbers, dtype=torch.float64) - self.mean) / self.scale).float()
        places = {label: place for place, label in enumerate(self.labels)}

        def place(label: str, number: int) -> int:
            if label not in places:
                raise AndromedaError(f"{where(number)}: the label {label!r} is not known; there are {_some(places)}")
            return places[label]

        if self.kind == "classification":
            return torch.tensor([place(_label(value, where(i)), i) for i, value in enumerate(values)])
        encoded = torch.zeros(len(values), len(self.labels))
        for i, value in enumerate(values):
            for label in _labels(value, where(i)):
                encoded[i, place(label, i)] = 1.0
        return encoded

    def nothing(self) -> Tensor:
        """(1, ...) a target that counts nothing, of an example that only keeps processes in step."""
        if self.kind == "classification":
            return torch.full((1,), IGNORED)
        return torch.full((1,) if self.kind == "regression" else (1, self.size), math.nan)

    def decode(self, scores: Tensor) -> list[str] | list[list[str]] | list[float]:
        """What the head's (N, size) numbers tell."""
        if self.kind == "regression":
            return (scores[:, 0].double() * self.scale + self.mean).tolist()
        if self.kind == "classification":
            return [self.labels[place] for place in scores.argmax(-1).tolist()]
        told = (scores > THRESHOLD).tolist()
        return [[label for label, yes in zip(self.labels, row, strict=True) if yes] for row in told]


def found_kind(values: Sequence[Any], name: str) -> HeadKind:
    """The only kind that a task's targets can be meant for.

    Raises:
        AndromedaError: they may mean several, or none.
    """
    if all(isinstance(value, bool) for value in values):
        return "classification"
    if all(isinstance(value, list) and all(isinstance(label, str) for label in value) for value in values):
        return "multi_label"
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if numbers and any(isinstance(value, float) for value in values):
        return "regression"
    texts = all(isinstance(value, str) for value in values)
    if texts and not all(map(_is_number, values)):
        return "classification"
    shown = _some(dict.fromkeys(map(repr, values)))
    if numbers or texts:
        what = "whole numbers" if numbers else "texts of numbers"
        raise AndromedaError(
            f"recipe: tasks.{name}: targets that are {what} ({shown}) may mean classification or regression; "
            "state its kind"
        )
    raise AndromedaError(
        f"recipe: tasks.{name}: targets such as {shown} fit no kind; a class is text or true/false, labels are a list "
        "of texts, and a regression has numbers"
    )


def build_target(
    kind: HeadKind, values: Sequence[Any], where: Callable[[int], str], labels: Sequence[str] | None, name: str
) -> Target:
    """What a task's training targets make of its head.

    Args:
        labels: that the recipe states; None: those there are.

    Raises:
        AndromedaError: a value of another kind, a label without an example or one that is not stated, fewer than two
            classes, or numbers that are all the same.
    """
    if kind == "regression":
        numbers = torch.tensor([_number(value, where(i)) for i, value in enumerate(values)], dtype=torch.float64)
        scale = numbers.std(correction=0).item()
        if not scale > 0:
            raise AndromedaError(
                f"recipe: tasks.{name}: all {len(values)} targets are {values[0]!r}; there is nothing to learn"
            )
        return Target(kind, mean=numbers.mean().item(), scale=scale)
    one = kind == "classification"
    seen: dict[str, int] = {}
    for i, value in enumerate(values):
        for label in [_label(value, where(i))] if one else _labels(value, where(i)):
            seen.setdefault(label, i)
    for label in labels or ():
        if label not in seen:
            raise AndromedaError(f"recipe: tasks.{name}.labels: no example has {label!r}; drop it, or add examples")
    if labels is not None and (unknown := [label for label in seen if label not in labels]):
        raise AndromedaError(f"{where(seen[unknown[0]])}: {unknown[0]!r} is none of tasks.{name}.labels; add it there")
    if len(seen) < 1 + one:
        what = f"all targets are {min(seen)!r}" if seen else "no example has a label"
        raise AndromedaError(f"recipe: tasks.{name}: {what}; there is nothing to learn")
    return Target(kind, labels=tuple(sorted(seen, key=_order) if labels is None else labels))


def _order(label: str) -> tuple[float, str]:
    """Numbers by size."""
    return (float(label) if _is_number(label) else math.inf, label)


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not _is_number(value):
        raise AndromedaError(f"{where}: the target {value!r} is not a number; drop the record")
    return float(value)


def _label(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int):
        return str(value)
    raise AndromedaError(f"{where}: the target {value!r} is no class; it must be text, a whole number, true or false")


def _labels(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise AndromedaError(f"{where}: the target {value!r} is no list of labels; it must be a list of texts")
    return value


def _some(labels: Any) -> str:
    shown = [str(label) for label in labels]
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")
