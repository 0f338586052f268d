"""Duplicates across all sources of a build: which documents go, and which of those that stay each repeats.

A document stands for itself by a rank: sources by their priority, then as the spec has them, then documents as they
stand. The lowest rank of what is alike stays.

    removed.npy, of.npy            (M,) ranks, see `dedup.Duplicates`
    similarity.npy, exact.npy      (M,)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from andromeda.atomic import atomic_directory
from andromeda.data.dedup import Duplicates, Index
from andromeda.data.fingerprint import AnySource
from andromeda.data.minhash import Near
from andromeda.data.sources import PRIORITIES
from andromeda.data.texts import WHERE, Lines, Removed, Texts

FIRST_RANK = 40  # bits for the document: a rank is (place of the source << FIRST_RANK) + number of the document
ARRAYS = ("removed", "of", "similarity", "exact")


def by_priority(sources: Sequence[AnySource]) -> list[AnySource]:
    """The sources, those of the highest priority first."""
    return sorted(sources, key=lambda source: PRIORITIES.index(source.priority))


def find_duplicates(sources: Sequence[AnySource], texts: Mapping[str, Texts], near: Near | None, folder: Path) -> None:
    """Compares the documents of all sources that take part, and writes the result to `folder`, unless it is there.

    Raises:
        AndromedaError: something cannot be written.
    """
    if folder.is_dir():
        return
    with atomic_directory(folder, replaceable=lambda _: False) as new:
        with Index(new / "index", near) as index:
            for place, source in enumerate(by_priority(sources)):
                first = place << FIRST_RANK
                for prints in texts[source.name].prints(near is not None) if source.dedup != "off" else ():
                    index.add(np.arange(first, first + len(prints)), prints)
                    first += len(prints)
            found = index.duplicates()
        shutil.rmtree(new / "index")
        for name in ARRAYS:
            np.save(new / f"{name}.npy", getattr(found, name))


class Across:
    """What `find_duplicates` found."""

    def __init__(self, sources: Sequence[AnySource], texts: Mapping[str, Texts], folder: Path) -> None:
        self._names = [source.name for source in by_priority(sources)]
        self._texts = texts
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        self._found = Duplicates(**arrays)

    def removed(self, name: str) -> NDArray[np.int64]:
        """(M,) the numbers of a source's documents that are duplicates, ascending."""
        return self._found.removed[self._part(name)] & ((1 << FIRST_RANK) - 1)

    def listed(self, name: str) -> Iterator[Removed]:
        """The same, each with the document that it repeats."""
        part, found = self._part(name), self._found
        with ExitStack() as stack:
            where: dict[str, Lines] = {}

            def place(rank: int) -> tuple[str, str]:
                source = self._names[rank >> FIRST_RANK]
                if source not in where:
                    where[source] = stack.enter_context(Lines(self._texts[source].folder / WHERE))
                return source, where[source][rank & ((1 << FIRST_RANK) - 1)]

            for number in range(part.start, part.stop):
                source, original = place(int(found.of[number]))
                reason = "duplicate" if found.exact[number] else "near-duplicate"
                alike = "" if found.exact[number] else f", similarity {found.similarity[number]:.2f}"
                yield Removed(place(int(found.removed[number]))[1], reason, f"of {source}: {original}{alike}")

    def _part(self, name: str) -> slice:
        place = self._names.index(name)
        ends = np.searchsorted(self._found.removed, [place << FIRST_RANK, (place + 1) << FIRST_RANK])
        return slice(int(ends[0]), int(ends[1]))
