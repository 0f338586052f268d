"""How much a client may ask for, and how long the server waits for it."""

from __future__ import annotations

from dataclasses import dataclass

MEBIBYTE = 2**20
BODY_BYTES_PER_TOKEN = 16  # of a prompt as JSON, at most, about: text is 4 to 6, ids with their commas are 7


@dataclass(frozen=True)
class Limits:
    """What is beyond is refused with an error that says so, or ended.

    Attributes:
        max_context_tokens: of a prompt and what is written after it.
        max_output_tokens: of one text, and what is written where a conversation sets no bound of its own.
        max_texts: that are written or wait to be, each of a request's choices counted; beyond: 429.
        request_seconds: from its arrival until a request ends, with what is written by then.
        client_seconds: until a request has come in full, and for a client to take what is sent.
        max_connections: further ones are closed at once.
    """

    max_context_tokens: int = 131_072
    max_output_tokens: int = 4096
    max_texts: int = 256
    request_seconds: float = 600.0
    client_seconds: float = 20.0
    max_connections: int = 1024

    @property
    def max_body_bytes(self) -> int:
        return MEBIBYTE + BODY_BYTES_PER_TOKEN * self.max_context_tokens
