"""Sources that need no files: documents of a synthetic task, for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from andromeda.data.fields import Document
from andromeda.data.sources import Dedup, Priority
from andromeda.data.synthetic import Task, Text, sample
from andromeda.errors import AndromedaError


@dataclass(frozen=True)
class Generated:
    """One synthetic task, of whose training samples number 0, 1, ... are the documents.

    They are never cleaned, since every character counts, and alike on purpose, so only equal words make duplicates.

    Attributes:
        name: in reports and manifests.
        task: which.
        documents: how many.
        seed: of the samples.
        dedup, priority: as of `Source`.

    Raises:
        AndromedaError: no documents, or near-duplicates are asked for.
    """

    licence: ClassVar[str] = "generated"
    clean: ClassVar[None] = None
    masked: ClassVar[bool] = True

    name: str
    task: Task
    documents: int
    seed: int
    dedup: Dedup = "off"
    priority: Priority = "medium"

    def __post_init__(self) -> None:
        if self.documents < 1:
            raise AndromedaError(f"`documents` is {self.documents}; ask for one or more")
        if self.dedup == "near":
            raise AndromedaError("`dedup: near` would take tasks that differ by a number for one; use exact, or off")

    @property
    def size(self) -> int:
        """Characters of a document, roughly."""
        return self.task.size

    def document(self, number: int) -> Document:
        """
        Raises:
            AndromedaError: the task's parameters leave nothing to draw.
        """
        where = f"{self.task.name}:{number}"
        try:
            body = sample(self.task, "train", self.seed, number).body
        except AndromedaError as error:
            raise AndromedaError(f"source {self.name}: {error}") from error
        if isinstance(body, Text):
            return Document(where, text=body.text, span=body.span)
        return Document(where, messages=body.messages, tools=body.tools or None)
