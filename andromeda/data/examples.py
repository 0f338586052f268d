"""Examples: what a task other than the text's own is learned from, an input and a target a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from andromeda.data import files
from andromeda.data.fields import Fields, listed_names
from andromeda.data.sources import raw_records
from andromeda.errors import AndromedaError

KINDS = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Example:
    """A record's input and target.

    Attributes:
        where: its file, and line or row.
        target: as the record has it.
    """

    where: str
    text: str
    target: Any


def read_examples(paths: Sequence[str | Path], text: str, target: str) -> list[Example]:
    """Those of all files, in their order and in memory.

    Args:
        text: a field, or words with {fields}; see `fields`.
        target: a field.

    Raises:
        AndromedaError: a file that is missing, of another kind, damaged or without a record, a record without one of
            the fields, or whose text is empty.
    """
    fields = Fields(text=text)
    examples: list[Example] = []
    for path in map(Path, paths):
        if files.kind(path) not in KINDS:
            raise AndromedaError(f"{path}: unknown kind of file; examples are {' or '.join(KINDS)}, compressed or not")
        if not path.is_file():
            raise AndromedaError(f"{path}: no such file (looked for in {Path.cwd()}); name a file of examples")
        before = len(examples)
        for raw in raw_records(path, str(path), [*fields.needed(), target]):
            record = raw.record()
            words = fields.document(record, raw.where).text or ""
            if not words or words.isspace():
                raise AndromedaError(f"{raw.where}: `{text}` is empty; drop the record")
            if record.get(target) is None:
                raise AndromedaError(f"{raw.where}: has no `{target}` (there are: {listed_names(record)})")
            examples.append(Example(raw.where, words, record[target]))
        if len(examples) == before:
            raise AndromedaError(f"{path}: holds no example; leave it out")
    return examples
