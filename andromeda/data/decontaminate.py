"""Documents that share words with evaluation texts, and which words.

As in Brown et al. 2020, appendix C (https://arxiv.org/abs/2005.14165): n-grams of 13 words, case and punctuation left
out; an evaluation text of fewer words, down to 8, counts as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from andromeda.data import shingles
from andromeda.data.minhash import strings
from andromeda.data.shingles import Hashes
from andromeda.data.sources import Source, raw_records
from andromeda.errors import AndromedaError

SHORTEST = 8  # words


@dataclass(frozen=True)
class Decontaminate:
    """Which files hold evaluation texts: every string of every record in them, or a whole file.

    Attributes:
        files: patterns under the corpus folder.
        words: in a row that a document may not share with any of them.

    Raises:
        AndromedaError: no files, or some outside the corpus folder; fewer than 2 words.
    """

    files: tuple[str, ...]
    words: int = 13

    def __post_init__(self) -> None:
        _check_length(self.words)
        self._source()

    def paths(self, corpus: Path) -> list[Path]:
        """
        Raises:
            AndromedaError: a pattern that no file matches.
        """
        return self._source().paths(corpus)

    def read(self, corpus: Path) -> Evaluations:
        """
        Raises:
            AndromedaError: a file or a record cannot be read, or there is no text long enough.
        """
        return Evaluations(self._texts(corpus), self.words)

    def _source(self) -> Source:
        return Source("decontaminate", self.files, "")

    def _texts(self, corpus: Path) -> Iterator[tuple[str, str]]:
        for path in self.paths(corpus):
            try:
                for raw in raw_records(path, path.relative_to(corpus).as_posix(), None):
                    record = raw.record()
                    yield from ((raw.where, text) for text in strings(record["text"] if raw.kind == "file" else record))
            except AndromedaError as error:
                raise AndromedaError(f"decontaminate: {error}") from error


class Shared(NamedTuple):
    """
    Attributes:
        evaluation: the name of the evaluation text.
        words: those in common, as they are compared: the first n-gram of the document that is in any.
    """

    evaluation: str
    words: str


class Evaluations:
    """The n-grams of evaluation texts; about 32 bytes each.

    Args:
        texts: (name, text).
        length: words of an n-gram.

    Attributes:
        untested: names of texts with fewer than 8 words (or than `length`), which cannot be told from chance.
        num_texts: the others.

    Raises:
        AndromedaError: `length` is below 2, or there is no text long enough.
    """

    def __init__(self, texts: Iterable[tuple[str, str]], length: int = 13) -> None:
        _check_length(length)
        self.untested: list[str] = []
        self._names: list[str] = []
        parts: dict[int, list[tuple[int, Hashes]]] = {}
        for name, text in texts:
            words = shingles.hashed(shingles.words(text))
            n = min(length, len(words))
            if n < min(SHORTEST, length):
                self.untested.append(name)
                continue
            parts.setdefault(n, []).append((len(self._names), shingles.grams(words, n)))
            self._names.append(name)
        if not parts:
            raise AndromedaError(f"decontamination: no evaluation text has {min(SHORTEST, length)} words or more")
        self.num_texts = len(self._names)
        self._tables = {n: _Table(part) for n, part in sorted(parts.items())}

    def shared(self, text: str) -> Shared | None:
        """What the text has in common with one of them; None: nothing."""
        words = shingles.words(text)
        hashes = shingles.hashed(words)
        found = [(*place, n) for n, table in self._tables.items() if (place := table.first(shingles.grams(hashes, n)))]
        if not found:
            return None
        start, text_number, n = min(found)
        return Shared(self._names[text_number], " ".join(words[start : start + n]))


def _check_length(words: int) -> None:
    if words < 2:
        raise AndromedaError(f"decontamination: n-grams of {words} words would be in every text; 13 is usual")


class _Table:
    """Hashes, sorted, with the first text of each."""

    def __init__(self, parts: list[tuple[int, Hashes]]) -> None:
        values = np.concatenate([hashes for _, hashes in parts])
        texts = np.repeat([number for number, _ in parts], [len(hashes) for _, hashes in parts])
        self.values, first = np.unique(values, return_index=True)
        self.texts = texts[first]
        size = 1 << max(16, (8 * len(self.values)).bit_length())
        self.mask = np.uint64(size - 1)
        self.maybe: NDArray[np.bool_] = np.zeros(size, bool)  # says no to most n-grams at once
        self.maybe[self.values & self.mask] = True

    def first(self, grams: Hashes) -> tuple[int, int] | None:
        """Where the first n-gram that is here begins, and in which text it is."""
        candidates = np.flatnonzero(self.maybe[grams & self.mask])
        places = np.searchsorted(self.values, grams[candidates])
        places[places == len(self.values)] = 0
        hits = np.flatnonzero(self.values[places] == grams[candidates])
        return (int(candidates[hits[0]]), int(self.texts[places[hits[0]]])) if len(hits) else None
