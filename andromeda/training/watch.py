"""Processes that wait for each other must not wait for ever: a thread in each says where all are, and ends its own."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from torch.distributed import Store

PACKAGE = Path(__file__).parents[1]
MOST_NAMED = 4  # processes in a message


class Place(NamedTuple):
    """Where a process was when its watch looked last.

    Attributes:
        seconds: of its clock. moves: how often it had moved. line: of its code.
    """

    seconds: float
    moves: int
    line: str


class Watch:
    """Ends the process when nothing has moved for as long as its patience.

    A process that waits cannot tell whether the other one is slow or hangs, and does not come back from a library's
    call; so all end, and whoever launched them may start them again.

    Args:
        store: shared by the processes, through a connection of this watch alone: a process that waits for an answer
            keeps its own busy.
        patience: seconds.
    """

    def __init__(self, store: Store, rank: int, ranks: int, patience: float) -> None:
        self._store, self._rank, self._ranks, self._patience = store, rank, ranks, patience
        self._main = threading.get_ident()
        self._moves = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def moved(self) -> None:
        """Told by whoever gets on; in each process the same number of times."""
        self._moves += 1

    @contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Within it another patience."""
        before = self._patience
        self._patience = seconds
        self.moved()
        try:
            yield
        finally:
            self._patience = before
            self.moved()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Within it the watch looks."""
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join(timeout=1)

    def _look(self) -> None:
        idle, seen = 0.0, -1
        while not self._ended.wait(pause := min(5.0, self._patience / 10)):
            # By looks, not by the clock: all processes may have been stopped for a while.
            idle = idle + pause if self._moves == seen else 0.0
            seen = self._moves
            with suppress(RuntimeError):  # the store ends with the launcher; whoever hangs must end too
                self._store.set(f"place/{self._rank}", json.dumps(Place(time.time(), seen, self._line())))
            if idle > self._patience:
                self._end()

    def _line(self) -> str:
        """That of this package, and that of the library it calls."""
        frame = sys._current_frames().get(self._main)
        stack = traceback.extract_stack(frame)
        ours = next((entry for entry in reversed(stack) if PACKAGE in Path(entry.filename).parents), stack[-1])
        lines = dict.fromkeys(f"{Path(entry.filename).name}:{entry.lineno}" for entry in (ours, stack[-1]))
        return ", ".join(lines)

    def _end(self) -> NoReturn:
        try:
            os.write(2, f"andromeda: error: {self._message()}\n".encode())
        finally:  # stderr may be closed
            os._exit(1)

    def _message(self) -> str:
        places = self._places()
        furthest = max(place.moves for place in places.values() if place)
        late = [rank for rank, place in places.items() if not place or self._is_silent(place) or place.moves < furthest]
        named = [self._described(rank, places[rank]) for rank in (late or list(places))[:MOST_NAMED]]
        return (
            f"process {self._rank} of {self._ranks}: nothing has moved for {self._patience:g} s; "
            f"{'behind' if late else 'all in the same step'}: {'; '.join(named)}"
        )

    def _places(self) -> dict[int, Place | None]:
        """Of all processes; None: it has never said."""
        places: dict[int, Place | None] = dict.fromkeys(range(self._ranks))
        places[self._rank] = Place(time.time(), self._moves, self._line())
        with suppress(RuntimeError):
            for rank in places:
                if rank != self._rank and self._store.check([f"place/{rank}"]):
                    places[rank] = Place(*json.loads(self._store.get(f"place/{rank}")))
        return places

    def _is_silent(self, place: Place) -> bool:
        return time.time() - place.seconds > self._patience / 2

    def _described(self, rank: int, place: Place | None) -> str:
        if place is None:
            return f"process {rank}, never heard of"
        if self._is_silent(place):
            return f"process {rank}, silent since {time.strftime('%H:%M:%S', time.localtime(place.seconds))}"
        return f"process {rank}, at {place.line}"
