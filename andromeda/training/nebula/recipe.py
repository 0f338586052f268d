"""A task of a recipe: what it learns from, by which loss, and how its head reads the model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Literal

from andromeda.errors import AndromedaError
from andromeda.training.nebula.nebula import Balancing
from andromeda.training.recipe_files import Files

TaskKind = Literal["language_model", "distillation", "classification", "multi_label", "regression"]
Pooling = Literal["last", "mean"]
NAME = re.compile(r"[a-z][a-z0-9_]*")

OF_TEXT: tuple[TaskKind, ...] = ("language_model", "distillation")
WITH_EXAMPLES: tuple[TaskKind, ...] = ("classification", "multi_label", "regression")
# Keys that only some kinds have; the others are those of every task.
KINDS_OF_KEYS: dict[str, tuple[TaskKind, ...]] = {
    **dict.fromkeys(("train", "validation", "input", "target", "batch_size", "pooling"), WITH_EXAMPLES),
    "labels": ("classification", "multi_label"),
    "smoothing": ("language_model", "classification"),
    "z_loss": ("language_model",),
    "huber": ("regression",),
    **dict.fromkeys(("teacher", "temperature", "reverse"), ("distillation",)),
}


@dataclass(frozen=True)
class TaskRecipe(Files):
    """One of a recipe's `tasks`. A language model and a distillation learn from `data`, all others from examples.

    Examples lie in .jsonl or .parquet, a record each.
    """

    kind: TaskKind | None = None  # found from teacher or targets, where these can only mean one; else language_model
    weight: float = 1.0  # of its loss; the balance multiplies it
    input: str = "text"  # the field that is read, or words with {fields}
    target: str = "label"  # the field to be told: text or true/false (a class), texts (labels), or a number
    labels: list[str] | None = None  # in their order; those of the examples, sorted
    batch_size: int = 16  # examples a step
    pooling: Pooling = "last"  # the head reads the last token's hidden state, or the mean of all
    smoothing: float = 0.0  # of labels
    z_loss: float = 0.0
    huber: float | None = None  # an error is squared up to here, in standard deviations of the targets; linear beyond
    teacher: str | None = None  # a model directory or a run, whose distribution of each next token is learned
    temperature: float = 1.0  # of both distributions
    reverse: bool = False  # KL(student || teacher), which keeps to the teacher's likeliest; else the other way round

    @property
    def stated_kind(self) -> TaskKind | None:
        """None: to be found from the targets."""
        if self.kind is not None or self.train_paths:
            return self.kind
        return "language_model" if self.teacher is None else "distillation"

    def check(self, name: str, kind: TaskKind | None) -> None:
        """
        Args:
            kind: `stated_kind`, or the one that was found.

        Raises:
            AndromedaError: a value out of range, or a key that tasks of the kind do not have.
        """
        for item in fields(self):
            default = item.default if item.default_factory is MISSING else item.default_factory()
            kinds = KINDS_OF_KEYS.get(item.name, (kind,))
            if kind is not None and kind not in kinds and getattr(self, item.name) != default:
                raise self.wrong(name, item.name, f"is for {', '.join(map(str, kinds))}, and this is {kind}")
        if kind == "distillation" and not self.teacher:
            raise self.wrong(name, "teacher", "must name a model directory")
        if kind not in OF_TEXT and not self.train_paths:
            raise self.wrong(name, "train", "must name at least one file of examples")
        if not all((*self.train_paths, *self.validation_paths)):
            raise self.wrong(name, "train" if not all(self.train_paths) else "validation", "is empty; name files")
        if self.batch_size < 1:
            raise self.wrong(name, "batch_size", "must be at least 1")
        for key in ("weight", "z_loss"):
            if not 0 <= getattr(self, key) < math.inf:
                raise self.wrong(name, key, "must not be negative")
        if not 0 < self.temperature < math.inf:
            raise self.wrong(name, "temperature", "must be positive")
        if not 0 <= self.smoothing < 1:
            raise self.wrong(name, "smoothing", "must lie in [0, 1)")
        if self.huber is not None and not self.huber > 0:
            raise self.wrong(name, "huber", "must be positive; null for squares")

    def wrong(self, name: str, key: str, what: str) -> AndromedaError:
        return AndromedaError(f"recipe: tasks.{name}.{key}={getattr(self, key)!r} {what}")


def text_task(tasks: Mapping[str, TaskRecipe]) -> str | None:
    """The name of the language model; None: there is none."""
    return next((name for name, task in tasks.items() if task.stated_kind == "language_model"), None)


def check_tasks(tasks: Mapping[str, TaskRecipe], balance: Balancing) -> None:
    """
    Raises:
        AndromedaError: a name, value or key that a task cannot have, two that learn from `data`, or nothing to balance.
    """
    for name, task in tasks.items():
        if not NAME.fullmatch(name):
            raise AndromedaError(f"recipe: tasks: {name!r} is no name; use small letters, digits and _")
        task.check(name, task.stated_kind)
    texts = [name for name, task in tasks.items() if task.stated_kind == "language_model"]
    if len(texts) > 1:
        raise AndromedaError(f"recipe: tasks {' and '.join(texts)} both learn from `data`; name `train`, or drop one")
    if balance != "fixed" and len(tasks) < 2:
        raise AndromedaError(f"recipe: balance={balance!r} needs at least two tasks; there are {len(tasks)}")
