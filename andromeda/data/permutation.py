"""Permutations of range(size) that a key chooses, computed at any place from the key alone."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

FEISTEL_ROUNDS = 8
FEW = 8  # indices for which numpy costs more than it saves


def hashed(text: str) -> int:
    """64 bits of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def shuffled(index: int, size: int, key: str) -> int:
    """Where `index` goes in a permutation of range(size) that the key chooses, in constant memory.

    A Feistel network over the smallest 4^k >= size, walked until it comes back inside (Black and Rogaway 2002).
    """
    half = _half(size)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (hashed(f"{key} {number} {right}") & mask)
        index = left << half | right
        if index < size:
            return index


def shuffled_array(indices: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """(n,) -> (n,): `shuffled` of each, with at most 2 * sqrt(size) hashes a round however many there are."""
    if len(indices) < FEW:
        return np.array([shuffled(index, size, key) for index in indices.tolist()], np.int64)
    half = _half(size)
    places = indices.copy()
    outside = np.arange(len(places))
    while len(outside):
        left, right = np.divmod(places[outside], 1 << half)
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ _round(right, f"{key} {number}", half)
        places[outside] = left << half | right
        outside = outside[places[outside] >= size]
    return places


def _round(right: NDArray[np.int64], key: str, half: int) -> NDArray[np.int64]:
    mask = (1 << half) - 1
    present = np.flatnonzero(np.bincount(right, minlength=mask + 1))
    table = np.zeros(mask + 1, np.int64)
    table[present] = [hashed(f"{key} {value}") & mask for value in present.tolist()]
    return table[right]


def _half(size: int) -> int:
    """Bits of half an index."""
    return ((size - 1).bit_length() + 1) // 2 or 1
