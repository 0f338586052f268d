"""An answer on its way: as one object or as a stream of events, given up as soon as its reader is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import asdict

from fastapi import Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from andromeda.serving.errors import ApiError
from andromeda.serving.forms import form_of
from andromeda.serving.guard import note
from andromeda.serving.jobs import Asked
from andromeda.serving.pieces import Count, Piece

EVENTS = "text/event-stream"
DONE = b"data: [DONE]\n\n"


class Answer(Response):
    """What a request gets, and all its work. An error before the first piece is raised, for a status of its own.

    Args:
        pieces: from a `Service`; closed whatever happens.
    """

    def __init__(self, asked: Asked, pieces: AsyncGenerator[Piece | Count, None]) -> None:
        super().__init__()
        self._asked, self._pieces, self._form = asked, pieces, form_of(asked)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._send_all(scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.wait((work, gone))
        if not work.cancelled():
            work.result()

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(_noted(self._pieces, scope)) as pieces:
            if not self._asked.stream:
                await (await self._whole(pieces))(scope, receive, send)
                return
            first = await anext(pieces)
            headers = [(b"content-type", f"{EVENTS}; charset=utf-8".encode()), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for event in self._events(first, pieces, scope):
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _whole(self, pieces: AsyncIterator[Piece | Count]) -> Response:
        found: list[Piece] = []
        async for piece in pieces:
            if isinstance(piece, Count):
                answer = self._form.whole(found, piece)
                return Response(answer.model_dump_json(), media_type="application/json")
            found.append(piece)
        raise ApiError(500, "the model gave no answer", code="engine_error")

    async def _events(
        self, first: Piece | Count, rest: AsyncIterator[Piece | Count], scope: Scope
    ) -> AsyncIterator[bytes]:
        """A failure is an event too, for the status has been sent."""
        try:
            for event in self._told(first):
                yield event
            async for piece in rest:
                for event in self._told(piece):
                    yield event
        except ApiError as error:
            note(scope, error=error)
            yield b"data: %s\n\n" % json.dumps(error.body()).encode()

    def _told(self, piece: Piece | Count) -> Iterator[bytes]:
        if isinstance(piece, Piece):
            yield from map(self._event, self._form.chunks(piece))
        elif self._asked.include_usage:
            yield self._event(self._form.last_chunk(piece))

    def _event(self, chunk: BaseModel) -> bytes:
        """Without what is null, but for what a reader looks for in every chunk."""
        values = chunk.model_dump(exclude_none=True)
        for choice in values["choices"]:
            choice.setdefault("finish_reason", None)
        if self._asked.include_usage:
            values.setdefault("usage", None)
        return b"data: %s\n\n" % json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()


async def _noted(pieces: AsyncGenerator[Piece | Count, None], scope: Scope) -> AsyncGenerator[Piece | Count, None]:
    """The same, with what the log is to say of them."""
    reasons: dict[str, int] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Count):
                note(scope, **asdict(piece), finish_reasons=reasons)
            elif piece.finish_reason is not None:
                reasons[piece.finish_reason] = reasons.get(piece.finish_reason, 0) + 1
            yield piece


async def _gone(receive: Receive) -> None:
    """Returns once the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass
