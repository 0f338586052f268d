"""Being asked to stop: the step under way is finished, and what is there is saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """`received`: the signal, once it has come."""

    received: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.received is not None


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Takes SIGTERM and SIGINT (Ctrl-C). A second one stops at once. Only in the main thread."""
    request = StopRequest()

    def receive(number: int, _: FrameType | None) -> None:
        request.received = signal.Signals(number)
        for name in before:
            signal.signal(name, before[name])

    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    for name in before:
        signal.signal(name, receive)
    try:
        yield request
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
