"""andromeda.tokenizer.pieces: ids are those of the library, whatever the text."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from andromeda.tokenizer import Tokenizer, pieces
from andromeda.tokenizer.pieces import PieceEncoder

VERSE = (Path(__file__).parents[1] / "examples/verse/validation.txt").read_text(encoding="utf-8")
TOKENIZER = Tokenizer.train([VERSE, "l’été 12 – “ça” ½ x² \xa0"], 600)
LIBRARY = TOKENIZER._plain.encoder

letters = st.sampled_from("abAZ'’éßŒǅɏ-_ªµ·×")
others = st.sampled_from("0123 \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2028\u0301²½٣漢😀<|>\x00\xad\u2014\u2003\u200b")
texts = st.text(letters | others | st.sampled_from("  \n..") | st.characters(exclude_categories=["Cs"]), max_size=60)


def of_library(text: str) -> list[int]:
    return LIBRARY.encode(text, add_special_tokens=False).ids


@given(st.lists(texts, max_size=5))
def test_ids_are_those_of_the_library(found: list[str]) -> None:
    assert TOKENIZER.encode_batch(found) == [of_library(text) for text in found]


@given(st.text(letters | st.sampled_from("0123 \t\n\r\x0b\x0c\x1c\x00!\x7f‘—…"), max_size=60))
def test_plain_text_goes_by_pieces(text: str) -> None:
    encoder = PieceEncoder(LIBRARY)
    assert encoder.encode(text) == of_library(text)
    assert encoder.encode(text) == of_library(text)  # with all pieces known


def test_characters_are_what_the_patterns_take_them_for() -> None:
    letter, blank = re.compile(f"[{pieces.LETTERS}]"), re.compile(f"[{pieces.BLANKS}]")
    allowed = [chr(code) for code in range(0x10000) if not pieces.OTHER.match(chr(code))]
    assert len(allowed) > 600
    for character in allowed:
        category = unicodedata.category(character)
        assert bool(letter.match(character)) == category.startswith("L"), hex(ord(character))
        assert category[0] not in "MNZ" or character in "0123456789 ", hex(ord(character))
        assert bool(blank.match(character)) == (character in " \t\n\v\f\r"), hex(ord(character))
        text = f"a{character} {character}b\n{character}1"
        assert TOKENIZER.encode_batch([text]) == [of_library(text)]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "KNOWN", 50)
    encoder = PieceEncoder(LIBRARY)
    for verse in VERSE.split("\n\n")[:200]:
        assert encoder.encode(verse) == of_library(verse)
        assert len(encoder._known) <= max(50, len(set(pieces.PIECE.findall(verse))))


def test_a_piece_that_is_no_word_is_left_to_the_library() -> None:
    long = "a" * (pieces.LONGEST + 1)
    assert PieceEncoder(LIBRARY).encode(long) is None
    assert TOKENIZER.encode_batch(["ab", long]) == [of_library("ab"), of_library(long)]


def test_other_cuts_are_left_to_the_library() -> None:
    spec = json.loads(TOKENIZER._canonical)
    spec["pre_tokenizer"] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
    }  # fmt: skip
    other = Tokenizer(json.dumps(spec))
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    assert other._pieces is None
    text = "It's 1234\n\n  of them"
    assert other.encode_batch([text]) == [library.encode(text, add_special_tokens=False).ids]
