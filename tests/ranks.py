"""Processes that take part in a process group, for tests of what is spread over many. They serve many tests."""

from __future__ import annotations

import datetime
import gc
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.forks import forks

PATIENCE = datetime.timedelta(seconds=120)  # for a rank that does not come
AFTER_A_FAILURE = 2.0  # seconds; the others may fail alike, or wait for the one that did


class Ranks:
    """Calls functions on several processes joined by gloo, all of them or the first few.

    What is called must be importable, takes the process group first, and returns what can be pickled but no tensors.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder = count, folder
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._starts = 0

    def __call__(self, function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        """What the function returns on ranks 0..size - 1. An exception on one is raised here, with its traceback."""
        if not self._processes:
            self._start()
        for connection in self._connections[:size]:
            connection.send((function, size, args))
        answers: dict[int, Any] = {}
        failures: list[str] = []
        waiting = dict(enumerate(self._connections[:size]))
        while waiting:
            ready = wait(waiting.values(), AFTER_A_FAILURE if failures else PATIENCE.total_seconds() * 2)
            if not ready:
                failures.append(f"ranks {sorted(waiting)} do not answer")
                break
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                good, answer = _receive(waiting.pop(rank))
                if good:
                    answers[rank] = answer
                else:
                    failures.append(f"rank {rank} of {size}:\n{answer}")
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return [answers[rank] for rank in range(size)]

    def _start(self) -> None:
        context = forks()
        self._starts += 1
        store = self.folder.resolve() / f"store-{self._starts}"
        for rank in range(self.count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, store, rank, self.count), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)

    def close(self) -> None:
        """Ends the processes; the next call starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []


def _receive(connection: Connection) -> tuple[bool, Any]:
    try:
        return connection.recv()
    except EOFError:
        return False, "the process has died"


def _serve(connection: Connection, store: Path, rank: int, count: int) -> None:
    gc.freeze()  # what was imported is not garbage; DeepSpeed has all looked through again and again
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store.as_uri(), timeout=PATIENCE, rank=rank, world_size=count)
    groups = [dist.new_group(list(range(size))) for size in range(1, count + 1)]
    while True:
        try:
            function, size, args = connection.recv()
        except EOFError:  # whoever asks is gone
            return
        try:
            answer = True, function(groups[size - 1], *args)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send(answer)
