"""Tokens that are added to a vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from andromeda.errors import AndromedaError
from andromeda.tokenizer import Tokenizer

TEXT = "The sea is deep and wide, and the sea is cold. " * 3


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return Tokenizer.train([TEXT], 280, special_tokens=["<|endoftext|>"], tool_tokens=["<tools>"])


def test_a_tokenizer_for_chat_has_all_that_was_there_and_the_marks_behind(plain: Tokenizer, tmp_path: Path) -> None:
    chat = plain.for_chat()
    new = [chat.id_to_token(token) for token in range(plain.vocab_size, chat.vocab_size)]
    assert new == [
        "<|im_start|>", "<|im_end|>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    ]  # fmt: skip
    assert chat.encode(TEXT) == plain.encode(TEXT) and chat.eos_id == plain.eos_id
    ids, learned = chat.encode_chat_with_mask([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    assert (
        chat.decode([token for token, own in zip(ids, learned, strict=True) if own], skip_special=False)
        == "!<|im_end|>"
    )
    chat.save(tmp_path)
    assert Tokenizer.load(tmp_path).sha256 == chat.sha256
    with pytest.raises(AndromedaError, match="has a chat template already"):
        chat.for_chat()


def test_what_extends_a_vocabulary(plain: Tokenizer) -> None:
    assert plain.extends(plain) and plain.for_chat().extends(plain) and not plain.extends(plain.for_chat())
    other = Tokenizer.train([TEXT.upper()], 280, special_tokens=["<|endoftext|>"], tool_tokens=["<tools>"])
    assert not other.for_chat().extends(plain)


@pytest.mark.parametrize("change", ["renamed", "no longer special", "merged otherwise"])
def test_what_changes_a_token_that_was_there_extends_nothing(change: str, plain: Tokenizer) -> None:
    spec = json.loads(plain.for_chat()._canonical)
    first = spec["added_tokens"][0]
    if change == "renamed":
        first["content"] = "<|end|>"
    elif change == "no longer special":
        first["special"] = False
    else:
        spec["model"]["merges"].reverse()
    names = {"eos_token": None, "bos_token": None, "pad_token": None}
    assert not Tokenizer(json.dumps(spec), names).extends(plain)
