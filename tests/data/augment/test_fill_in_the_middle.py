"""Fill-in-the-middle: the three parts, put together, are the document, and the marks say which is which."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from andromeda.data.augment.fill_in_the_middle import PSM, SENTINELS, SPM, parts
from andromeda.data.augment.technique import Technique
from andromeda.data.synthetic.draws import Draws
from andromeda.tokenizer import Tokenizer
from andromeda.tokenizer.training import SPECIAL_TOKENS

TOKENIZER = Tokenizer.train(["the tiger, burning bright"], 300, special_tokens=(*SPECIAL_TOKENS, *SENTINELS))
PREFIX, SUFFIX, MIDDLE = MARKS = [TOKENIZER.token_to_id(name) or 0 for name in SENTINELS]


def document(technique: Technique, text: str, key: str) -> list[int]:
    draws = Draws(key)
    ids, learned = technique.joined(TOKENIZER.encode_batch(list(technique.parts(text, draws))), draws, MARKS)
    assert learned is None
    return ids


def between(ids: list[int], first: int, last: int | None) -> list[int]:
    return ids[ids.index(first) + 1 : None if last is None else ids.index(last)]


@given(st.text(), st.text())
def test_the_parts_are_the_document(text: str, key: str) -> None:
    prefix, middle, suffix = parts(text, Draws(key))
    assert prefix + middle + suffix == text


@given(st.text(max_size=40), st.text())
def test_both_orders_can_be_undone(text: str, key: str) -> None:
    first = document(PSM, text, key)
    assert first[0] == PREFIX and Counter(first)[SUFFIX] == Counter(first)[MIDDLE] == 1
    prefix, suffix, middle = (
        between(first, PREFIX, SUFFIX),
        between(first, SUFFIX, MIDDLE),
        between(first, MIDDLE, None),
    )
    assert TOKENIZER.decode(prefix) + TOKENIZER.decode(middle) + TOKENIZER.decode(suffix) == text
    assert (TOKENIZER.decode(prefix), TOKENIZER.decode(middle), TOKENIZER.decode(suffix)) == parts(text, Draws(key))
    second = document(SPM, text, key)
    assert second == [PREFIX, SUFFIX, *suffix, MIDDLE, *prefix, *middle]


def test_by_hand() -> None:
    draws = Draws("by hand")
    assert parts("abcdefgh", draws) != parts("abcdefgh", draws)
    assert PSM.joined([[1, 2], [3], [4, 5]], draws, (7, 8, 9)) == ([7, 1, 2, 8, 4, 5, 9, 3], None)
    assert SPM.joined([[1, 2], [3], [4, 5]], draws, (7, 8, 9)) == ([7, 8, 4, 5, 9, 1, 2, 3], None)


def test_every_cut_is_as_likely_as_another() -> None:
    """Two of 0 to 3, each drawn by itself: the 16 pairs make 10 cuts, 4 of one pair and 6 of two."""
    cuts = Counter(tuple(map(len, parts("abc", Draws(str(number))))) for number in range(16_000))
    assert len(cuts) == 10
    for (before, inside, behind), found in cuts.items():
        expected = 1000 if inside == 0 else 2000
        assert before + inside + behind == 3 and abs(found - expected) < 5 * expected**0.5


def test_text_that_spells_a_mark_is_text() -> None:
    assert Counter(document(PSM, "a<|fim_middle|>b<|fim_prefix|>", "x"))[MIDDLE] == 1
