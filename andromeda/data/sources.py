"""Sources: which files make up one kind of text, and their records as documents.

A record is a line of .jsonl, a row of .parquet, or any other file as a whole, with the fields `text` and `path`. Files
may be compressed (.gz, .xz, .zst). How a record becomes a document: see `fields`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from andromeda.data import files
from andromeda.data.fields import BadRecordError, Document, Fields, Record
from andromeda.errors import AndromedaError

LONGEST = 1 << 28  # bytes of a record; a longer one is not read
ROWS = 1024  # of Parquet, at a time


@dataclass(frozen=True)
class Unread:
    """A record, or the rest of a file, that became no document."""

    where: str
    reason: str  # a few words, to be counted by
    message: str


@dataclass(frozen=True)
class Source:
    """One kind of text.

    Attributes:
        name: in reports and manifests.
        files: paths or patterns (*, **) under the corpus folder.
        licence: of the text, as its owner names it.
        fields: how a record becomes a document.
        bad: what is done with a record that cannot be read: 'stop', or 'skip' and count it.

    Raises:
        AndromedaError: no files, or a path that leads out of the corpus folder.
    """

    name: str
    files: tuple[str, ...]
    licence: str
    fields: Fields = field(default_factory=lambda: Fields(text="text"))
    bad: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if not self.files:
            raise AndromedaError(f"source {self.name}: names no files")
        for pattern in self.files:
            if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
                raise AndromedaError(f"source {self.name}: {pattern} must lie in the corpus folder; name it from there")

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
        name = path.relative_to(folder).as_posix()
        records = _records(path, name, self.fields.needed())
        while True:
            try:
                where, read = next(records)
            except StopIteration:
                return
            except AndromedaError as error:  # of the file itself: what is left of it is lost
                yield self._unread(name, error, "file cannot be read")
                return
            try:
                document = self.fields.document(read(), where)
            except AndromedaError as error:
                yield self._unread(where, error, "bad fields")
            else:
                yield document

    def _unread(self, where: str, error: AndromedaError, reason: str) -> Unread:
        if self.bad == "stop":
            raise AndromedaError(f"source {self.name}: {error}; or let the spec say `bad: skip`") from error
        return Unread(where, error.reason if isinstance(error, BadRecordError) else reason, str(error))


# ---- records -------------------------------------------------------------------------------------

Reader = Callable[[], Record]  # a record that is not yet decoded


def _records(path: Path, name: str, needed: Sequence[str]) -> Iterator[tuple[str, Reader]]:
    """Where each record is, and how to get it, which may fail for it alone."""
    kind = files.kind(path)
    if kind == ".parquet":
        yield from _rows(path, name, needed)
        return
    with files.opened(path) as file:
        if kind == ".jsonl":
            for number, line in enumerate(files.lines(file, LONGEST), start=1):
                if line is None or not line.isspace():
                    where = f"{name}:{number}"
                    yield where, partial(_parsed, line, where)
        else:
            yield name, partial(_whole, file.read(LONGEST + 1), name)


def _parsed(line: bytes | None, where: str) -> Record:
    if line is None:
        raise BadRecordError("too long", f"{where}: the line is longer than {LONGEST:,} bytes; split the document")
    text = _text(line, where)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecordError("not JSON", f"{where}: not JSON ({error}); each line must be an object") from error
    if not isinstance(value, dict):
        raise BadRecordError("not an object", f"{where}: is a {type(value).__name__}; each line must be an object")
    return value


def _whole(data: bytes, where: str) -> Record:
    if len(data) > LONGEST:
        raise BadRecordError("too long", f"{where}: the file is longer than {LONGEST:,} bytes; split it")
    return {"text": _text(data, where), "path": where}


def _text(data: bytes, where: str) -> str:
    try:
        return files.decode(data, where)
    except AndromedaError as error:
        raise BadRecordError("not UTF-8", str(error)) from error


def _rows(path: Path, name: str, needed: Sequence[str]) -> Iterator[tuple[str, Reader]]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise AndromedaError(f"{name}: needs a package for .parquet; pip install 'andromeda-lm[data]'") from error
    number = 0
    try:
        with files.opened(path) as file, parquet.ParquetFile(file) as table:
            known = [name for name in needed if name in table.schema_arrow.names]
            for batch in table.iter_batches(ROWS, columns=known):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}:{number}", partial(_given, row)
    except ArrowException as error:
        problem = " ".join(str(error).split())
        raise AndromedaError(f"{name}, after row {number}: cannot be read as Parquet ({problem})") from error


def _given(row: Record) -> Record:
    return row
