"""Sources: which files make up one kind of text, and their records as documents.

A record is a line of .jsonl, a row of .parquet, or any other file as a whole, with the fields `text` and `path`. Files
may be compressed (.gz, .xz, .zst). How a record becomes a document: see `fields`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from andromeda.data import files
from andromeda.data.augment import Rules as AugmentRules
from andromeda.data.clean import Rules
from andromeda.data.fields import BadRecordError, Document, Fields, Record
from andromeda.errors import AndromedaError

LONGEST = 1 << 28  # bytes of a record; a longer one is not read
ROWS = 1024  # of Parquet, at a time

Priority = Literal["high", "medium", "low"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
Dedup = Literal["off", "exact", "near"]
DEDUPS: tuple[Dedup, ...] = get_args(Dedup)


@dataclass(frozen=True)
class Unread:
    """A record, or the rest of a file, that became no document."""

    where: str
    reason: str  # a few words, to be counted by
    message: str


@dataclass(frozen=True)
class Raw:
    """A record that is not yet decoded, which may fail for it alone.

    Attributes:
        data: a line of a file, a whole file, or a row; None: too long to be read.
    """

    where: str
    kind: Literal["line", "file", "row"]
    data: bytes | Record | None

    @property
    def size(self) -> int:
        """Bytes, or about so many."""
        if isinstance(self.data, bytes):
            return len(self.data)
        return sum(len(str(value)) for value in (self.data or {}).values())

    def record(self) -> Record:
        """
        Raises:
            BadRecordError: it is too long, not UTF-8, or no object.
        """
        if self.data is None:
            raise BadRecordError(
                "too long", f"{self.where}: the {self.kind} is longer than {LONGEST:,} bytes; split the document"
            )
        if not isinstance(self.data, bytes):
            return self.data
        try:
            text = files.decode(self.data, self.where)
        except AndromedaError as error:
            raise BadRecordError("not UTF-8", str(error)) from error
        return {"text": text, "path": self.where} if self.kind == "file" else _parsed(text, self.where)


@dataclass(frozen=True)
class Source:
    """One kind of text, from files.

    Attributes:
        name: in reports and manifests.
        files: paths or patterns (*, **) under the corpus folder.
        licence: of the text, as its owner names it.
        fields: how a record becomes a document.
        bad: what is done with a record that cannot be read: 'stop', or 'skip' and count it.
        clean: what is repaired, redacted or dropped; None: nothing.
        dedup: of which duplicates one is kept: of none, of documents of equal words, or of near-duplicates too.
        priority: which source keeps a document that stands in several.
        augment: which share of the documents is changed, and how.

    Raises:
        AndromedaError: no files, a path that leads out of the corpus folder, or conversations that are to be changed.
    """

    name: str
    files: tuple[str, ...]
    licence: str
    fields: Fields = field(default_factory=lambda: Fields(text="text"))
    bad: Literal["stop", "skip"] = "stop"
    clean: Rules | None = None
    dedup: Dedup = "off"
    priority: Priority = "medium"
    augment: AugmentRules = field(default_factory=AugmentRules)

    def __post_init__(self) -> None:
        if not self.files:
            raise AndromedaError(f"source {self.name}: names no files")
        if self.augment.techniques and self.fields.text is None:
            raise AndromedaError(f"source {self.name}: `augment` is for texts, and these are conversations; drop it")
        for pattern in self.files:
            if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
                raise AndromedaError(f"source {self.name}: {pattern} must lie in the corpus folder; name it from there")

    @property
    def masked(self) -> bool:
        """Whether of some documents only a part is learned, as of conversations."""
        return self.fields.text is None or self.augment.masks

    def paths(self, folder: Path) -> list[Path]:
        """Its files, each once, by their names within the folder.

        Raises:
            AndromedaError: a pattern that no file matches.
        """
        found: set[Path] = set()
        for pattern in self.files:
            matched = {path for path in folder.glob(pattern) if path.is_file()}
            if not matched:
                raise AndromedaError(f"source {self.name}: no file matches {pattern} in {folder}; is that the corpus?")
            found |= matched
        return sorted(found, key=lambda path: path.relative_to(folder).as_posix())

    def read(self, folder: Path, path: Path) -> Iterator[Document | Unread]:
        """One file's documents, in their order.

        Raises:
            AndromedaError: something cannot be read, and `bad` is 'stop'.
        """
        return (item if isinstance(item, Unread) else self.document(item) for item in self.records(folder, path))

    def records(self, folder: Path, path: Path) -> Iterator[Raw | Unread]:
        """The first half of `read`: one file's records as they stand.

        Raises:
            AndromedaError: the file cannot be read, and `bad` is 'stop'.
        """
        name = path.relative_to(folder).as_posix()
        try:
            yield from raw_records(path, name, self.fields.needed())
        except AndromedaError as error:  # of the file itself: what is left of it is lost
            yield self.left_out(name, error, "file cannot be read")

    def document(self, raw: Raw) -> Document | Unread:
        """The second half: of one record.

        Raises:
            AndromedaError: it becomes no document, and `bad` is 'stop'.
        """
        try:
            return self.fields.document(raw.record(), raw.where)
        except AndromedaError as error:
            return self.left_out(raw.where, error, "bad fields")

    def left_out(self, where: str, error: AndromedaError, reason: str) -> Unread:
        """What is said about a record that cannot be used, for this reason where the error gives none.

        Raises:
            AndromedaError: `bad` is 'stop'.
        """
        if self.bad == "stop":
            raise AndromedaError(f"source {self.name}: {error}; or let the spec say `bad: skip`") from error
        return Unread(where, error.reason if isinstance(error, BadRecordError) else reason, str(error))


# ---- records -------------------------------------------------------------------------------------


def raw_records(path: Path, name: str, columns: Sequence[str] | None) -> Iterator[Raw]:
    """The records of a file; blank lines are none.

    Args:
        name: of the file, in messages and in `where`.
        columns: those to read of a Parquet file; None: all.

    Raises:
        AndromedaError: the file cannot be read, or not to its end.
    """
    kind = files.kind(path)
    if kind == ".parquet":
        yield from _rows(path, name, columns)
        return
    with files.opened(path) as file:
        if kind == ".jsonl":
            for number, line in enumerate(files.lines(file, LONGEST), start=1):
                if line is None or not line.isspace():
                    yield Raw(f"{name}:{number}", "line", line)
        else:
            data = file.read(LONGEST + 1)
            yield Raw(name, "file", data if len(data) <= LONGEST else None)


def _parsed(text: str, where: str) -> Record:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecordError("not JSON", f"{where}: not JSON ({error}); each line must be an object") from error
    if not isinstance(value, dict):
        raise BadRecordError("not an object", f"{where}: is a {type(value).__name__}; each line must be an object")
    return value


def _rows(path: Path, name: str, columns: Sequence[str] | None) -> Iterator[Raw]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise AndromedaError(f"{name}: needs a package for .parquet; pip install 'andromeda-lm[data]'") from error
    number = 0
    try:
        with files.opened(path) as file, parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            known = names if columns is None else [name for name in columns if name in names]
            for batch in table.iter_batches(ROWS, columns=known):
                for row in batch.to_pylist():
                    number += 1
                    yield Raw(f"{name}:{number}", "row", row)
    except ArrowException as error:
        problem = " ".join(str(error).split())
        raise AndromedaError(f"{name}, after row {number}: cannot be read as Parquet ({problem})") from error
