"""Verse to order: what is asked for is done, and what is not done does not pass."""

from __future__ import annotations

import re

import pytest

from andromeda.data.synthetic import SPLITS, Sample, check, make_task, sample
from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.lexicon import (
    ACROSTICS,
    EVERY_LIST,
    HISSING,
    RHYMES,
    SILENT,
    SYLLABLES,
    VOWELS,
    syllables,
)
from andromeda.data.synthetic.split import Unlucky
from andromeda.data.synthetic.verse import COUNTS, TOPICS, Order, _poem


def poems(number: int = 25, **parameters: object) -> list[tuple[Sample, str, list[list[str]]]]:
    """Samples, their requests, and the words of the lines of their answers."""
    found = [
        sample(make_task("verse_form", form="chat", **parameters), split, 0, n)
        for split in SPLITS
        for n in range(number)
    ]
    return [
        (one, one.body.messages[0]["content"], [line.lower().strip(",.").split() for line in one.answer.splitlines()])  # type: ignore[union-attr]
        for one in found
    ]


@pytest.mark.parametrize("acrostic", [False, True])
@pytest.mark.parametrize("rhymes", [False, True])
@pytest.mark.parametrize("count", ["nothing", "words", "syllables"])
def test_the_poem_does_what_the_request_says(count: str, acrostic: bool, rhymes: bool) -> None:
    for one, request, lines in poems(count=count, acrostic=acrostic, rhymes=rhymes):
        assert len(lines) == int(re.findall(r"(\d+) lines", request)[0])
        assert any(re.findall(r'"(\w+)"', request)[0] in line for line in lines)
        measured = [len(line) if count == "words" else sum(SYLLABLES[word] for word in line) for line in lines]
        numbers = re.findall(rf"(?:Every line has|The lines have) ([\d, and]+) {count}", request)
        if count != "nothing":
            stated = [int(number) for number in re.findall(r"\d+", numbers[0])]
            assert measured == (stated if len(stated) > 1 else stated * len(lines))
        if acrostic:
            assert "".join(line[0][0] for line in lines).upper() == re.findall(r"spell ([A-Z]+)\.", request)[0]
        if rhymes:
            ends = re.findall(r"end in these words, in this order: (.*)\.", request)[0].split(", ")
            assert [line[-1] for line in lines] == ends
        assert check(one, one.answer.upper().replace(",", " —"))


def test_what_is_not_done_does_not_pass() -> None:
    parameters = {"count": "syllables", "acrostic": True, "rhymes": True}
    task = make_task("verse_form", **parameters)
    for number in range(20):
        one = sample(task, "train", 0, number)
        lines = one.answer.splitlines()
        topic = one.content[0].removeprefix("topic ")
        assert not check(one, "\n".join(lines[:-1]))
        assert not check(one, "\n".join([*lines, lines[0]]))
        assert not check(one, "\n".join(lines[1:] + lines[:1])) or len({line[0] for line in lines}) == 1
        assert not check(one, "\n".join([f"x{lines[0]}", *lines[1:]]))
        assert not check(one, one.answer.removesuffix(".") + "s.")
        assert not check(one, re.sub(topic, topic[:-1], one.answer, flags=re.I))
        assert not check(one, one.answer + "\n...")


def test_another_poem_to_the_same_order_passes() -> None:
    task = make_task("verse_form", count="words", lines=[3, 3])
    one = next(s for n in range(500) if "Every line has 4 words" in (s := sample(task, "train", 0, n)).body.prompt)
    topic = one.content[0].removeprefix("topic ")
    assert check(one, f"Don't forget the {topic}!\n\nThey are all gone;\nnobody knows where exactly")
    assert not check(one, f"Don't forget the {topic}!\n\nThey are gone;\nnobody knows where exactly")


def test_last_words_rhyme_in_couplets_or_alternate() -> None:
    groups = [{word for some in group.values() for word in some} for group in RHYMES]
    schemes = set()
    for _, _, lines in poems(60, rhymes=True, lines=[4, 4]):
        places = [next(n for n, group in enumerate(groups) if line[-1] in group) for line in lines]
        schemes.add("".join("abcd"[list(dict.fromkeys(places)).index(place)] for place in places))
    assert schemes == {"aabb", "abab"}


def test_every_topic_suits_every_order() -> None:
    """But for acrostics with short lines, of which enough are left."""
    for topic in TOPICS:
        for (counted, rhymed), (least, most) in COUNTS.items():
            for number in range(least, most + 1):
                ends = ("stone", "moonlight", "sea") if rhymed else None
                assert _poem(Draws(topic), Order(topic, 3, (number,) * 3, None, ends), counted)


def test_every_acrostic_can_be_written() -> None:
    for letters in ACROSTICS:
        order = Order("owls", len(letters), None, letters, None)
        assert _poem(Draws(letters), order, "nothing")
    with pytest.raises(Unlucky):
        _poem(Draws(""), Order("owls", 1, None, "x", None), "nothing")


def test_words_of_the_lexicon_have_one_count() -> None:
    counted: dict[str, int] = {}
    for by_number in EVERY_LIST:
        for number, words in by_number.items():
            assert len(set(words)) == len(words)
            assert all(counted.setdefault(word, number) == number for word in words)
    assert counted == SYLLABLES


def test_the_rule_for_other_words_agrees_with_the_lexicon() -> None:
    agreed = sum(
        max(1, len(VOWELS.findall(word)) - bool(SILENT.search(word) and not HISSING.search(word))) == number
        for word, number in SYLLABLES.items()
    )
    assert agreed / len(SYLLABLES) > 0.96


@pytest.mark.parametrize(
    ("word", "number"),
    [("strengths", 1), ("table", 2), ("whole", 1), ("wanted", 2), ("walked", 1), ("houses", 2), ("hopes", 1),
     ("rhythm", 1), ("Andromeda", 4), ("the", 1), ("hmm", 1), ("handed", 2), ("wishes", 2), ("apples", 2)],
)  # fmt: skip
def test_syllables_by_rule(word: str, number: int) -> None:
    assert syllables(word) == number
