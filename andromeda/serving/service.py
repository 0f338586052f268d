"""One model behind an engine: requests in, pieces of their texts out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from time import monotonic
from types import TracebackType
from typing import Self, cast

from andromeda.errors import AndromedaError
from andromeda.inference.engine.request import Backend, Request, Update
from andromeda.inference.grammar import Grammars
from andromeda.serving.errors import ApiError, bad_request
from andromeda.serving.jobs import Asked, Job, job_of
from andromeda.serving.limits import Limits
from andromeda.serving.pieces import Count, Piece
from andromeda.serving.writer import Writer
from andromeda.tokenizer import Tokenizer

LOG = logging.getLogger(__name__)


class LocalService:
    """A `Service` whose model is here.

    Args:
        backend: the engine.
        limits: of which those of tokens and of a request's time are kept here.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer, limits: Limits) -> None:
        self.backend, self._limits = backend, limits
        self._tokenizer, self._grammars = tokenizer, Grammars(tokenizer)

    async def answer(self, asked: Asked) -> AsyncGenerator[Piece | Count, None]:
        """See `Service.answer`. When the time of a request is up its texts end as they are, by `length`."""
        deadline = monotonic() + self._limits.request_seconds
        job = await asyncio.to_thread(self._job, asked)  # to tokenize can take long
        writers = [Writer(index, self._tokenizer, job.stops, job.calls) for index in range(len(job.requests))]
        cached = [0] * len(writers)
        async with _Streams(self.backend, job.requests) as streams:
            while not all(writer.ended for writer in writers):
                try:
                    index, update = await streams.next(deadline)
                except TimeoutError:
                    break
                if writers[index].ended:  # what was written behind its stop string, before the engine heard of that
                    continue
                if update.finish_reason == "error":
                    raise ApiError(500, update.error or "the model failed", code="engine_error")
                cached[index] = max(cached[index], update.cached_tokens)
                piece = writers[index].push(update)
                if writers[index].ended:
                    streams.close(index)
                yield piece
        written = sum(writer.tokens for writer in writers)
        if not written:
            raise ApiError(503, "the server is too busy to begin in time; try again later", retry_after=60)
        for writer in writers:
            if not writer.ended:
                yield writer.cut()
        yield Count(job.prompt_tokens, sum(cached[:: asked.n or 1]), written)

    @property
    def alive(self) -> bool:
        """Whether the engine is."""
        return self.backend.alive

    async def close(self) -> None:
        """Ends what still runs, and the engine."""
        await self.backend.close()

    def _job(self, asked: Asked) -> Job:
        try:
            job = job_of(asked, self._tokenizer, self._grammars, self._limits)
            for request in job.requests:
                self.backend.check(request)
        except AndromedaError as error:
            raise bad_request(str(error)) from error
        return job


class _Streams:
    """Several requests with the engine at once; whatever of them is left on exit is ended."""

    def __init__(self, backend: Backend, requests: Sequence[Request]) -> None:
        self._backend, self._requests = backend, requests
        self._arrivals: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._read(*item)) for item in enumerate(self._requests)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def next(self, deadline: float) -> tuple[int, Update]:
        """What comes next, and of which request. Raises TimeoutError at the deadline, in `monotonic` seconds."""
        if monotonic() >= deadline:  # what is there already would be had in no time
            raise TimeoutError
        async with asyncio.timeout(deadline - monotonic()):
            return await self._arrivals.get()

    def close(self, index: int) -> None:
        self._tasks[index].cancel()

    async def _read(self, index: int, request: Request) -> None:
        updates = cast(AsyncGenerator[Update, None], self._backend.stream(request))
        last = None
        try:
            async with aclosing(updates):
                async for last in updates:
                    self._arrivals.put_nowait((index, last))
        except Exception:  # whatever it is, the client has to hear of it
            LOG.exception("engine failed")
            last = None
        if last is None or last.finish_reason is None:
            self._arrivals.put_nowait((index, Update((), "error", error="the model failed")))
