"""Permutations from a key: each a permutation, any of them, the same everywhere, one index at a time or many."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from andromeda.data.permutation import shuffled, shuffled_array


@given(size=st.integers(1, 400), key=st.text(max_size=5))
def test_shuffled_is_a_permutation(size: int, key: str) -> None:
    assert sorted(shuffled(index, size, key) for index in range(size)) == list(range(size))


def test_every_permutation_of_four_is_about_as_frequent() -> None:
    keys = 4800
    counts = Counter(tuple(shuffled(index, 4, str(key)) for index in range(4)) for key in range(keys))
    expected = keys / 24
    assert len(counts) == 24
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 49.7  # chi-squared, 23 df, p = 0.001


@given(size=st.integers(1, 2000), key=st.text(max_size=5), indices=st.lists(st.integers(0, 1999), max_size=40))
def test_many_at_once_are_the_same_as_one_by_one(size: int, key: str, indices: list[int]) -> None:
    inside = [index % size for index in indices]
    found = shuffled_array(np.array(inside, np.int64), size, key)
    assert found.tolist() == [shuffled(index, size, key) for index in inside]


def test_a_large_permutation_at_once() -> None:
    assert np.array_equal(np.sort(shuffled_array(np.arange(300_000), 300_000, "key")), np.arange(300_000))


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    order = [2, 1, 0, 4, 6, 8, 9, 5, 7, 3]
    assert shuffled_array(np.arange(10), 10, "order 0 0").tolist() == order
    assert [shuffled(index, 10, "order 0 0") for index in range(10)] == order
    assert shuffled(123_456_789, 2**32 - 5, "x") == 195_331_610
