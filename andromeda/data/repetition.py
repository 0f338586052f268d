"""How much of a text stands in it more than once: lines, paragraphs, n-grams of words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Repeated(NamedTuple):
    """Shares of the parts that stood before."""

    number: float
    characters: float


def repeated(parts: Iterable[str]) -> Repeated:
    """Of parts that are not empty."""
    seen: set[str] = set()
    number = characters = again = again_characters = 0
    for part in parts:
        if part:
            number += 1
            characters += len(part)
            if part in seen:
                again += 1
                again_characters += len(part)
            seen.add(part)
    return Repeated(again / max(1, number), again_characters / max(1, characters))


class Grams(NamedTuple):
    """The n-grams that stand in a text more than once.

    Attributes:
        n: words of each.
        places: (R,) where they begin; equal ones side by side, as they stand in the text.
        first: (R,) whether it is the first of its kind.
        lengths: (W,) characters of each word of the text.
    """

    n: int
    places: NDArray[np.int64]
    first: NDArray[np.bool_]
    lengths: NDArray[np.int64]


def grams(words: list[str], longest: int) -> Iterator[Grams]:
    """For n = 2, 3, ... `longest`, as long as there are any.

    An n-gram stands twice only where its first n-1 words do, so each n has less to sort.
    """
    table: dict[str, int] = {}
    ids = np.fromiter(map(table.setdefault, words, count()), np.int64, len(words))
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    places, kinds = np.arange(len(words)), ids
    for n in range(2, longest + 1):
        inside = places + n <= len(words)
        places, kinds = places[inside], kinds[inside]
        if not len(places):
            return
        pairs = kinds * len(words) + ids[places + n - 1]  # below W * W, so exact in 63 bits
        order = np.argsort(pairs, kind="stable")
        places, pairs = places[order], pairs[order]
        borders = np.concatenate([[True], pairs[1:] != pairs[:-1], [True]])
        twice = ~(borders[1:] & borders[:-1])
        places, first = places[twice], borders[:-1][twice]
        kinds = np.cumsum(first)
        yield Grams(n, places, first, lengths)


def commonest(found: Grams) -> float:
    """The share of characters within the n-gram that stands most often; the longest of several."""
    if not len(found.places):
        return 0.0
    starts = np.flatnonzero(found.first)
    counts = np.diff(starts, append=len(found.places))
    often = np.flatnonzero(counts == counts.max())
    ends = np.cumsum(found.lengths)
    places = found.places[starts[often]]
    best = often[np.argmax(ends[places + found.n - 1] - ends[places] + found.lengths[places])]
    return _covered(found, found.places[starts[best] : starts[best] + counts[best]])


def later(found: Grams) -> float:
    """The share of characters within n-grams that stood before, each character once."""
    return _covered(found, found.places[~found.first])


def _covered(found: Grams, places: NDArray[np.int64]) -> float:
    if not len(places):
        return 0.0
    size = len(found.lengths) + 1
    inside = np.cumsum(np.bincount(places, minlength=size) - np.bincount(places + found.n, minlength=size))[:-1] > 0
    return float(found.lengths[inside].sum() / found.lengths.sum())
