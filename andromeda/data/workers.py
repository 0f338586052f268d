"""One function over many batches, in several processes: results in order, few in memory, no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, TypeVar

from andromeda.errors import AndromedaError

B = TypeVar("B")
R = TypeVar("R")

HERE = 1 << 21  # bytes of work that are done in this process, before it pays to start others
AHEAD = 2  # batches for each process that wait, are worked on, or are done and wait for their turn


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers(Generic[B, R]):
    """Calls a function for batches. What it gives does not depend on the number of processes.

    Args:
        function: can be pickled; each process gets it once. What it gives follows from the batch alone.
        number: of processes; with one, all is done in this process.
    """

    def __init__(self, function: Callable[[B], R], number: int) -> None:
        self._function, self._number = function, number
        self._left = HERE
        self._pool: ProcessPoolExecutor | None = None
        self._others: set[Any] = set()

    def __enter__(self) -> Workers[B, R]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if kind is not None:  # a batch can take long, and nobody waits for it
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, batches: Iterator[tuple[B, int]]) -> Iterator[R]:
        """Results in the order of the batches, each given with its size in bytes.

        Raises:
            AndromedaError: what the function raises of the first batch for which it does, or making batches; or a
                process died.
        """
        waiting: deque[Future[R]] = deque()
        failed: AndromedaError | None = None
        while True:
            try:
                batch, size = next(batches)
            except StopIteration:
                break
            except AndromedaError as error:  # comes after the results of the batches before
                failed = error
                break
            if self._number == 1 or (self._pool is None and size <= self._left):
                self._left -= size
                yield self._function(batch)
                continue
            waiting.append(self._submitted(batch))
            if len(waiting) >= AHEAD * self._number:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
        if failed is not None:
            raise failed

    def _submitted(self, batch: B) -> Future[R]:
        if self._pool is None:
            self._others = set(multiprocessing.active_children())
            self._pool = ProcessPoolExecutor(
                self._number,
                multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(self._function, self._number > 1),
            )  # fork would copy locks that threads of the tokenizer or of a progress bar hold
        try:
            with _undisturbed():
                return self._pool.submit(_work, batch)
        except BrokenProcessPool as error:
            raise _died() from error


def apart(function: Callable[[], R], size: int, number: int) -> R:
    """Calls a function in a process of its own, which ends, and so gives back all the memory that it took.

    Args:
        function: can be pickled, and what it gives too.
        size: of its work, in bytes; if it is little, it is done in this process.
        number: of processes that there may be; with one, it is this.

    Raises:
        AndromedaError: what the function raises, or the process died.
    """
    if number == 1 or size <= HERE:
        return function()
    with Workers[Callable[[], R], R](_called, 1) as workers:
        return _result(workers._submitted(function))


def _called(function: Callable[[], R]) -> R:
    return function()


def _result(future: Future[R]) -> R:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _died() from error


def _died() -> AndromedaError:
    return AndromedaError(
        "a worker process died, killed perhaps because memory ran out; run the same command again to go on, with "
        "--workers 1 for the least memory"
    )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits until a process that is started within is known, and that one never hears of it."""
    waiting: list[int] = []
    handler: Any = None
    if threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # which the process inherits
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if waiting:
            signal.raise_signal(signal.SIGINT)


# ---- in a worker ---------------------------------------------------------------------------------

_function: Callable[[Any], Any]


def _begin(function: Callable[[Any], Any], one_of_several: bool) -> None:
    global _function
    _function = function
    if one_of_several:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is enough
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed ends nothing, and a worker would wait for batches for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(batch: Any) -> Any:
    return _function(batch)
