"""Drafts against a search of the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from andromeda.inference.engine.lookup import NGRAM, Lookup


def searched(ids: list[int], most: int) -> list[int]:
    """The last earlier place at which the text's end stands, and what follows it, as if it repeated."""
    for start in range(len(ids) - NGRAM - 1, -1, -1):
        if ids[start : start + NGRAM] == ids[len(ids) - NGRAM :]:
            text = list(ids)
            for i in range(most):
                text.append(text[start + NGRAM + i])
            return text[len(ids) :]
    return []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 9), st.data())
def test_a_draft_is_what_followed_the_last_time(ids, most, data):
    """However the text grew."""
    lookup, end = Lookup(), 0
    while end < len(ids):
        end = data.draw(st.integers(end + 1, len(ids)))
        assert lookup.draft(ids[:end], most) == searched(ids[:end], most)


def test_a_loop_goes_on():
    assert Lookup().draft([9, 1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
