"""Random draws from a key alone: the same on every machine and in every version of Python."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

WORD_BITS = 64


class Draws:
    """A counter-based generator: block i is SHA-256 of (SHA-256 of the key, i), read as four words of 64 bits.

    Python's `random` and numpy's `Generator` may give other values in a later version; this one cannot.
    """

    def __init__(self, key: str) -> None:
        self._key = hashlib.sha256(key.encode()).digest()
        self._blocks = 0
        self._words: list[int] = []

    def below(self, limit: int) -> int:
        """A number of range(limit), limit >= 1, of any size; all equally likely to one part in 2^32."""
        bits, value = WORD_BITS, self._word()
        while bits < limit.bit_length() + WORD_BITS // 2:
            bits, value = bits + WORD_BITS, value << WORD_BITS | self._word()
        return value * limit >> bits

    def between(self, least: int, most: int) -> int:
        """A number from least to most, both included."""
        return least + self.below(most - least + 1)

    def chance(self, one_in: int) -> bool:
        return self.below(one_in) == 0

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different places of `items`, in random order."""
        pool = list(items)
        for place in range(count):
            other = place + self.below(len(pool) - place)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return self.sample(items, len(items))

    def digits(self, count: int) -> int:
        """A number of exactly `count` decimal digits; 0 is one of one digit."""
        return self.between(10 ** (count - 1) if count > 1 else 0, 10**count - 1)

    def _word(self) -> int:
        if not self._words:
            block = hashlib.sha256(self._key + self._blocks.to_bytes(8)).digest()
            self._words = [int.from_bytes(block[start : start + 8]) for start in (0, 8, 16, 24)]
            self._blocks += 1
        return self._words.pop()
