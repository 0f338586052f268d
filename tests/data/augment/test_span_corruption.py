"""Span corruption: with its spans put back, the text is what it was; as much is taken out as is said."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.data.augment.span_corruption import SENTINELS, corrupted, distinct, spans
from andromeda.data.synthetic.draws import Draws

MARKS = list(range(-1, -1 - len(SENTINELS), -1))  # ids that no text has
keys = st.integers(0, 10**6).map(str)


def restored(ids: list[int]) -> list[int]:
    """Undoes it, from the ids alone."""
    opening = [place for place, token in enumerate(ids) if token == MARKS[0]]
    given_, asked = ids[: opening[1]], ids[opening[1] :]
    spans_of: dict[int, list[int]] = {}
    for token in asked:
        if token < 0:
            current = spans_of.setdefault(token, [])
        else:
            current.append(token)
    assert [token for token in given_ if token < 0] == list(spans_of) == MARKS[: len(spans_of)]
    return [token for place in given_ for token in (spans_of[place] if place < 0 else [place])]


@given(st.integers(2, 3000), keys)
def test_it_can_be_undone(num_tokens: int, key: str) -> None:
    text = list(range(num_tokens))
    ids, learned = corrupted([text], Draws(key), MARKS)
    assert restored(ids) == text
    assert learned is not None and len(learned) == len(ids)
    opening = ids.index(MARKS[0], ids.index(MARKS[0]) + 1)
    assert learned == [place > opening for place in range(len(ids))]


@given(st.integers(2, 3000), st.integers(1, 40), keys)
def test_spans_are_apart_and_as_many_as_said(num_tokens: int, most: int, key: str) -> None:
    drawn = spans(num_tokens, most, Draws(key))
    assert all(begin < end for begin, end in drawn)
    assert all(end < begin for (_, end), (begin, _) in pairwise(drawn))
    assert drawn[0][0] >= 0 and drawn[-1][1] <= num_tokens
    taken = sum(end - begin for begin, end in drawn)
    assert abs(taken - 0.15 * num_tokens) <= 0.5 or (taken == 1 and num_tokens < 4)
    assert len(drawn) == max(1, min(most, round(taken / 3)))


def test_by_hand() -> None:
    """A text of 20: 3 tokens in a span, anywhere."""
    ids, learned = corrupted([list(range(20))], Draws("by hand"), MARKS)
    begin = ids.index(-1)
    assert ids == [*range(begin), -1, *range(begin + 3, 20), -1, *range(begin, begin + 3)]
    assert learned == [False] * 19 + [True] * 3
    assert corrupted([[7]], Draws(""), MARKS) == ([7], None)
    assert corrupted([[]], Draws(""), MARKS) == ([], None)


def test_a_span_may_stand_anywhere_equally_likely() -> None:
    begins = Counter(spans(20, 32, Draws(str(number)))[0][0] for number in range(18_000))
    assert set(begins) == set(range(18))
    assert all(abs(found - 1000) < 5 * 1000**0.5 for found in begins.values())


@pytest.mark.parametrize(("limit", "count"), [(5, 2), (4, 4), (3, 0)])
def test_distinct_numbers_are_equally_likely(limit: int, count: int) -> None:
    drawn = Counter(tuple(distinct(limit, count, Draws(f"{limit} {number}"))) for number in range(2000))
    assert all(list(numbers) == sorted(set(numbers)) and len(numbers) == count for numbers in drawn)
    expected = 2000 / len(drawn)
    assert len(drawn) == {(5, 2): 10, (4, 4): 1, (3, 0): 1}[limit, count]
    assert all(abs(found - expected) < 5 * expected**0.5 for found in drawn.values())
