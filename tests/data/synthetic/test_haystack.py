"""Haystacks: as long as asked for, each needle once and where it should be, in hay of any kind."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.data.synthetic import SPLITS, Text, documents_filler, make_task, sample
from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.filler import everyday
from andromeda.errors import AndromedaError
from andromeda.tokenizer import Tokenizer

DOCUMENTS = (
    "One sentence. Another one!\nA line\n\nof verse",
    " ",
    "Was that all? It was.",
    "x" * 2000,
    "é" * 700 + " end.",
)
LONGEST_SENTENCE = 130  # characters, of the filler made here


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["".join(islice(everyday(Draws(str(n))), 200)) for n in range(5)], 700)


def text_of(name: str, number: int = 0, **parameters: Any) -> str:
    body = sample(make_task(name, **parameters), "train", 0, number).body
    assert isinstance(body, Text)
    return body.text


@given(length=st.integers(400, 20_000), number=st.integers(0, 1000), name=st.sampled_from(["passkey", "needles"]))
def test_a_haystack_has_the_length_in_characters(length: int, number: int, name: str) -> None:
    assert length - LONGEST_SENTENCE < len(text_of(name, number, length=length)) <= length


@settings(max_examples=15)
@given(length=st.integers(300, 3000), number=st.integers(0, 1000), name=st.sampled_from(["passkey", "variables"]))
def test_a_haystack_has_the_length_in_tokens(tokenizer: Tokenizer, length: int, number: int, name: str) -> None:
    def measure(text: str) -> int:
        return len(tokenizer.encode(text))

    longest = max(map(measure, islice(everyday(Draws("")), 500)))
    assert length - longest - 5 < measure(text_of(name, number, length=length, measure=measure)) <= length


def test_documents_fill_as_many_tokens_as_asked_for(tokenizer: Tokenizer) -> None:
    def measure(text: str) -> int:
        return len(tokenizer.encode(text))

    verse = documents_filler(["\n".join(text.strip().lower() for text in islice(everyday(Draws("verse")), 300))])
    for length in (500, 5000, 20_000):
        assert length - 100 < measure(text_of("needles", length=length, measure=measure, filler=verse)) <= length


def test_a_measure_that_does_not_add_up_still_bounds_the_length() -> None:
    def measure(text: str) -> int:
        return len(text) + len(text) ** 2 // 10_000

    for number in range(10):
        assert measure(text_of("passkey", number, length=3000, measure=measure)) <= 3000


@given(depth=st.floats(0, 1), length=st.integers(1000, 20_000), name=st.sampled_from(["passkey", "needles"]))
def test_a_needle_stands_at_its_depth(depth: float, length: int, name: str) -> None:
    text = text_of(name, length=length, depth=depth)
    hay = text.partition("\n\n")[2].rpartition("\n\nWh")[0]
    needle = re.search(r"[^.\n]*\d{6,}[^.]*\.(?: Remember[^.]*\.)?\s*", hay)
    assert needle is not None
    begin, rest = needle.start(), len(hay) - (needle.end() - needle.start())
    assert abs(begin - depth * rest) < LONGEST_SENTENCE


def test_without_a_depth_needles_are_everywhere() -> None:
    places = [text_of("passkey", number, length=4000).index("passkey", 60) / 4000 for number in range(300)]
    for tenth in range(10):
        assert 10 < sum(tenth / 10 <= place < (tenth + 1) / 10 for place in places) < 60


@pytest.mark.parametrize("split", SPLITS)
def test_what_is_asked_for_stands_nowhere_else(split: Any) -> None:
    noisy = [
        f"The code of the {a} {b} is {n}." for a in ("amber", "iron") for b in ("owl", "fox") for n in (11, 1234567)
    ]
    filler = documents_filler([" ".join(noisy), "Quiet words. " * 40, " ".join(map(str, range(10, 99)))])
    for number in range(60):
        task = make_task("passkey", digits=2, length=1200, filler=filler)
        drawn = sample(task, split, 0, number)
        assert isinstance(drawn.body, Text)
        times = drawn.body.prompt.count(drawn.answer)
        assert times in (1, 2)  # one of the wordings says it twice
        assert f"{drawn.answer} is the passkey" in drawn.body.prompt or times == 1


def test_filler_full_of_the_answers_is_refused() -> None:
    filler = documents_filler([" ".join(map(str, range(100)))])
    with pytest.raises(AndromedaError, match="passkey: the filler holds the answers; use other documents"):
        sample(make_task("passkey", digits=2, length=1200, filler=filler), "train", 0, 0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        AndromedaError, match=r"needles: length=300 is too short by [\d,]+ for what is hidden and asked"
    ):
        sample(make_task("needles", length=300, keys=9), "train", 0, 0)


@pytest.mark.parametrize("start", range(5))
def test_filler_of_documents_is_their_text_in_their_order(start: int) -> None:
    filler = documents_filler(DOCUMENTS)
    whole = "".join(f"{document.strip()}\n\n" for document in DOCUMENTS if document.strip())
    read = "".join(islice(filler(Draws(f"place {start}")), 60))
    assert read[:6000] in whole * 6
    assert max(len(piece) for piece in islice(filler(Draws("")), 60)) <= 603


def test_filler_reads_no_more_documents_than_it_keeps() -> None:
    endless = iter(lambda: "All work and no play. ", "")
    filler = documents_filler(endless, most_characters=1000)
    assert len(set(islice(filler(Draws("")), 500))) <= 3


def test_filler_without_text_is_refused() -> None:
    with pytest.raises(AndromedaError, match="the documents for filler hold no text; give some that do"):
        documents_filler(["", " \n"])


def test_the_filler_made_here_has_sentences_without_digits_in_paragraphs() -> None:
    pieces = list(islice(everyday(Draws("a")), 2000))
    assert all(re.fullmatch(r"[A-Z][a-z ]+\.(?: |\n\n)", piece) for piece in pieces)
    assert max(map(len, pieces)) <= LONGEST_SENTENCE
    assert len(set(pieces)) > 1400
    assert 5 <= len(pieces) / sum(piece.endswith("\n") for piece in pieces) <= 9


def test_the_filler_does_not_change_what_is_asked() -> None:
    ours = sample(make_task("needles", keys=3), "train", 0, 0)
    theirs = sample(make_task("needles", keys=3, filler=documents_filler(DOCUMENTS)), "train", 0, 0)
    assert (ours.answer, ours.content) == (theirs.answer, theirs.content)
    assert ours.body != theirs.body
