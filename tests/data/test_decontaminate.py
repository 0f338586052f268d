"""Documents that hold words of an evaluation text are found, with the words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.data import shingles
from andromeda.data.decontaminate import Decontaminate, Evaluations, Shared
from andromeda.errors import AndromedaError

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=40)


def test_the_ngram_is_named_whatever_stands_around_it() -> None:
    evaluations = Evaluations([("other", "x " * 20), ("gsm8k:1", QUESTION)])
    text = "Here: NATALIA sold clips -- to 48 of her\n\nfriends in April and, then she danced"
    assert evaluations.shared(text) == Shared(
        "gsm8k:1", "natalia sold clips to 48 of her friends in april and then she"
    )
    assert evaluations.shared(text.replace("she danced", "danced")) is None
    assert evaluations.shared("") is None


def test_short_evaluation_texts_count_as_a_whole_or_not_at_all() -> None:
    evaluations = Evaluations([("eight", "one two three four five six seven eight"), ("seven", "a b c d e f g")])
    assert evaluations.untested == ["seven"]
    assert evaluations.shared("zero one, two, three, four, five, six, seven, eight, nine") == (
        "eight", "one two three four five six seven eight",
    )  # fmt: skip
    assert evaluations.shared("two three four five six seven eight nine ten eleven") is None
    assert evaluations.shared("a b c d e f g") is None


def test_of_a_whole_file_its_name_is_no_evaluation_text(tmp_path: Path) -> None:
    name = "the tiger burning bright in the forests of the night.txt"
    (tmp_path / name).write_text(QUESTION)
    (tmp_path / "lines.jsonl").write_text('{"asked": ["one two three four five six seven eight", 17]}\n')
    evaluations = Decontaminate(("*",)).read(tmp_path)
    assert (evaluations.num_texts, evaluations.untested) == (2, ["lines.jsonl:1"])
    assert evaluations.shared(name) is None
    assert evaluations.shared(QUESTION) is not None


@given(st.lists(WORDS, min_size=1, max_size=3), WORDS, st.integers(2, 5))
def test_as_compared_one_by_one(texts: list[list[str]], words: list[str], length: int) -> None:
    long = [text for text in texts if len(text) >= length]
    named = [(str(number), " ".join(text)) for number, text in enumerate(long)]
    if not named:
        return
    grams = {tuple(text[i : i + length]) for text in long for i in range(len(text) - length + 1)}
    shared = [words[i : i + length] for i in range(len(words) - length + 1) if tuple(words[i : i + length]) in grams]
    found = Evaluations(named, length).shared(" ".join(words))
    assert (found and found.words) == (" ".join(shared[0]) if shared else None)
    if found:
        assert f" {found.words} " in f" {named[int(found.evaluation)][1]} "


@given(WORDS, st.integers(1, 14))
def test_hashes_of_ngrams_are_equal_where_they_are(words: list[str], n: int) -> None:
    hashes = shingles.grams(shingles.hashed(words), n).tolist()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert len(hashes) == len(grams)
    assert len(set(hashes)) == len(set(zip(hashes, grams, strict=True))) == len(set(grams))


@pytest.mark.parametrize(
    ("texts", "length", "message"),
    [
        ([("a", "b c")], 13, "no evaluation text has 8 words"),
        ([], 13, "no evaluation text"),
        ([("a", "b")], 1, "13 is usual"),
    ],
)
def test_what_cannot_be_tested(texts: list[tuple[str, str]], length: int, message: str) -> None:
    with pytest.raises(AndromedaError, match=message):
        Evaluations(texts, length)
