"""Which documents of a corpus are duplicates of which, in some 70 bytes of memory a document.

Prints are appended to files in any order: one for each band, so that each is read in one go, one for signatures. Then,
with the documents ranked by their numbers:

1. Documents of equal words: all but the first are removed.
2. Band by band, those left are sorted by the band's hash. In a bucket of equal hashes the first is compared with the
   others by their whole signatures, and joined with those alike; then the first of what is left, and so on.
3. Within each group so joined, in rank order, a document is removed if it is alike one that is kept.

So what is removed is always alike something kept, chains or not. Nothing depends on chance, workers or arrival.

Memory for N documents: number, rank and group 8 bytes each, what is found 20, and 24 for the hashes that are sorted, of
at most SORTED documents at a time. On disk 1 KiB a document at the default threshold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from andromeda.data.minhash import ENTRIES, Near, Prints
from andromeda.errors import AndromedaError

SORTED = 1 << 24  # documents
BLOCK = 1 << 16  # documents read at a time
LEADERS = 64  # of one bucket; what is alike none of them is left to other bands

Ints = NDArray[np.int64]
Alike = Callable[[int, Ints], NDArray[np.bool_]]


@dataclass(frozen=True)
class Duplicates:
    """M removed documents, by their numbers.

    Attributes:
        removed: (M,) in ascending order.
        of: (M,) the kept document that each duplicates.
        similarity: (M,) Jaccard similarity with it, as estimated; 1 if the words are equal.
        exact: (M,) the words are equal.
    """

    removed: Ints
    of: Ints
    similarity: NDArray[np.float32]
    exact: NDArray[np.bool_]


class Index:
    """The prints of all documents, in files of a folder that is its own.

    Args:
        folder: is made; what an earlier index left there is overwritten.
        near: as for `prints`; None for equal words only.

    Raises:
        AndromedaError: (all methods) files cannot be written.
    """

    def __init__(self, folder: Path, near: Near | None) -> None:
        self.near = near
        self._folder = folder
        self._number = 0
        names = ["numbers", "words0", "words1", "signatures", *(f"band{b}" for b in range(near.bands if near else 0))]
        with self._explained(), contextlib.ExitStack() as stack:
            folder.mkdir(parents=True, exist_ok=True)
            self._files: dict[str, IO[bytes]] = {
                name: stack.enter_context((folder / name).open("wb", buffering=1 << 16)) for name in names
            }
            self._closing = stack.pop_all()

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._explained():
            self._closing.close()

    def add(self, numbers: Ints, prints: Prints) -> None:
        """In any order.

        Args:
            numbers: (n,) each document's own, and its rank: of duplicates the lowest stays. So number the sources from
                the highest priority on, and within them the documents as they stand.
        """
        bands = {f"band{b}": prints.bands[:, b] for b in range(prints.bands.shape[1])}
        columns: dict[str, NDArray[Any]] = {
            "numbers": numbers.astype(np.int64),
            "words0": prints.words[:, 0],
            "words1": prints.words[:, 1],
            "signatures": prints.signatures,
            **bands,
        }
        if columns.keys() != self._files.keys():
            raise ValueError("the prints were made with other settings than the index")
        with self._explained():
            for name, values in columns.items():
                self._files[name].write(np.ascontiguousarray(values).data)
        self._number += len(prints)

    def duplicates(self) -> Duplicates:
        """
        Raises:
            AndromedaError: two documents have the same number.
        """
        with self._explained():
            for file in self._files.values():
                file.flush()
        numbers = self._read("numbers", np.int64)
        places = np.argsort(numbers)
        numbers = numbers[places]
        if np.any(numbers[1:] == numbers[:-1]):
            again = numbers[1:][numbers[1:] == numbers[:-1]][0]
            raise AndromedaError(f"duplicates: two documents have the number {again}; number them each once")
        exact = self._equal_words(places)
        near, similarity = self._near(places, exact < 0)
        return _by_number(numbers, exact, near, similarity)

    # ---- the three steps -------------------------------------------------------------------------

    def _equal_words(self, places: Ints) -> Ints:
        """(N,) of each rank that is removed the one that stays, else -1."""
        second = self._read("words1", np.uint64)
        of = np.full(len(places), -1)
        for bucket in self._buckets("words0", places, of < 0, np.arange(len(places))):
            _lead(
                bucket,
                lambda first, others: second[places[others]] == second[places[first]],
                lambda first, alike: of.__setitem__(alike, first),
            )
        return of

    def _near(self, places: Ints, left: NDArray[np.bool_]) -> tuple[Ints, NDArray[np.float32]]:
        """(N,) the same, and the similarity."""
        of, similarities = np.full(len(places), -1), np.zeros(len(places), np.float32)
        if self.near is None or not len(places):
            return of, similarities
        signatures = self._read("signatures", np.uint16).reshape(-1, ENTRIES)
        threshold = self.near.threshold

        def similarity(first: int, others: Ints) -> NDArray[np.float32]:
            own = signatures[places[first]]
            blocks = [others[start : start + BLOCK] for start in range(0, len(others), BLOCK)]
            return np.concatenate([(signatures[places[b]] == own).mean(axis=1, dtype=np.float32) for b in blocks])

        groups = np.arange(len(places))
        for band in range(self.near.bands):
            _flatten(groups)
            for bucket in self._buckets(f"band{band}", places, left, groups):
                _lead(
                    bucket,
                    lambda first, others: similarity(first, others) >= threshold,
                    lambda first, alike: _join(groups, first, alike),
                )
        for group in _groups(groups):
            while len(group) > 1:
                first, group = int(group[0]), group[1:]
                values = similarity(first, group)
                alike = values >= threshold
                of[group[alike]], similarities[group[alike]] = first, values[alike]
                group = group[~alike]
        return of, similarities

    def _buckets(self, name: str, places: Ints, left: NDArray[np.bool_], groups: Ints) -> Iterator[Ints]:
        """The ranks of equal hashes, ascending, if there are two or more that are not yet of one group."""
        hashes = self._read(name, np.uint64)
        parts = -(-len(places) // SORTED)
        for part in range(parts):
            ranks, values = _part(hashes, places, left, part, parts)
            order = np.lexsort((ranks, values))
            ranks, values = ranks[order], values[order]
            starts = (
                np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])) if len(values) else np.zeros(0, int)
            )
            if not len(starts):
                continue
            own = groups[ranks]
            several = np.minimum.reduceat(own, starts) < np.maximum.reduceat(own, starts)
            ends = np.append(starts[1:], len(ranks))
            for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
                yield ranks[start:end]

    # ---- files -----------------------------------------------------------------------------------

    def _read(self, name: str, dtype: type[Any]) -> NDArray[Any]:
        if (self._folder / name).stat().st_size == 0:  # which cannot be mapped
            return np.zeros(0, dtype)
        return np.memmap(self._folder / name, dtype, "r")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise AndromedaError(
                f"{self._folder}: the index of duplicates cannot be written or read: {error.strerror or error}; "
                "it takes about 1 KiB a document"
            ) from error


def _part(hashes: Any, places: Ints, left: NDArray[np.bool_], part: int, parts: int) -> tuple[Ints, Any]:
    """The ranks that are left, and their hashes, of those whose hash is `part` modulo `parts`; 0 is no hash."""
    found_ranks, found = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for start in range(0, len(places), BLOCK):
        ranks = np.arange(start, min(start + BLOCK, len(places)))[left[start : start + BLOCK]]
        values = hashes[places[ranks]]
        chosen = (values != 0) & (values % np.uint64(parts) == part)
        found_ranks.append(ranks[chosen])
        found.append(values[chosen])
    return np.concatenate(found_ranks), np.concatenate(found)


def _lead(bucket: Ints, alike: Alike, join: Callable[[int, Ints], None]) -> None:
    """Joins the first with all alike, then does so with the rest, and so on, up to LEADERS times."""
    for _ in range(LEADERS):
        if len(bucket) < 2:
            return
        first, others = int(bucket[0]), bucket[1:]
        same = alike(first, others)
        if same.any():
            join(first, others[same])
        bucket = others[~same]


# ---- groups: union-find over ranks, a group being named by its lowest ----------------------------


def _root(groups: Ints, rank: int) -> int:
    while groups[rank] != rank:
        groups[rank] = groups[groups[rank]]
        rank = int(groups[rank])
    return rank


def _join(groups: Ints, first: int, others: Ints) -> None:
    for other in others.tolist():
        one, two = _root(groups, first), _root(groups, other)
        groups[max(one, two)] = min(one, two)


def _flatten(groups: Ints) -> None:
    """Every rank points at the name of its group."""
    while np.any((above := groups[groups]) != groups):
        groups[:] = above


def _groups(groups: Ints) -> Iterator[Ints]:
    """The ranks of each group of two and more, ascending."""
    _flatten(groups)
    joined = np.flatnonzero(groups != np.arange(len(groups)))
    members = np.union1d(joined, groups[joined])
    members = members[np.lexsort((members, groups[members]))]
    borders = np.flatnonzero(np.diff(groups[members])) + 1
    return (group for group in np.split(members, borders) if len(group))


def _by_number(numbers: Ints, exact: Ints, near: Ints, similarity: NDArray[np.float32]) -> Duplicates:
    """What is removed. If the original of a copy is itself removed, the copy duplicates what that one does."""
    equal = exact >= 0
    original = np.where(equal, exact, np.arange(len(numbers)))
    chained = near[original] >= 0
    removed = np.flatnonzero(equal | chained)
    through = chained[removed]
    of = np.where(through, near[original[removed]], original[removed])
    values = np.where(through, similarity[original[removed]], np.float32(1))
    return Duplicates(numbers[removed], numbers[of], values, ~through)
