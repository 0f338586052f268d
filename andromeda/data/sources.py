"""Sources: which files make up one kind of text, and their records as documents.

A record is a line of .jsonl, a row of .parquet, or any other file as a whole, with the fields `text` and `path`. Files
may be compressed (.gz, .xz, .zst). How a record becomes a document: see `fields`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from andromeda.data import files
from andromeda.data.augment import Rules as AugmentRules
from andromeda.data.clean import Rules
from andromeda.data.fields import Document, Fields, listed_names
from andromeda.data.hub import Hub
from andromeda.data.json_object import BadRecordError, Record, not_too_deep, parsed
from andromeda.errors import AndromedaError

# Bytes of a record; a longer one is not read. To clean one takes 40 times as much memory, to tokenise it 450 bytes a
# token, which `tokenizers` holds: 1 GiB for English. The longest novels have 3 to 5 million characters.
LONGEST = 1 << 23
ROWS = 256  # of Parquet, at a time,
ROWS_BYTES = 1 << 20  # or fewer, where so many bytes are in fewer
NO_VALUE = (ValueError, OverflowError, ImportError)  # what pyarrow raises where Python knows no such value
OVERHEAD = 200  # bytes that a record takes besides its own

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
        data: a line of a file, a whole file, or a row; or why it cannot be read.
    """

    where: str
    kind: Literal["line", "file", "row"]
    data: bytes | Record | BadRecordError

    @property
    def size(self) -> int:
        """Bytes, or about so many."""
        if isinstance(self.data, BadRecordError):
            return OVERHEAD
        return OVERHEAD + (len(self.data) if isinstance(self.data, bytes) else _row_size(self.data))

    def record(self) -> Record:
        """
        Raises:
            BadRecordError: it is too long, nested too deep, not UTF-8, or no object with keys that differ.
        """
        if isinstance(self.data, BadRecordError):
            raise self.data
        if not isinstance(self.data, bytes):
            return not_too_deep(self.data, self.where)
        try:
            text = files.decode(self.data, self.where)
        except AndromedaError as error:
            raise BadRecordError("not UTF-8", str(error)) from error
        return {"text": text, "path": self.where} if self.kind == "file" else parsed(text, self.where)


@dataclass(frozen=True)
class Source:
    """One kind of text, from files or from a data set of the hub.

    Attributes:
        name: in reports and manifests.
        files: paths or patterns (*, **) under the corpus folder; none: `hub` says what is read.
        licence: of the text, as its owner names it.
        fields: how a record becomes a document.
        bad: what is done with a record that cannot be read: 'stop', or 'skip' and count it.
        clean: what is repaired, redacted or dropped; None: nothing.
        dedup: of which duplicates one is kept: of none, of documents of equal words, or of near-duplicates too.
        priority: which source keeps a document that stands in several.
        augment: which share of the documents is changed, and how.
        hub: in place of files.

    Raises:
        AndromedaError: neither or both of files and hub, a path that leads out of the corpus folder, or conversations
            that are to be changed.
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
    hub: Hub | None = None

    def __post_init__(self) -> None:
        if bool(self.files) == bool(self.hub):
            raise AndromedaError(f"source {self.name}: names {'both files and hub' if self.hub else 'no files'}")
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
        """Its files, each once, by their names within the folder. What cannot be read is among them, to be told of.

        Raises:
            AndromedaError: no pattern, or one that no file matches, a folder that cannot be listed, or a name that is
                not UTF-8.
        """
        if self.hub is not None:
            return self.hub.files(folder)
        found: set[Path] = set()
        for pattern in self.files:
            matched = files.matching(folder, pattern, f"source {self.name}")
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
            AndromedaError: the file cannot be read, and `bad` is 'stop'; or always where it is damaged and some was
                read of it, or where that takes a package.
        """
        name = path.relative_to(folder).as_posix()
        empty = True
        try:
            for raw in raw_records(path, name, self.fields.needed()):
                empty = False
                yield raw
        except files.MissingPackageError as error:
            raise AndromedaError(f"source {self.name}: {error}") from error
        except AndromedaError as error:  # of the file itself: what is left of it is lost
            if isinstance(error, files.DamagedError) and not empty:
                raise AndromedaError(f"source {self.name}: {error}, or leave it out of `files`") from error
            yield self.left_out(name, error, "file cannot be read")
            return
        if empty:
            yield Unread(name, "empty", f"{name}: holds no record")

    def rows(self, folder: Path) -> Iterator[Raw | Unread]:
        """The same of a data set of the hub. What interrupts it is an error always: it may be the network.

        Raises:
            AndromedaError: it cannot be read to its end.
        """
        assert self.hub is not None
        where, number = self.hub.where, -1
        try:
            for number, row in enumerate(self.hub.rows(folder, self.fields.needed())):
                yield _raw_row(row, f"{where}:{number}")
        except AndromedaError as error:
            raise AndromedaError(f"source {self.name}: {error}") from error
        if number < 0:
            yield Unread(where, "empty", f"{where}: holds no record")

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
    with files.opened(path, name) as file:
        if kind == ".jsonl":
            for number, line in enumerate(files.lines(file, LONGEST), start=1):
                where = f"{name}:{number}"
                if line is None or not line.isspace():
                    yield Raw(where, "line", _too_long(where, "line") if line is None else line)
        else:
            data = file.read(LONGEST + 1)
            yield Raw(name, "file", data if len(data) <= LONGEST else _too_long(name, "file"))


def _too_long(where: str, kind: str) -> BadRecordError:
    return BadRecordError("too long", f"{where}: the {kind} is longer than {LONGEST:,} bytes; split the document")


# ---- Parquet -------------------------------------------------------------------------------------


def _rows(path: Path, name: str, columns: Sequence[str] | None) -> Iterator[Raw]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise files.MissingPackageError(name, ".parquet") from error
    number = 0
    try:
        with (
            files.opened(path, name) as file,
            parquet.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as table,
        ):
            names = _columns(table, name, columns)
            for batch in table.iter_batches(_rows_at_a_time(table.metadata), columns=names):
                for row in _listed(batch):
                    number += 1
                    yield _raw_row(row, f"{name}:{number}")
    except (ArrowException, ValueError) as error:
        problem = " ".join(str(error).split())
        raise AndromedaError(f"{name}, after row {number}: cannot be read as Parquet ({problem})") from error


def _columns(table: Any, name: str, wanted: Sequence[str] | None) -> list[str]:
    """The names of those that are read."""
    names: list[str] = table.schema_arrow.names
    chosen = names if wanted is None else list(wanted)
    for column in chosen:
        if names.count(column) != 1:
            what = f"no column `{column}`" if column not in names else f"several columns `{column}`"
            lost = f"{name}: has {what} (there are: {listed_names(names)}), so none of its"
            raise BadRecordError(f"no `{column}`", f"{lost} {table.metadata.num_rows:,} rows is read")
    return chosen


def _rows_at_a_time(metadata: Any) -> int:
    num_bytes = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    return max(1, min(ROWS, ROWS_BYTES * metadata.num_rows // max(1, num_bytes)))


def _listed(batch: Any) -> Iterator[Record | Exception]:
    """Rows; or, in place of one that holds what is no text or no date, the error."""
    try:
        yield from batch.to_pylist()
    except NO_VALUE:
        for place in range(len(batch)):
            try:
                yield from batch.slice(place, 1).to_pylist()
            except NO_VALUE as error:
                yield error


def _raw_row(row: Record | Exception, where: str) -> Raw:
    if isinstance(row, UnicodeDecodeError):
        return Raw(where, "row", BadRecordError("not UTF-8", f"{where}: not UTF-8 ({row.reason}); write it anew"))
    if isinstance(row, Exception):
        return Raw(where, "row", BadRecordError("bad fields", f"{where}: has a value that cannot be read ({row})"))
    return Raw(where, "row", row if _row_size(row) <= LONGEST else _too_long(where, "row"))


def _row_size(row: Record) -> int:
    return sum(len(value) if isinstance(value, str | bytes) else len(str(value)) for value in row.values())
