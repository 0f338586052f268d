"""Being asked to stop: the step under way is finished, and what is there is saved."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
NOTICE = b"stopping after this step; once more to stop at once\n"


class StopRequest:
    """`received`: the signal, once it has come."""

    received: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.received is not None


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Takes SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (a scheduler's notice), and says so on stderr.

    A second one stops at once. Only in the main thread.
    """
    request = StopRequest()

    def receive(number: int, _: FrameType | None) -> None:
        request.received = signal.Signals(number)
        for name in before:
            signal.signal(name, before[name])
        with suppress(OSError, ValueError):  # stderr is closed, or no file
            os.write(sys.stderr.fileno(), NOTICE)  # print() must not be entered twice

    before = {name: signal.getsignal(name) for name in SIGNALS}
    for name in before:
        signal.signal(name, receive)
    try:
        yield request
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
