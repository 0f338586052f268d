"""Training and testing share nothing: what a sample is about is read off its text here, and its split computed anew."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.data.synthetic import SPLITS, Sample, Split, Task, Text, make_task, sample, split_of
from andromeda.data.synthetic.apis import FIND, KINDS, REFERENCE, Role, roles
from andromeda.data.synthetic.lexicon import ACROSTICS
from andromeda.data.synthetic.verse import TOPICS
from andromeda.data.synthetic.words import ADJECTIVES, NOUNS, SYLLABLES
from andromeda.errors import AndromedaError

THINGS = sorted((thing for kind in KINDS.values() for thing in kind.things), key=len, reverse=True)


def shown(drawn: Sample) -> str:
    """All that a model sees of it."""
    if isinstance(drawn.body, Text):
        return drawn.body.text
    contents = [str(message["content"]) for message in drawn.body.messages]
    return "\n".join([*contents, *(tool["function"]["description"] for tool in drawn.body.tools)])


# ---- what a text is about, read off it -----------------------------------------------------------------


def calculation(sign: str, a: int, b: int) -> str:
    if sign == "-":
        a, b = min(a, b), abs(a - b)
    if sign == "/":
        a, b = b, a // b
    return f"{'sum' if sign in '+-' else 'product'} {min(a, b)} {max(a, b)}"


def of_arithmetic(drawn: Sample, text: str) -> set[str]:
    left, sign, right = re.findall(r"(\d+) ([-+*/]) (\d+) =", text)[0]
    if "Reversed" in text:
        left, right = left[::-1], right[::-1]
    return {calculation(sign, int(left), int(right))}


def of_word_problems(drawn: Sample, text: str) -> set[str]:
    return {calculation(sign, int(a), int(b)) for a, sign, b in re.findall(r"^(\d+) ([-+*/]) (\d+) =", text, re.M)}


def of_tool_calls(drawn: Sample, text: str) -> set[str]:
    found = set()
    for thing in THINGS:  # the longest first: a city bus tour is no tour
        if re.search(rf"\b{thing}\b", text):
            found.add(f"function {thing}")
            text = re.sub(rf"\b{thing}\b", "", text)
    return found


def of_passkey(drawn: Sample, text: str) -> set[str]:
    return {f"passkey {number}" for number in re.findall(r"\d+", text)}


def of_needles(drawn: Sample, text: str) -> set[str]:
    keys = re.findall(rf"(?<=the )(?:{'|'.join(ADJECTIVES)}) (?:{'|'.join(NOUNS)})\b", text)
    kind = drawn.task.parameters()["kind"]
    value = {"digits": r"\d{7}", "hexadecimal": r"[0-9a-f]{16}", "word": f"(?:{'|'.join(SYLLABLES)}){{4}}"}[kind]
    return {f"key {key}" for key in keys} | {f"value {kind} {found}" for found in re.findall(rf"\b{value}\b", text)}


def of_recall(drawn: Sample, text: str) -> set[str]:
    return {f"recall {key}" for key in re.findall(r"^([a-z]+): \d+$", text, re.M)}


def of_copying(drawn: Sample, text: str) -> set[str]:
    _, lines, *_ = text.split("\n\n")
    words = [re.sub(r"^\d+\. ", "", line).split() for line in lines.splitlines()]
    return {f"line {min(' '.join(line), ' '.join(line[::-1]))}" for line in words}


def of_variables(drawn: Sample, text: str) -> set[str]:
    pairs = re.findall(r"Let (\w+) = (\w+)\.", text)
    return {f"variable {a}" for a, _ in pairs} | {f"number {b}" for _, b in pairs if b.isdigit()}


def of_verse_form(drawn: Sample, text: str) -> set[str]:
    found = {f"topic {word}" for word in re.findall(r'"(\w+)"', text)}
    found |= {f"acrostic {word.lower()}" for word in re.findall(r"spell ([A-Z]+)", text)}
    ends = re.findall(r"in this order: ([a-z, ]+)\.", text)
    return found | {f"last words {words.replace(',', '')}" for words in ends}


READ: dict[str, Callable[[Sample, str], set[str]]] = {
    "arithmetic": of_arithmetic,
    "word_problems": of_word_problems,
    "tool_calls": of_tool_calls,
    "passkey": of_passkey,
    "needles": of_needles,
    "recall": of_recall,
    "copying": of_copying,
    "variables": of_variables,
    "verse_form": of_verse_form,
}


# ---- any sample -------------------------------------------------------------------------------------------


def ranges(least: int, most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(least, most), min_size=2, max_size=2).map(sorted)


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    name = draw(st.sampled_from(sorted(READ)))
    length = st.integers(5000, 6000)
    of: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "arithmetic": {
            "operation": st.sampled_from(["add", "subtract", "multiply", "divide"]),
            "writing": st.sampled_from(["plain", "padded", "reversed"]),
            "digits": ranges(1, 30),
        },
        "word_problems": {"steps": ranges(1, 6), "digits": ranges(1, 6)},
        "tool_calls": {"tools": ranges(1, 12), "form": st.just("chat")},
        "passkey": {"digits": st.integers(2, 12), "length": length, "depth": st.none() | st.floats(0, 1)},
        "needles": {
            "keys": st.integers(3, 9), "queries": st.integers(1, 3), "values": st.integers(1, 3), "length": length,
            "kind": st.sampled_from(["digits", "hexadecimal", "word"]),
        },
        "recall": {"pairs": st.integers(3, 250), "queries": st.integers(1, 3)},
        "copying": {
            "order": st.sampled_from(["same", "lines reversed", "words reversed", "selected"]),
            "lines": ranges(1, 6), "words": ranges(1, 6),
        },
        "variables": {"chains": st.integers(1, 4), "hops": st.integers(0, 5), "length": length},
        "verse_form": {
            "count": st.sampled_from(["nothing", "words", "syllables"]), "acrostic": st.booleans(),
            "rhymes": st.booleans(), "lines": st.sampled_from([[3, 3], [3, 6], [4, 5], [6, 6]]),
        },
    }  # fmt: skip
    form = st.sampled_from(["text", "chat"])
    return make_task(name, **draw(st.fixed_dictionaries({"form": form} | of[name])))


@settings(max_examples=200)
@given(task=tasks(), split=st.sampled_from(SPLITS), seed=st.integers(-(2**70), 2**70), number=st.integers(0, 2**70))
def test_all_that_a_text_is_about_is_of_its_split(task: Task, split: Split, seed: int, number: int) -> None:
    drawn = sample(task, split, seed, number)
    about = READ[task.name](drawn, shown(drawn))
    assert about == set(drawn.content)
    assert {split_of(content) for content in about} == {split}


def test_the_split_of_a_content_never_changes() -> None:
    contents = [f"sum {a} {b}" for a in range(10) for b in range(a, 10)]
    tested = ["sum 1 7", "sum 1 9", "sum 2 9", "sum 5 6", "sum 6 8", "sum 7 9"]
    assert [content for content in contents if split_of(content) == "test"] == tested


def test_an_eighth_is_for_testing() -> None:
    share = sum(split_of(f"passkey {number}") == "test" for number in range(20_000)) / 20_000
    assert abs(share - 1 / 8) < 0.01


# ---- small spaces, to the last instance -----------------------------------------------------------------------


def gathered(task: Task, split: Split, wanted: set[str], most: int = 20_000) -> set[str]:
    """The contents of sample after sample, until they are the wanted ones or something else turns up."""
    found: set[str] = set()
    for number in range(most):
        found.update(sample(task, split, 7, number).content)
        if found >= wanted:
            break
    return found


PAIRS = list(combinations_with_replacement(range(10), 2))
SPACES: dict[str, set[str]] = {  # of one-digit operands
    "add": {f"sum {a} {b}" for a, b in PAIRS},
    "subtract": {f"sum {a} {b}" for a, b in PAIRS if a + b < 10},
    "multiply": {f"product {a} {b}" for a, b in PAIRS},
    "divide": {f"product {min(b, a // b)} {max(b, a // b)}" for a in range(10) for b in range(1, 10)},
}


@pytest.mark.parametrize("operation", SPACES)
@pytest.mark.parametrize("writing", ["plain", "padded", "reversed"])
def test_one_digit_facts_are_divided_to_the_last(operation: str, writing: str) -> None:
    space = SPACES[operation]
    task = make_task("arithmetic", operation=operation, writing=writing, digits=[1, 1])
    drawn = {split: gathered(task, split, {c for c in space if split_of(c) == split}) for split in SPLITS}
    assert drawn["train"] | drawn["test"] == space
    assert drawn["train"].isdisjoint(drawn["test"])
    assert drawn["test"]


def test_two_digit_passkeys_are_divided_to_the_last() -> None:
    space = {f"passkey {number}" for number in range(10, 100)}
    task = make_task("passkey", digits=2, length=300)
    drawn = {split: gathered(task, split, {c for c in space if split_of(c) == split}) for split in SPLITS}
    assert drawn["train"] | drawn["test"] == space
    assert drawn["train"].isdisjoint(drawn["test"])
    assert drawn["test"]


def test_functions_are_divided_by_the_thing_they_are_about() -> None:
    every = {Role(kind, action, thing) for kind, of in KINDS.items() for thing in of.things for action in of.actions}
    assert {*roles("train"), *roles("test")} == every
    assert {role.thing for role in roles("train")}.isdisjoint(role.thing for role in roles("test"))
    assert len(set(THINGS)) == len(THINGS)  # a thing has one kind
    for kind in KINDS:
        assert len({role.thing for role in roles("test") if role.kind == kind}) >= 5
    findable = {role.thing for role in roles("test") if role.action == FIND}
    assert findable <= {role.thing for role in roles("test") if REFERENCE in role.how.needed}
    assert len(roles("test")) >= 64 + 2  # as many functions as a task may offer, besides those called


def test_every_function_is_drawn_sooner_or_later() -> None:
    things = {role.content for role in roles("test")}
    assert gathered(make_task("tool_calls", tools=[8, 8]), "test", things) == things


def test_topics_and_acrostics_are_divided_to_the_last() -> None:
    space = {f"topic {word}" for word in TOPICS} | {f"acrostic {word}" for word in ACROSTICS}
    task = make_task("verse_form", acrostic=True, count="nothing")
    drawn = {split: gathered(task, split, {c for c in space if split_of(c) == split}) for split in SPLITS}
    assert drawn["train"] | drawn["test"] == space
    assert drawn["train"].isdisjoint(drawn["test"])
    for size in (3, 4, 5, 6):
        assert len([word for word in ACROSTICS if len(word) == size and split_of(f"acrostic {word}") == "test"]) > 2


def test_names_of_needles_suffice_for_testing() -> None:
    names = [f"key {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    assert len(set(names)) == len(names)
    assert sum(split_of(name) == "test" for name in names) > 500  # the most that a task may ask for


def test_most_needles_and_the_most_short_keys_can_be_drawn() -> None:
    assert len(sample(make_task("needles", keys=500, length=40_000), "test", 0, 0).content) == 1000
    assert len(sample(make_task("recall", pairs=200), "test", 0, 0).content) == 200


# ---- when a space is too small ----------------------------------------------------------------------------------


def test_a_space_without_anything_for_the_split_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("andromeda.data.synthetic.split.TEST_BYTES", 0)
    with pytest.raises(AndromedaError, match=r"arithmetic: 500 draws gave nothing for the test split, with .*digits"):
        sample(make_task("arithmetic"), "test", 0, 0)


def test_the_seam_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that forgets to draw within the split still yields nothing of the other."""
    monkeypatch.setattr("andromeda.data.synthetic.arithmetic.within", lambda split, draw, content: draw())
    for number in range(50):
        assert {split_of(c) for c in sample(make_task("arithmetic"), "test", 0, number).content} == {"test"}
