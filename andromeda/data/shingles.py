"""Texts as words, and words as numbers: what duplicates and evaluation texts are compared by.

Case, white space and the punctuation of prose do not count; signs that change the meaning of a formula do, since
"12 - 5" and "12 * 5" are not the same task.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

WORD = re.compile(r"[^\W_]+|[+*/%=<>^|&~$#@\\{}]|[-.,:](?=\s{0,3}\d)")
APOSTROPHES = re.compile("['’]")
REMEMBERED = 1 << 20  # words whose hashes are kept
BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64
MIX = np.uint64(0xD6E8FEB86659FD93)
HALF = np.uint64(32)


def words(text: str) -> list[str]:
    """The words of a text in lower case, and signs."""
    text = text.casefold()
    if "'" in text or "’" in text:
        text = APOSTROPHES.sub("", text)
    return WORD.findall(text)


class _Words(dict[str, int]):
    """64 bits of each word, the same on every machine."""

    def __missing__(self, word: str) -> int:
        if len(self) >= REMEMBERED:
            self.clear()
        value = self[word] = int.from_bytes(
            hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
        )
        return value


_hash = _Words()


def hashed(found: list[str]) -> Hashes:
    """(W,) hashes of words."""
    return np.fromiter(map(_hash.__getitem__, found), np.uint64, len(found))


def grams(hashes: Hashes, n: int) -> Hashes:
    """(W,) -> (W - n + 1,): a hash of each n words that follow each other; none of fewer than n.

    A polynomial modulo 2^64 from prefix sums, so the time does not depend on n; then mixed.
    """
    if len(hashes) < n:
        return np.zeros(0, np.uint64)
    powers = _powers(BASE, len(hashes) + 1)
    sums = np.zeros(len(hashes) + 1, np.uint64)
    np.cumsum(hashes * powers[:-1], out=sums[1:])
    values = (sums[n:] - sums[:-n]) * _powers(pow(BASE, -1, 1 << 64), len(hashes) + 1)[: len(hashes) - n + 1]
    for _ in range(2):
        values = (values ^ (values >> HALF)) * MIX
    mixed: Hashes = values ^ (values >> HALF)
    return mixed


_kept: dict[int, Hashes] = {}


def _powers(base: int, number: int) -> Hashes:
    """base^0, base^1, ... modulo 2^64."""
    known = _kept.get(base)
    if known is None or len(known) < number:
        factors = np.full(max(1 << 16, 2 * number), base, np.uint64)
        factors[0] = 1
        known = _kept[base] = np.multiply.accumulate(factors)
    return known[:number]
