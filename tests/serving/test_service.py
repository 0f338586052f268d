"""From an engine's updates to the pieces of an answer, where these come faster than they are read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from andromeda.inference.engine.request import Request, Stats, Token, Update
from andromeda.serving.limits import Limits
from andromeda.serving.pieces import Count, Piece
from andromeda.serving.requests import CompletionRequest
from andromeda.serving.service import LocalService
from andromeda.tokenizer import Tokenizer
from tests.serving.conftest import NAME


class Ahead:
    """An engine whose updates are all there before the first is read."""

    alive = True

    def __init__(self, texts: Sequence[Sequence[Update]]) -> None:
        self._texts = iter(texts)

    def check(self, request: Request) -> None:
        """Takes anything."""

    async def stream(self, request: Request) -> AsyncIterator[Update]:
        for update in next(self._texts):
            yield update

    def stats(self) -> Stats:
        return Stats()

    async def close(self) -> None:
        """Nothing runs."""


def written(tokenizer: Tokenizer, text: str, last: Update) -> list[Update]:
    return [*(Update((Token(token),)) for token in tokenizer.encode(text)), last]


async def read(service: LocalService, pause_seconds: float = 0.0, **asked: object) -> tuple[list[Piece], Count]:
    pieces: list[Piece] = []
    async for piece in service.answer(CompletionRequest.model_validate({"model": NAME, "prompt": "a", **asked})):
        if isinstance(piece, Count):
            return pieces, piece
        pieces.append(piece)
        await asyncio.sleep(pause_seconds)
    raise AssertionError("there is no count")


@pytest.mark.parametrize("last", [Update((), "length"), Update((), "error", error="too late")])
def test_what_was_written_behind_a_stop_string_is_no_part_of_the_answer(tokenizer, last):
    texts = [written(tokenizer, "sea! said: 日本語", last), written(tokenizer, "the sea", Update((), "length"))]
    service = LocalService(Ahead(texts), tokenizer, Limits())
    pieces, count = asyncio.run(read(service, n=2, stop="!"))
    assert [(piece.index, piece.finish_reason) for piece in pieces if piece.finish_reason] == [
        (0, "stop"),
        (1, "length"),
    ]
    assert "".join(piece.text for piece in pieces if piece.index == 0) == "sea"
    assert count.completion_tokens == sum(piece.tokens for piece in pieces)


def test_a_request_has_its_time_though_an_update_is_always_there(tokenizer):
    texts = [[Update((Token(5),))] * 1000]
    service = LocalService(Ahead(texts), tokenizer, Limits(request_seconds=0.02))
    pieces, count = asyncio.run(read(service, pause_seconds=0.001, max_tokens=1000))
    assert pieces[-1].finish_reason == "length" and 0 < count.completion_tokens < 500
