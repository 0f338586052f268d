"""Packing: each token once, no cut that could be spared, exactly what one-by-one best fit gives, in little memory."""

from __future__ import annotations

import tracemalloc
from collections import deque
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.data.pack import Packing, pack
from andromeda.errors import AndromedaError

Pieces = list[tuple[int, int, int]]  # (document, start, length)

few_lengths = st.integers(1, 12).flatmap(lambda most: st.lists(st.integers(0, most), max_size=60))
any_lengths = st.lists(st.integers(0, 300), max_size=60)
documents = st.one_of(few_lengths, any_lengths)


def packed(lengths: list[int], seq_len: int) -> Packing:
    return pack(np.array(lengths, np.int64), seq_len)


def sequences(packing: Packing) -> list[Pieces]:
    return [
        list(zip(*(column.tolist() for column in packing.pieces(number)), strict=True))
        for number in range(packing.num_sequences)
    ]


def one_by_one(lengths: list[int], seq_len: int) -> list[Pieces]:
    """Best-fit decreasing as it is told: the longest piece, into the sequence that it leaves the least room in."""
    pieces = [
        (document, start, min(seq_len, length - start))
        for document, length in enumerate(lengths)
        for start in range(0, length, seq_len)
    ]
    made: list[Pieces] = []
    with_room: dict[int, deque[Pieces]] = {}  # in the order in which they came to have it
    for piece in sorted(pieces, key=lambda piece: (-piece[2], piece[0], piece[1])):
        room = min((room for room, queue in with_room.items() if queue and room >= piece[2]), default=seq_len)
        if room == seq_len:
            made.append([])
        sequence = made[-1] if room == seq_len else with_room[room].popleft()
        sequence.append(piece)
        with_room.setdefault(room - piece[2], deque()).append(sequence)
    return made


@given(lengths=documents, seq_len=st.integers(1, 40))
def test_the_same_as_one_by_one(lengths: list[int], seq_len: int) -> None:
    assert sequences(packed(lengths, seq_len)) == one_by_one(lengths, seq_len)


@given(lengths=documents, seq_len=st.integers(1, 40))
def test_each_token_once_no_sequence_too_long_and_no_needless_cut(lengths: list[int], seq_len: int) -> None:
    packing = packed(lengths, seq_len)
    found: dict[int, Pieces] = {}
    for sequence in sequences(packing):
        assert 0 < sum(length for _, _, length in sequence) <= seq_len
        for piece in sequence:
            found.setdefault(piece[0], []).append(piece)
    for document, length in enumerate(lengths):
        pieces = sorted(found.get(document, []))
        assert [start for _, start, _ in pieces] == list(range(0, length, seq_len))
        assert [size for _, _, size in pieces] == [min(seq_len, length - start) for _, start, _ in pieces]


@given(lengths=documents, seq_len=st.integers(1, 40))
def test_figures(lengths: list[int], seq_len: int) -> None:
    packing = packed(lengths, seq_len)
    fill = [sum(length for _, _, length in sequence) for sequence in sequences(packing)]
    assert packing.fill.tolist() == fill
    assert packing.num_sequences == len(fill)
    assert packing.num_tokens == sum(lengths) == sum(fill)
    padding = sum(seq_len - tokens for tokens in fill)
    assert packing.padding_share == (padding / (len(fill) * seq_len) if fill else 0)


@given(lengths=documents, seq_len=st.integers(1, 40))
def test_no_two_sequences_fit_into_one(lengths: list[int], seq_len: int) -> None:
    fill = np.sort(packed(lengths, seq_len).fill)
    assert len(fill) < 2 or fill[0] + fill[1] > seq_len


@given(lengths=st.lists(st.integers(1, 10), min_size=1, max_size=6), seq_len=st.integers(10, 14))
def test_close_to_the_fewest_sequences_possible(lengths: list[int], seq_len: int) -> None:
    fewest = min(
        number for number in range(1, len(lengths) + 1) if can_be_packed(sorted(lengths)[::-1], [seq_len] * number)
    )
    assert packed(lengths, seq_len).num_sequences <= 11 / 9 * fewest + 6 / 9  # best-fit decreasing's guarantee


def can_be_packed(lengths: list[int], rooms: list[int]) -> bool:
    if not lengths:
        return True
    return any(
        can_be_packed(lengths[1:], [*rooms[:number], rooms[number] - lengths[0], *rooms[number + 1 :]])
        for number in range(len(rooms))
        if rooms[number] >= lengths[0]
    )


@given(lengths=documents, seq_len=st.integers(1, 40), data=st.data())
def test_the_order_of_documents_changes_only_which_of_equal_length_lies_where(
    lengths: list[int], seq_len: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(lengths))))
    one, other = packed(lengths, seq_len), packed([lengths[document] for document in order], seq_len)
    assert np.array_equal(one.offsets, other.offsets)
    assert np.array_equal(one.lengths, other.lengths)
    if len(set(lengths)) == len(lengths) and max(lengths, default=0) <= seq_len:
        assert [order[document] for document in other.documents.tolist()] == one.documents.tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64])
def test_the_same_from_any_integers_and_every_time(dtype: type) -> None:
    lengths = np.random.default_rng(0).integers(0, 100, 1000)
    one, other = pack(lengths, 64), pack(lengths.astype(dtype), 64)
    for name in ("offsets", "documents", "starts", "lengths"):
        assert getattr(one, name).dtype == np.int64
        assert np.array_equal(getattr(one, name), getattr(other, name))


def test_by_hand() -> None:
    # 25 is cut into 10, 10 and 5; 7 leaves room for 3, and 6 for 4, 5 for 5
    assert sequences(packed([6, 25, 0, 3, 7, 4], 10)) == [
        [(1, 0, 10)],
        [(1, 10, 10)],
        [(4, 0, 7), (3, 0, 3)],
        [(0, 0, 6), (5, 0, 4)],
        [(1, 20, 5)],
    ]


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_pack(lengths: list[int]) -> None:
    packing = packed(lengths, 8)
    assert (packing.num_sequences, packing.num_tokens, packing.padding_share) == (0, 0, 0)
    assert sequences(packing) == []


def test_many_documents_in_little_memory_and_with_little_padding() -> None:
    lengths = np.exp(np.random.default_rng(0).normal(6.2, 1.2, 100_000)).astype(np.int64) + 1
    tracemalloc.start()
    packing = pack(lengths, 8192)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 * len(packing.lengths)
    assert packing.padding_share < 0.001
    assert packing.num_tokens == lengths.sum()
    assert np.array_equal(np.bincount(packing.documents, packing.lengths), lengths)
    assert len(packing.lengths) == (-(-lengths // 8192)).sum()  # cuts


def test_memory_grows_with_pieces_and_not_with_tokens() -> None:
    tracemalloc.start()
    packing = packed([2**50, 2**50 - 1, 1], 2**48)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6
    assert packing.num_tokens == 2**51
    assert (packing.num_sequences, packing.padding_share) == (8, 0)


def test_what_cannot_be_packed() -> None:
    with pytest.raises(AndromedaError, match="seq_len is 0"):
        packed([1], 0)
    for lengths in (np.array([-1]), np.array([1.0]), np.array([[1]])):
        with pytest.raises(ValueError, match="one row of integers"):
            pack(lengths, 4)


@pytest.mark.parametrize(
    ("offsets", "lengths", "message"),
    [
        ([], [], "from 0 to the number of pieces"),
        ([1, 2], [1, 1], "from 0 to the number of pieces"),
        ([0, 1], [1, 1], "from 0 to the number of pieces"),
        ([0, 2, 2], [1, 1], "may be empty"),
        ([0, 2], [1, 0], "may be empty"),
        ([0, 1, 3], [4, 3, 2], "sequence 1 is longer than 4 tokens"),
    ],
)
def test_a_packing_checks_itself(offsets: list[int], lengths: list[int], message: str) -> None:
    some = np.zeros(len(lengths), np.int64)
    with pytest.raises(ValueError, match=message):
        Packing(4, np.array(offsets, np.int64), some, some, np.array(lengths, np.int64))


def test_equally_long_documents_lie_in_the_order_of_their_numbers() -> None:
    for count, seq_len in combinations(range(1, 12), 2):
        packing = packed([3] * count, seq_len + 3)
        assert packing.documents.tolist() == sorted(packing.documents.tolist())
