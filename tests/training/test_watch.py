"""When nothing moves, the watch of each process says where all are, and ends it."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable

import pytest
from torch.distributed import HashStore, Store

from andromeda.training.watch import Place, Watch

PATIENCE = 0.3
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []

    def leave(code: int) -> None:
        assert code == 1
        raise SystemExit  # ends the watch's thread

    monkeypatch.setattr(os, "write", lambda descriptor, text: lines.append(text.decode()))
    monkeypatch.setattr(os, "_exit", leave)
    return lines


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def tell(store: Store, rank: int, place: Place) -> None:
    store.set(f"place/{rank}", json.dumps(place))


def test_whoever_moves_lives(said: list[str]) -> None:
    watch = Watch(HashStore(), 0, 1, PATIENCE)
    with watch.looking():
        for _ in range(20):
            time.sleep(PATIENCE / 10)
            watch.moved()
        with watch.patience(5.0):
            time.sleep(2 * PATIENCE)
        assert said == []
        until(lambda: said)
    assert "process 0 of 1: nothing has moved for 0.3 s; all in the same step: process 0, at test_watch.py:" in said[0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (None, r"behind: process 1, never heard of"),
        (lambda: Place(time.time() + 60, 4, "loop.py:1"), r"behind: process 1, at loop.py:1"),
        (lambda: Place(time.time() - 60, 5, "loop.py:1"), r"behind: process 1, silent since \d\d:\d\d:\d\d"),
        (
            lambda: Place(time.time() + 60, 5, "a.py:1"),
            r"in the same step: process 0, at test_watch.*; process 1, at a.py:1",
        ),
        (lambda: Place(time.time() + 60, 6, "a.py:1"), r"behind: process 0, at test_watch"),
    ],
    ids=["unknown", "late", "silent", "level", "ahead"],
)
def test_who_is_waited_for(said: list[str], other: Callable[[], Place] | None, message: str) -> None:
    store = HashStore()
    watch = Watch(store, 0, 2, PATIENCE)
    for _ in range(5):
        watch.moved()
    if other is not None:
        tell(store, 1, other())
    with watch.looking():
        until(lambda: said)
    assert len(said) == 1 and re.search(message, said[0]) and said[0].count("\n") == 1, said


def test_it_ends_without_a_store(said: list[str]) -> None:
    class Gone(HashStore):
        def set(self, *_: object) -> None:
            raise RuntimeError("Connection reset by peer")

        def check(self, *_: object) -> bool:
            raise RuntimeError("Connection reset by peer")

    watch = Watch(Gone(), 0, 2, PATIENCE)
    with watch.looking():
        until(lambda: said)
    assert "behind: process 1, never heard of" in said[0]


def test_a_process_that_leaves_is_not_ended(said: list[str]) -> None:
    watch = Watch(HashStore(), 0, 1, PATIENCE)
    with watch.looking():
        pass
    time.sleep(2 * PATIENCE)
    assert said == [] and "watch" not in [thread.name for thread in threading.enumerate()]
