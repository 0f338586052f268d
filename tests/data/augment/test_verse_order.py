"""Lines and stanzas in another order: all of them, each once, and what stands between them as it was."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.data.augment.verse_order import LINE_BORDER, STANZA_BORDER, other_lines, other_stanzas
from andromeda.data.synthetic.draws import Draws

POEM = "a1\n  a2\na3\n\nb1\nb2\n \n\nc1\n"
poems = st.text(alphabet="ab \n\r\t", max_size=60)
keys = st.integers(0, 10**6).map(str)


@settings(max_examples=500)
@given(poems, keys)
def test_stanzas_are_permuted(text: str, key: str) -> None:
    before, after = (STANZA_BORDER.split(poem) for poem in (text, other_stanzas(text, Draws(key))))
    assert Counter(before[::2]) == Counter(after[::2])
    assert before[1::2] == after[1::2]


@settings(max_examples=500)
@given(poems, keys)
def test_lines_are_permuted_within_their_stanza(text: str, key: str) -> None:
    before, after = (STANZA_BORDER.split(poem) for poem in (text, other_lines(text, Draws(key))))
    assert before[1::2] == after[1::2]
    for ours, theirs in zip(after[::2], before[::2], strict=True):
        assert Counter(LINE_BORDER.split(ours)[::2]) == Counter(LINE_BORDER.split(theirs)[::2])
        assert LINE_BORDER.split(ours)[1::2] == LINE_BORDER.split(theirs)[1::2]


def test_by_hand() -> None:
    orders = {other_stanzas(POEM, Draws(str(number))) for number in range(200)}
    assert len(orders) == 6
    assert "c1\n\nb1\nb2\n \n\na1\n  a2\na3\n" in orders
    lines = {other_lines(POEM, Draws(str(number))) for number in range(400)}
    assert len(lines) == 6 * 2
    assert "  a2\na3\na1\n\nb2\nb1\n \n\nc1\n" in lines


@pytest.mark.parametrize("change", [other_lines, other_stanzas])
def test_all_orders_are_equally_likely(change: object) -> None:
    text = "x\ny\nz" if change is other_lines else "x\n\ny\n\nz"
    assert callable(change)
    found = Counter(re.sub(r"\s", "", change(text, Draws(str(number)))) for number in range(6000))
    assert len(found) == 6 and all(abs(count - 1000) < 5 * 1000**0.5 for count in found.values())


@pytest.mark.parametrize("text", ["", "\n", "one line", "one line\n", " \n\n "])
def test_what_has_no_order_stays(text: str) -> None:
    assert other_lines(text, Draws("")) == other_stanzas(text, Draws("")) == text
