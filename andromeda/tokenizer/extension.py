"""A vocabulary with tokens added: what a model that goes on with it knows already, and what is new to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken

from andromeda.tokenizer.files import parsed


def with_tokens(text: str, special: Sequence[str], visible: Sequence[str], source: str) -> str:
    """A tokenizer.json with these control tokens behind all that it has, those apart that it has already.

    Args:
        special: left out by decoding. visible: shown.
    """
    tokenizer = parsed(text, source)
    for names, is_special in ((special, True), (visible, False)):
        missing = [name for name in names if tokenizer.token_to_id(name) is None]
        tokens = [AddedToken(name, normalized=False, special=is_special) for name in missing]
        if is_special:
            tokenizer.add_special_tokens(tokens)
        else:
            tokenizer.add_tokens(tokens)
    return tokenizer.to_str()


def extends(text: str, other: str) -> bool:
    """Whether one tokenizer.json is another with no more than added tokens, all behind the other's ids.

    Args:
        text, other: in canonical form.
    """
    ours, theirs = json.loads(text), json.loads(other)
    added, before = _by_id(ours.pop("added_tokens")), _by_id(theirs.pop("added_tokens"))
    known = {*before, *_ids(theirs["model"]["vocab"])}
    new = added.keys() - before.keys()
    return (
        ours == theirs
        and all(added.get(place) == token for place, token in before.items())
        and (not new or min(new) > max(known, default=-1))
    )


def _by_id(added: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {token["id"]: token for token in added}


def _ids(vocab: Any) -> list[int]:
    return list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
