"""What cleaning changes and what it leaves, why a text is dropped, and that conversations are cleaned as a whole."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from andromeda.data.clean import Cleaned, Dropped, Rules, clean, clean_text
from andromeda.data.fields import Document
from andromeda.data.quality import C4, Gopher, Repetition, english
from andromeda.data.redact import KINDS
from andromeda.errors import AndromedaError

ftfy = pytest.importorskip("ftfy")

VERSE = """\
I wandered lonely as a cloud
  That floats on high o'er vales and hills,
When all at once I saw a crowd,
  A host, of golden daffodils;

Beside the lake, beneath the trees,
\tFluttering and dancing in the breeze. — “ﬁn”
"""
PROSE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing."
)


def cleaned(text: str, **rules: Any) -> tuple[str, dict[str, int]]:
    result = clean(Document("here", text=text), Rules(**rules))
    assert isinstance(result, Cleaned), result
    assert result.document.text is not None
    return result.document.text, dict(result.changes)


def dropped(text: str, **rules: Any) -> tuple[str, str]:
    result = clean(Document("here", text=text), Rules(**rules))
    assert isinstance(result, Dropped), result
    assert result.where == "here"
    return result.reason, result.figures


# ---- repair --------------------------------------------------------------------------------------


def test_verse_is_left_as_it_stands() -> None:
    everything = Rules(min_english=0.07, redact=KINDS, c4=C4(), gopher=Gopher(min_words=20))
    assert clean(Document("here", text=VERSE), everything) == Cleaned(Document("here", text=VERSE), {})


@pytest.mark.parametrize(
    ("text", "expected", "changes"),
    [
        ("a\r\nb\rc\u2028d\n\n  e", "a\nb\nc\nd\n\n  e", {"line ends": 3}),
        ("a  \n \n\n  b\t\n c\xa0", "a\n\n\n  b\n c", {"lines with trailing spaces": 4}),
        ("\ufeffa\x00b\x0c\x1b[c\td\x7f", "ab[c\td", {"control characters": 5}),
        ("a\ud800b", "ab", {"control characters": 1}),
        ("donâ€™t\nfine — “so”\ncafÃ©", "don’t\nfine — “so”\ncafé", {"lines decoded wrongly": 2}),
        ("well\x85 \x93yes\x94", "well… “yes”", {"lines decoded wrongly": 1}),
        ("cafe\u0301", "café", {"texts not in NFC": 1}),
    ],
)  # fmt: skip
def test_damage_is_repaired_and_counted(text: str, expected: str, changes: dict[str, int]) -> None:
    assert cleaned(text) == (expected, changes)
    off = dict.fromkeys(("unicode", "newlines", "controls", "trailing_spaces"), False)
    assert cleaned(text, **off) == (text, {})


@given(st.text(st.characters(codec="utf-8"), max_size=60).map("x".__add__))
@example("x\xa0\r\x00\n")
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    once, _ = cleaned(text, redact=KINDS)
    assert cleaned(once, redact=KINDS) == (once, {})


@given(st.lists(st.sampled_from(["  roses", "", "\tviolets", "sugar  is", "   "])).map("\n".join))
def test_indentation_and_blank_lines_stay(text: str) -> None:
    once, _ = cleaned("x\n" + text)
    assert [line.rstrip(" ") for line in ("x\n" + text).split("\n")] == once.split("\n")


def test_lines_decoded_wrongly_are_those_that_ftfy_finds() -> None:
    lines = [
        "naïve",
        "naÃ¯ve",
        "voilÃ  tout",
        "€ 5",
        "â€œquotedâ€\x9d",
        "Ünïcödé",
        "doesnâ€™t",
        "РџСЂРёРІРµС‚",
        "虎",
        "Ã©tÃ©",
    ]
    repaired, _ = cleaned("\n".join(lines))
    assert repaired.split("\n") == [ftfy.fix_encoding(line) for line in lines]


# ---- lengths and quality -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rules", "reason"),
    [
        ("", {}, ("empty", "")),
        (" \n\t", {}, ("empty", "")),
        (" abc ", {"min_characters": 4}, ("characters", "3 < 4")),
        ("abcde", {"max_characters": 4}, ("characters", "5 > 4")),
        ("the cat and the dog", {"gopher": Gopher()}, ("gopher: words", "5 < 50")),
        (PROSE, {"gopher": Gopher(max_words=50)}, ("gopher: words", "68 > 50")),
        ("to be of a I " * 10, {"gopher": Gopher()}, ("gopher: word length", "1.6 < 3")),
        ("# the and word " * 15, {"gopher": Gopher(min_word_length=1)}, ("gopher: hashes", "0.25 > 0.1")),
        ("the word and… " * 20, {"gopher": Gopher()}, ("gopher: ellipses", "0.3333 > 0.1")),
        ("- the word and other\n" * 20, {"gopher": Gopher(min_word_length=1)}, ("gopher: bullet lines", "1 > 0.9")),
        ("the word and that have...\n" * 20, {"gopher": Gopher(max_symbols=1)}, ("gopher: ellipsis lines", "1 > 0.3")),
        ("the and 12345 67890 " * 20, {"gopher": Gopher()}, ("gopher: alphabetic words", "0.5 < 0.8")),
        ("dogs chase cats " * 20, {"gopher": Gopher()}, ("gopher: stop words", "0 < 2")),
        ("a line\n" * 3 + "b line", {"repetition": Repetition(min_words=0)}, ("repetition: lines", "0.5 > 0.3")),
        ("Lorem ipsum dolor", {"c4": C4()}, ("c4: lorem ipsum", "")),
        ("int main() {}", {"c4": C4()}, ("c4: braces", "1 of them")),
        ("Please enable JavaScript", {"c4": C4()}, ("empty", "")),
        ("Wer reitet so spät durch Nacht und Wind?", {"min_english": 0.07}, ("English", "0 < 0.07")),
    ],
)  # fmt: skip
def test_reasons_and_figures(text: str, rules: Any, reason: tuple[str, str]) -> None:
    assert dropped(text, **rules) == reason


def test_good_prose_passes_every_rule() -> None:
    rules: dict[str, Any] = {"gopher": Gopher(), "c4": C4(), "min_english": 0.07, "redact": KINDS}
    assert cleaned(PROSE, **rules) == (PROSE, {})


def test_lines_that_c4_takes_out_are_counted() -> None:
    text = "A sentence.\nEnable Javascript.\n\nA heading\n"
    assert cleaned(text, c4=C4()) == ("A sentence.\n\nA heading\n", {"lines out, c4: javascript": 1})
    expected = ("A sentence.\nEnable Javascript.\n\n", {"lines out, c4: terminal punctuation": 1})
    assert cleaned(text, c4=C4(javascript=False, terminal_punctuation=True)) == expected


def test_english_is_told_from_its_neighbours() -> None:
    others = [
        "Nel mezzo del cammin di nostra vita mi ritrovai per una selva oscura, ché la diritta via era smarrita.",
        "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un hidalgo",
        "Les sanglots longs des violons de l'automne blessent mon coeur d'une langueur monotone.",
        "Arma virumque cano, Troiae qui primus ab oris Italiam, fato profugus, Laviniaque venit litora",
        "Mijn vader was een man die in het dorp woonde en hij had een hond die met hem was in de oorlog",
        "Jeg gik mig over sø og land, der mødte jeg en gammel mand, han spurgte så: hvor hører du vel hjemme?",
    ]
    assert max(map(english, others)) < 0.05
    assert min(map(english, [VERSE, PROSE, "O my Luve is like a red, red rose that's newly sprung in June"])) > 0.12


# ---- conversations -------------------------------------------------------------------------------

KEY = "AKIA" + "ABCDEFGHIJKLMNOP"


def test_a_conversation_is_cleaned_throughout() -> None:
    messages: tuple[dict[str, Any], ...] = (
        {"role": "user", "content": f"use {KEY}\r\nplease "},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"key": KEY}}}]},
        {"role": "tool", "content": ""},
        {"role": "user", "content": f"a\x00b {KEY}"},
        {"role": "assistant", "content": "\x00", "tool_calls": [{"function": {"arguments": f'{{"key": "{KEY}"}}'}}]},
    )
    tools = ({"name": "f", "description": f"such as {KEY}"},)
    result = clean(Document("here", messages=messages, tools=tools), Rules())
    assert isinstance(result, Cleaned)
    assert result.document.messages == (
        {"role": "user", "content": "use [AWS key]\nplease"},
        {"role": "assistant", "content": "",
         "tool_calls": [{"function": {"name": "f", "arguments": {"key": "[AWS key]"}}}]},
        {"role": "tool", "content": ""},
        {"role": "user", "content": "ab [AWS key]"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": '{"key": "[AWS key]"}'}}]},
    )  # fmt: skip
    assert result.document.tools == ({"name": "f", "description": "such as [AWS key]"},)
    assert result.changes == {"AWS key": 5, "line ends": 1, "lines with trailing spaces": 1, "control characters": 2}


@pytest.mark.parametrize("empty", ["", "  ", "\x00"])
def test_a_message_that_fails_drops_the_conversation(empty: str) -> None:
    messages = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": empty})
    assert clean(Document("a:1", messages=messages), Rules()) == Dropped("a:1", "empty", "message 2")
    long = ({"role": "user", "content": "Hello"},)
    expected = Dropped("a:1", "characters", "message 1: 5 > 4")
    assert clean(Document("a:1", messages=long), Rules(max_characters=4)) == expected


def test_what_a_tool_gave_is_repaired_and_not_judged() -> None:
    result = "[" + '{"place": "Oslo", "warm": false}, ' * 40 + "{}]\r\n"
    messages = ({"role": "user", "content": "Wohin?"}, {"role": "tool", "content": result + KEY})
    done = clean(Document("here", messages=messages), Rules(repetition=Repetition(), c4=C4(), min_english=0.05))
    assert done == Dropped("here", "English", "0 < 0.05")
    done = clean(Document("here", messages=messages[1:]), Rules(repetition=Repetition(), c4=C4(), min_english=0.05))
    assert isinstance(done, Cleaned) and done.document.messages is not None
    assert done.document.messages[0]["content"] == result.replace("\r", "") + "[AWS key]"


def test_english_is_looked_for_in_all_messages_together() -> None:
    said = ({"role": "user", "content": "Merci!"}, {"role": "assistant", "content": PROSE})
    assert isinstance(clean(Document("here", messages=said), Rules(min_english=0.05)), Cleaned)
    assert clean(Document("here", messages=said[:1]), Rules(min_english=0.05)) == Dropped("here", "English", "0 < 0.05")
    calls = ({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "the"}}]},)
    assert isinstance(clean(Document("here", messages=calls), Rules(min_english=0.05)), Cleaned)


# ---- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rules(min_characters=0), "`min_characters` 0 must be 1 or more"),
        (lambda: Rules(min_characters=5, max_characters=4), "`min_characters` 5 must lie between 0 and `max_char"),
        (lambda: Rules(min_english=2.0), "`min_english` is a share; 2.0 must lie"),
        (lambda: Rules(redact=("phones",)), "knows no 'phones'; use keys, assignments, emails, addresses"),
        (lambda: Gopher(max_symbols=1.5), "gopher: `max_symbols` is a share"),
        (lambda: Gopher(min_word_length=11.0), "gopher: `min_word_length` 11.0 must lie"),
        (lambda: Repetition(max_top=(0.1,)), r"repetition: `max_top` takes 3 shares between 0 and 1; got \[0.1\]"),
        (lambda: Repetition(max_lines=-1.0), "repetition: `max_lines` is a share"),
    ],
)  # fmt: skip
def test_rules_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(AndromedaError, match=message):
        make()


def test_changes_add_up_over_texts() -> None:
    changes: Counter[str] = Counter()
    for text in ("a\r", "b\r\r"):
        clean_text(text, Rules(), changes)
    assert changes["line ends"] == 3
