"""Starts the processes of `andromeda train` as torchrun does, and again when they have died.

They are forks, and take a second where torchrun takes ten. Like torchrun's, the store through which they find each
other outlives them, with all that they wrote.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore

from andromeda.cli import main
from tests.commands.quick_training import quick_training
from tests.forks import forks

PATIENCE = 120.0  # seconds

Fault = Callable[[int], object]  # (rank): called in each process before it begins


class Launched:
    """The processes of one start; what each says is in `logs`."""

    def __init__(self, processes: list[BaseProcess], logs: list[Path]) -> None:
        self.processes, self.logs = processes, logs

    def said(self) -> str:
        return "".join(log.read_text() for log in self.logs)

    def codes(self) -> list[int]:
        """Exit codes, when all have ended; -9 of a killed one."""
        end = time.monotonic() + PATIENCE
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        assert None not in codes, f"{codes}: {self.said()}"
        return [code for code in codes if code is not None]

    def finish(self) -> str:
        """What they said; none has failed."""
        codes = self.codes()
        assert set(codes) == {0}, f"{codes}: {self.said()}"
        return self.said()


class Launcher:
    """Args: folder: for what the processes say."""

    def __init__(self, folder: Path, processes: int = 2) -> None:
        self.folder, self.ranks = folder, processes
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._starts = 0

    def __call__(self, recipe: Path, *overrides: str, fault: Fault | None = None) -> Launched:
        return self._launch([self.environment(rank) for rank in range(self.ranks)], recipe, overrides, fault)

    def one(self, recipe: Path, *overrides: str) -> Launched:
        """A process by itself."""
        return self._launch([{}], recipe, overrides, None)

    def _launch(
        self, environments: list[dict[str, str]], recipe: Path, overrides: tuple[str, ...], fault: Fault | None
    ) -> Launched:
        self._starts += 1
        arguments = ["train", str(recipe), *overrides]
        logs = [self.folder / f"start-{self._starts}-rank-{rank}.log" for rank in range(len(environments))]
        processes = [
            forks().Process(target=_run, args=(environment, arguments, log, fault), daemon=True)
            for environment, log in zip(environments, logs, strict=True)
        ]
        for process, log in zip(processes, logs, strict=True):
            log.touch()
            process.start()
        return Launched(list(processes), logs)

    def environment(self, rank: int) -> dict[str, str]:
        """What torchrun tells a process."""
        return {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip


def _run(environment: dict[str, str], arguments: list[str], log: Path, fault: Fault | None) -> None:
    gc.freeze()  # as in tests/ranks.py
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= environment
    with quick_training():
        if fault is not None:
            fault(int(environment.get("RANK", "0")))
        sys.exit(main(arguments))
