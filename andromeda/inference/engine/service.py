"""The engine as a server sees it: a thread of its own on one side, asyncio on the other (`request.Backend`)."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import torch

from andromeda.errors import AndromedaError
from andromeda.inference.engine.engine import Engine
from andromeda.inference.engine.request import Request, Stats, Update

LOG = logging.getLogger(__name__)
CLOSED = Update((), "error", error="engine: it was closed before the text ended; start it again")


@dataclass(eq=False)
class _Stream:
    """Where one request's updates go."""

    loop: asyncio.AbstractEventLoop
    updates: asyncio.Queue[Update]
    number: int | None = None  # of the engine's, once it has the request


class Service:
    """Runs an engine in a thread, which nobody else may touch from now on.

    Between two steps the thread does what was asked of it meanwhile: a request begins with the next step, and one that
    is given up has given back its pages before it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._asked: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[int, _Stream] = {}
        self._stats = engine.stats()
        self._closing = False
        self._lock = threading.Lock()  # nothing is asked once it is closing
        self._cpu_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes requests: until it is closed, or its thread has failed."""
        return not self._closing

    @property
    def max_tokens(self) -> int:
        """That one text may have, prompt and new ones."""
        return self._engine.max_tokens

    def check(self, request: Request) -> None:
        """Raises AndromedaError for what could never be answered, such as a prompt that the cache cannot hold."""
        self._engine.check(request)

    async def stream(self, request: Request) -> AsyncIterator[Update]:
        """Updates as they come. An iterator that is closed early gives back all that its request held.

        Raises:
            AndromedaError: as of `check`, or a service that is closed.
        """
        self.check(request)
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        with self._lock:
            if self._closing:
                raise AndromedaError("engine: it is closed and takes no requests; start it again")
            self._asked.put(lambda: self._add(stream, request))
        ended = False
        try:
            while not ended:
                update = await stream.updates.get()
                ended = update.finish_reason is not None
                yield update
        finally:
            if not ended:
                self._asked.put(lambda: self._abort(stream))

    def stats(self) -> Stats:
        """As of the last step."""
        return self._stats

    async def close(self) -> None:
        """Ends what still runs, each with an error, and the engine's thread. It may be called again."""
        with self._lock:
            self._closing = True
        self._asked.put(lambda: None)  # wakes the thread
        await asyncio.to_thread(self._thread.join)

    # ---- in the engine's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._cpu_threads)  # which OpenMP counts by thread
        try:
            while not self._closing:
                self._do_what_was_asked()
                updates = self._engine.step()
                self._stats = self._engine.stats()  # before those who wait for an update can ask
                self._deliver(updates)
        finally:  # whatever happens, nobody waits for ever
            with self._lock:
                self._closing = True
            self._do_what_was_asked()
            self._deliver([(number, CLOSED) for number in self._streams])
            self._engine.close()
            self._stats = self._engine.stats()

    def _do_what_was_asked(self) -> None:
        """All of it; waits for something where there is nothing else to do."""
        wait = not self._engine.busy and not self._closing
        while True:
            try:
                self._asked.get(block=wait)()
            except queue.Empty:
                return
            wait = False

    def _add(self, stream: _Stream, request: Request) -> None:
        try:
            stream.number = self._engine.add(request)
        except Exception as error:  # such as no memory; others go on
            LOG.exception("a request could not be taken")
            update = Update((), "error", error=f"engine: the request could not be taken: {type(error).__name__}")
            self._send(stream.loop, [(stream, update)])
        else:
            self._streams[stream.number] = stream

    def _abort(self, stream: _Stream) -> None:
        if stream.number is not None and self._streams.pop(stream.number, None) is not None:
            self._engine.abort(stream.number)
            self._stats = self._engine.stats()

    def _deliver(self, updates: list[tuple[int, Update]]) -> None:
        """One call of each event loop, for all of its streams."""
        of_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Update]]] = {}
        for number, update in updates:
            stream = self._streams[number]
            of_loop.setdefault(stream.loop, []).append((stream, update))
        for number, update in updates:
            if update.finish_reason is not None:
                del self._streams[number]
        for loop, those in of_loop.items():
            self._send(loop, those)

    def _send(self, loop: asyncio.AbstractEventLoop, those: list[tuple[_Stream, Update]]) -> None:
        try:
            loop.call_soon_threadsafe(_put_all, those)
        except RuntimeError:  # the loop is closed: nobody reads them
            for stream, _ in those:
                self._abort(stream)


def _put_all(updates: list[tuple[_Stream, Update]]) -> None:
    for stream, update in updates:
        stream.updates.put_nowait(update)
