"""The documents of one source on disk: token shards, what of them is learned, and where each document came from.

    documents.npy       (N + 1,) int64, first token of each document among all, and the end
    shards.npy          (S + 1,) int64, first document of each shard, and the end
    tokens-00000.bin    uint16 or uint32, little-endian: [end of text] document [end of text] document ...
    learned-00000.bin   a byte a token, 1 where it is learned; only where not all are
    where.txt           a line a document: its file and line
    source.json         the rest

A document lies in one shard. All of it is a function of the documents and the tokenizer alone.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from andromeda.errors import AndromedaError

SHARD_TOKENS = 1 << 27
FACTS, WHERE = "source.json", "where.txt"

Ints = NDArray[np.int64]
Tokens = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True)
class Encoded:
    """A document's ids, without an end-of-text token.

    Attributes:
        learned: which of them are; None: all.
        technique: what it was changed by, see `augment`.
    """

    where: str
    ids: Sequence[int] | NDArray[np.unsignedinteger[Any]]
    learned: NDArray[np.bool_] | None
    num_bytes: int  # UTF-8, of its text
    technique: str | None = None


def write_store(
    folder: Path, documents: Iterable[Encoded], *, eos_id: int, vocab_size: int, masked: bool,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:  # fmt: skip
    """Writes a source's documents into an empty folder; memory holds 8 bytes a document.

    Args:
        masked: not all tokens are learned.

    Returns:
        num_documents, num_tokens (end-of-text tokens too), num_bytes, dtype of the tokens and masked.
    """
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    firsts, shards, num_bytes = array("q", [0]), array("q", [0]), 0
    with (folder / WHERE).open("w", encoding="utf-8", newline="\n") as where, ExitStack() as shard:
        opened: list[IO[bytes]] = []
        for document in documents:
            if not opened or firsts[-1] - firsts[shards[-1]] >= shard_tokens:
                if opened:
                    shards.append(len(firsts) - 1)
                shard.close()
                names = _shard_files(len(shards) - 1, masked)
                opened = [shard.enter_context((folder / name).open("wb")) for name in names]
            opened[0].write(np.concatenate([[eos_id], document.ids]).astype(dtype).tobytes())
            if masked:
                learned = np.ones(len(document.ids), bool) if document.learned is None else document.learned
                opened[1].write(np.concatenate([[False], learned]).astype("u1").tobytes())
            firsts.append(firsts[-1] + 1 + len(document.ids))
            num_bytes += document.num_bytes
            where.write(document.where.replace("\n", " ") + "\n")
    shards.append(len(firsts) - 1)
    np.save(folder / "documents.npy", np.frombuffer(firsts, np.int64))
    np.save(folder / "shards.npy", np.frombuffer(shards, np.int64))
    return {
        "num_documents": len(firsts) - 1, "num_tokens": int(firsts[-1]), "num_bytes": num_bytes, "dtype": dtype.str,
        "masked": masked,
    }  # fmt: skip


def _shard_files(number: int, masked: bool) -> list[str]:
    return [f"{what}-{number:05}.bin" for what in (("tokens", "learned") if masked else ("tokens",))]


class Store:
    """What `write_store` wrote, memory-mapped.

    Attributes:
        facts: source.json.
        firsts: (N + 1,) first token of each document.

    Raises:
        AndromedaError: a file is missing or not as long as it must be; the file is named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = _facts(folder / FACTS)
        self.firsts, self._shards = (_array(folder / f"{name}.npy") for name in ("documents", "shards"))
        if len(self.firsts) != self.facts["num_documents"] + 1:
            raise AndromedaError(f"{folder / 'documents.npy'}: is not of {self.facts['num_documents']:,} documents")
        self._tokens = self._shard_arrays("tokens", np.dtype(self.facts["dtype"]))
        self._learned = self._shard_arrays("learned", np.dtype("u1")) if self.facts["masked"] else None

    def __len__(self) -> int:
        return int(self.facts["num_documents"])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens of each document, its end-of-text token too."""
        return np.diff(self.firsts)

    def piece(
        self, document: int, start: int, length: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
        """Part of a document, which begins with an end-of-text token: ids, the token after each, whether it is learned.

        After the last comes an end-of-text token again, which is learned where the last token is.
        """
        shard = int(np.searchsorted(self._shards, document, side="right")) - 1
        base = int(self.firsts[self._shards[shard]])
        first, end = int(self.firsts[document]) - base, int(self.firsts[document + 1]) - base
        ids = self._tokens[shard][first + start : min(first + start + length + 1, end)].astype(np.int64)
        learned = np.ones(len(ids), bool)
        if self._learned is not None:
            learned = self._learned[shard][first + start : first + start + len(ids)].astype(bool)
        if len(ids) == length:  # up to the document's end
            ids = np.append(ids, self._tokens[shard][first])
            learned = np.append(learned, learned[-1] if end - first > 1 else True)
        return ids[:-1], ids[1:], learned[1:]

    @cached_property
    def _lines(self) -> NDArray[np.int64]:
        """(N + 1,) where each line of where.txt begins."""
        path = self.folder / WHERE
        data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        lines = np.concatenate([[0], np.flatnonzero(data == ord("\n")) + 1])
        if len(lines) != len(self) + 1:
            raise AndromedaError(f"{path}: is not of {len(self):,} documents; build the data again")
        return lines

    def where(self, document: int) -> str:
        """The file and line that a document came from.

        Raises:
            AndromedaError: the list of them is damaged.
        """
        with (self.folder / WHERE).open("rb") as file:
            file.seek(int(self._lines[document]))
            return file.readline().decode().rstrip("\n")

    def _shard_arrays(self, what: str, dtype: np.dtype[Any]) -> list[Tokens]:
        arrays: list[Tokens] = []
        for number, (first, end) in enumerate(zip(self._shards[:-1], self._shards[1:], strict=True)):
            path, length = self.folder / f"{what}-{number:05}.bin", int(self.firsts[end] - self.firsts[first])
            if length == 0:  # a source without documents
                continue
            if not path.is_file() or path.stat().st_size != length * dtype.itemsize:
                found = path.stat().st_size if path.is_file() else "no file"
                raise AndromedaError(
                    f"{path}: must have {length * dtype.itemsize:,} bytes; found {found}; build it again"
                )
            arrays.append(np.asarray(np.memmap(path, dtype, "r")))  # a view: slices of a memmap itself take longer
        return arrays


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        itemgetter("num_documents", "dtype", "masked")(facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AndromedaError(f"{path}: is missing or damaged; build the data again") from error
    return facts


def _array(path: Path) -> NDArray[np.int64]:
    try:
        array: NDArray[np.int64] = np.asarray(np.load(path, mmap_mode="r"))  # a view, faster to index
    except (OSError, ValueError, EOFError) as error:
        raise AndromedaError(f"{path}: is missing or damaged; build the data again") from error
    return array


def batched(documents: Iterator[Any], characters: int, size: Any) -> Iterator[list[Any]]:
    """Lists of documents whose sizes come to about so many characters."""
    batch: list[Any] = []
    total = 0
    for document in documents:
        batch.append(document)
        total += size(document)
        if total >= characters:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
