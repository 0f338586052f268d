"""What of a source is kept after cleaning, on disk for what follows: documents, and prints to compare them by.

documents.jsonl    a line a document; numbers are their places
where.txt          a line a document: the file and line that it came from
unread.txt         a line each: reason, what was wrong
removed.txt        a line each: reason, file and line, figures
words.bin, bands.bin, signatures.bin    see `minhash.Prints`; where the source takes part in deduplication
facts.json         counts
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from andromeda.data.fields import Document
from andromeda.data.json_object import plain
from andromeda.data.minhash import ENTRIES, Prints
from andromeda.data.sources import Unread

DOCUMENTS, WHERE, UNREAD, REMOVED, FACTS = "documents.jsonl", "where.txt", "unread.txt", "removed.txt", "facts.json"
PRINTS: dict[str, np.dtype[Any]] = {"words": np.dtype("<u8"), "bands": np.dtype("<u8"), "signatures": np.dtype("<u2")}
BLOCK = 1 << 14  # documents whose prints are read together


@dataclass(frozen=True)
class Removed:
    """A document that was read and is not kept: `reason` is a few words to count by, `figures` the particulars."""

    where: str
    reason: str
    figures: str


@dataclass(frozen=True)
class Batch:
    """What became of some records, in their order.

    Attributes:
        lines: a line of documents.jsonl for each that is kept.
        where: (N,) of these.
        prints: (N,) of these.
        changes: what cleaning changed, by kind.
        num_bytes: UTF-8, of the texts and of what is said in conversations.
    """

    lines: list[bytes] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    prints: Prints | None = None
    unread: list[Unread] = field(default_factory=list)
    removed: list[Removed] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0


# ---- a document as a line ------------------------------------------------------------------------


def to_line(document: Document) -> bytes:
    """
    Raises:
        AndromedaError: it holds what is no plain JSON value, as a row of a Parquet file can.
    """
    values = {name: value for name, value in vars(document).items() if value is not None}
    return plain(values, document.where).encode(errors="surrogatepass") + b"\n"


def from_line(line: bytes) -> Document:
    """The document again; lists stand for what were tuples within messages."""
    values = json.loads(line.decode(errors="surrogatepass"))
    for name in ("messages", "tools", "span"):
        if name in values:
            values[name] = tuple(values[name])
    return Document(**values)


def one_line(text: str) -> str:
    """White space is one blank, line ends of all kinds too, so that a list has a line for each entry.

    A lone surrogate, which no file can hold, is spelt out.
    """
    return " ".join(text.split()).encode(errors="backslashreplace").decode()


# ---- writing -------------------------------------------------------------------------------------


class TextsWriter:
    """Writes into an empty folder; `with` closes it.

    Raises:
        OSError: (all methods) something cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._counts: dict[str, Counter[str]] = {"unread": Counter(), "removed": Counter(), "changes": Counter()}
        self._num_documents = self._num_bytes = 0
        with ExitStack() as stack:
            self._lists = {
                name: stack.enter_context((folder / name).open("w", encoding="utf-8", newline="\n"))
                for name in (WHERE, UNREAD, REMOVED)
            }
            self._files = {
                name: stack.enter_context((folder / name).open("wb"))
                for name in (DOCUMENTS, *(f"{name}.bin" for name in PRINTS))
            }
            self._closing = stack.pop_all()

    def __enter__(self) -> TextsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()
        if kind is None:
            counts = {name: dict(sorted(counts.items())) for name, counts in self._counts.items()}
            facts = {"num_documents": self._num_documents, "num_bytes": self._num_bytes, **counts}
            (self._folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def add(self, batch: Batch) -> None:
        self._files[DOCUMENTS].writelines(batch.lines)
        self._lists[WHERE].writelines(f"{one_line(where)}\n" for where in batch.where)
        self._lists[UNREAD].writelines(listed_unread(batch.unread))
        self._lists[REMOVED].writelines(listed_removed(batch.removed))
        if batch.prints is not None:
            for name, dtype in PRINTS.items():
                self._files[f"{name}.bin"].write(np.ascontiguousarray(getattr(batch.prints, name), dtype).data)
        self._counts["unread"].update(item.reason for item in batch.unread)
        self._counts["removed"].update(item.reason for item in batch.removed)
        self._counts["changes"].update(batch.changes)
        self._num_documents += len(batch.lines)
        self._num_bytes += batch.num_bytes


def listed_unread(items: Iterable[Unread]) -> Iterator[str]:
    return (f"{item.reason}\t{one_line(item.message)}\n" for item in items)


def listed_removed(items: Iterable[Removed]) -> Iterator[str]:
    return (f"{item.reason}\t{one_line(item.where)}\t{one_line(item.figures)}\n" for item in items)


# ---- reading -------------------------------------------------------------------------------------


class Texts:
    """What TextsWriter wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return int(self.facts["num_documents"])

    def lines(self) -> Iterator[bytes]:
        """For each document its line of documents.jsonl."""
        with (self.folder / DOCUMENTS).open("rb") as file:
            yield from file

    def prints(self, near: bool) -> Iterator[Prints]:
        """Of all documents, some at a time.

        Args:
            near: they hold bands and signatures.
        """
        with ExitStack() as stack:
            files = {name: stack.enter_context((self.folder / f"{name}.bin").open("rb")) for name in PRINTS}
            bands = (self.folder / "bands.bin").stat().st_size // 8 // max(1, len(self))
            columns = {"words": 2, "bands": bands, "signatures": ENTRIES if near else 0}
            for start in range(0, len(self), BLOCK):
                count = min(BLOCK, len(self) - start)
                arrays = {
                    name: np.frombuffer(
                        files[name].read(count * columns[name] * dtype.itemsize), dtype
                    ).reshape(count, columns[name])
                    for name, dtype in PRINTS.items()
                }  # fmt: skip
                yield Prints(**arrays)


class Lines:
    """A file's lines by their numbers; memory holds 8 bytes for each."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("rb")
        starts = [np.zeros(1, np.int64)]
        while block := self._file.read(1 << 24):
            base = self._file.tell() - len(block)
            starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + base + 1)
        self._starts = np.concatenate(starts)

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __getitem__(self, number: int) -> str:
        self._file.seek(int(self._starts[number]))
        return self._file.readline().decode().rstrip("\n")
