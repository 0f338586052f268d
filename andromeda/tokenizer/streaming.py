"""Ids one at a time to text that is ready to be shown, in whole characters."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class StreamDecoder(Protocol):
    """Ids one at a time to text that is ready to be shown. The pieces, joined, are what `decode` gives for all ids."""

    def step(self, token_id: int) -> str:
        """Text that this id completes, often none. Raises AndromedaError for an id out of range."""

    def flush(self) -> str:
        """What is left at the end: a replacement character where the text stops inside a character."""


class ByteStream:
    """Byte-level vocabularies: every id is some bytes, and UTF-8 can be decoded as it comes.

    Args:
        token: an id's spelling in the vocabulary; empty for one that is not shown.
    """

    def __init__(self, token: Callable[[int], str]) -> None:
        self._token = token
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token_id: int) -> str:
        return self._decoder.decode(spelt_bytes(self._token(token_id)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class TokenStream:
    """Other vocabularies: decode the ids since the last piece, behind those of the last piece.

    A run of single bytes (`<0xE2>`) is held until it ends, for one wrong byte spoils the whole run. (There the
    library's own DecodeStream gives wrong text or raises, tokenizers 0.23.)

    Args:
        token: as for ByteStream.
        decode: the text of ids.
    """

    def __init__(self, token: Callable[[int], str], decode: Callable[[list[int]], str]) -> None:
        self._token, self._decode = token, decode
        self._shown: list[int] = []
        self._pending: list[int] = []

    def step(self, token_id: int) -> str:
        token = self._token(token_id)
        if not token:
            return ""
        self._pending.append(token_id)
        return "" if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token) else self.flush()

    def flush(self) -> str:
        before, after = (self._decode(ids) for ids in (self._shown, self._shown + self._pending))
        self._shown, self._pending = self._pending, []
        return after[len(before) :]


def is_byte_level(decoder: Mapping[str, Any] | None) -> bool:
    """Of the `decoder` of a tokenizer.json: whether ByteStream is for it."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    return [step["type"] for step in steps if step["type"] != "Fuse"] == ["ByteLevel"]


def _byte_characters() -> dict[str, int]:
    """What stands for each byte in a byte-level vocabulary: itself if it can be seen, else a character from 256 up.

    Source: GPT-2's encoder.py.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + number): byte for number, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_characters()


def spelt_bytes(token: str) -> bytes:
    """What a token of a byte-level vocabulary stands for."""
    if all(character in BYTE_OF_CHARACTER for character in token):
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    return token.encode()  # an added token, spelt as text
