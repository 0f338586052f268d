"""Shares of repeated lines and n-grams, against counting them one by one."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.data import repetition
from andromeda.data.quality import Repetition

WORDS = st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), max_size=30)


def plain(words: list[str], n: int) -> tuple[float, float]:
    """The shares of characters within the commonest n-gram, and within those that stood before."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = Counter(grams)
    total = sum(map(len, words))

    def share(places: list[int]) -> float:
        covered = {i + j for i in places for j in range(n)}
        return sum(len(words[i]) for i in covered) / total if total else 0.0

    most = max(counts.values(), default=0)
    top = [gram for gram in counts if counts[gram] == most > 1]
    longest = max((len("".join(gram)) for gram in top), default=0)
    tops = [share([i for i, g in enumerate(grams) if g == gram]) for gram in top if len("".join(gram)) == longest]
    return max(tops, default=0.0), share([i for i, gram in enumerate(grams) if gram in grams[:i]])


@given(WORDS)
def test_ngrams_as_counted_one_by_one(words: list[str]) -> None:
    found = {grams.n: grams for grams in repetition.grams(words, 10)}
    for n in range(2, 11):
        top, later = plain(words, n)
        if n not in found:
            assert (top, later) == (0, 0)
            continue
        assert repetition.later(found[n]) == pytest.approx(later)
        if top:
            assert 0 < repetition.commonest(found[n]) <= top + 1e-9  # of several equally long ones any


def test_the_commonest_ngram() -> None:
    words = ["to", "be", "or", "not", "to", "be", "that", "is", "to", "be"]
    (pairs, *_) = repetition.grams(words, 2)
    assert repetition.commonest(pairs) == pytest.approx(12 / 23)
    assert repetition.later(pairs) == pytest.approx(8 / 23)


def test_parts_that_stood_before() -> None:
    assert repetition.repeated(["a", "", "bbb", "a", ""]) == (1 / 3, 1 / 5)
    assert repetition.repeated([]) == (0, 0)


def test_a_text_without_repeats_passes_however_short() -> None:
    for text in ("x", "two words", "the quick brown fox jumps over the lazy dog", ""):
        assert Repetition(min_words=0).failure(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ha " * 9 + "and now for something completely different, my friends", "repetition: top 2-gram"),
        ("one two three four five six. " * 2 + " ".join(f"word{i}" for i in range(30)), "repetition: 5-grams"),
        ("a paragraph\n\n" * 2 + "b\n\n" + "\n".join("cdefghij"), "repetition: characters of lines"),
    ],
)
def test_repetition_is_found(text: str, reason: str) -> None:
    assert Repetition().failure(text) is None, "of less than 50 words"
    failure = Repetition(min_words=0, max_repeated=(0.1,) * 6).failure(text)
    assert failure is not None
    assert failure.reason == reason
