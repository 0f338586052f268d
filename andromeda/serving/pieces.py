"""What comes of a request, whatever form its answer takes: pieces of its texts, and then their tokens counted."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from andromeda.inference.tool_calls import Delta
from andromeda.serving.requests import ChatRequest, CompletionRequest
from andromeda.serving.responses import FinishReason


@dataclass(frozen=True)
class Logprob:
    """A token that is part of the text, the natural logarithm of its probability, and the most probable ones there.

    Attributes:
        offset: characters of the text before it.
    """

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """What one of the texts has gained.

    Attributes:
        index: of the text among the choices.
        calls: of tools, or more of one.
        tokens: that were drawn for it, those of an end or a stop string too.
        finish_reason: of the last piece of a text.
    """

    index: int
    text: str = ""
    calls: tuple[Delta, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    tokens: int = 0
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Count:
    """Tokens, when all is said; each prompt counts once."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Service(Protocol):
    """What answers: a model here, or replicas elsewhere."""

    @property
    def alive(self) -> bool:
        """Whether it can answer at all, now or soon."""

    def answer(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Piece | Count, None]:
        """Pieces, those of several texts mixed, then one Count. Closed early, it gives back all that it held.

        Raises:
            ApiError: at the first piece for a request that cannot be answered; later if the model fails.
        """

    async def close(self) -> None:
        """Ends what still runs."""
