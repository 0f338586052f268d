"""No text becomes a control token."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from andromeda.errors import AndromedaError

MARKUP = re.compile(r"[<\[{].*[>\]}]", re.DOTALL)


def control_tokens(added: Iterable[Mapping[str, Any]]) -> tuple[dict[str, int], dict[str, int]]:
    """Added tokens that no text may become: those that decoding hides, and marks that it shows (Qwen's `<tool_call>`).

    Words and blanks that were added to a vocabulary stay ordinary text.
    """
    special, visible = {}, {}
    for token in added:
        if token["special"]:
            special[token["content"]] = token["id"]
        elif MARKUP.fullmatch(token["content"]):
            visible[token["content"]] = token["id"]
    return special, visible


class PlainEncoder:
    """The same tokenizer with its control tokens under names that nobody can guess.

    So no text becomes a control token, whatever the model (`encode_special_tokens` of the library does not stop a
    Unigram model, or a BPE with ignore_merges, from finding `</s>` in its vocabulary), while a chat template's tokens
    are put in by those names, in one pass with the text around them.
    """

    def __init__(self, spec: Mapping[str, Any], control: Mapping[str, int], source: str) -> None:
        secret = secrets.token_hex(16)
        self.names = {name: f"{secret}{number:06x}" for number, name in enumerate(control)}
        self.start_name, self.end_name = f"{secret}start", f"{secret}end"
        self.encoder = tokenizers.Tokenizer.from_str(json.dumps(renamed(spec, self.names), ensure_ascii=False))
        borders = [AddedToken(name, normalized=False, special=True) for name in (self.start_name, self.end_name)]
        self.encoder.add_special_tokens(borders)
        self.start_id, self.end_id = (self.encoder.token_to_id(name) for name in (self.start_name, self.end_name))
        expected = {self.names.get(token["content"], token["content"]): token["id"] for token in spec["added_tokens"]}
        for name, token_id in expected.items():
            if self.encoder.token_to_id(name) != token_id:
                raise AndromedaError(f"{source}: added token {token_id} cannot be told from ordinary text")


def renamed(spec: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer.json in which some added tokens have other names, in the model's vocabulary as well."""
    model = dict(spec["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if not (left in names or right in names or left + right.removeprefix(prefix) in names)
        ]
    plainly = {"normalized": False, "single_word": False}
    added = [
        {**token, "content": names[token["content"]], **plainly} if token["content"] in names else token
        for token in spec["added_tokens"]
    ]
    return {**spec, "model": model, "added_tokens": added, "post_processor": None}
