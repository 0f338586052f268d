"""What may befall one of several processes. Each is called in the process before it begins, with its rank."""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from andromeda import checkpoint
from andromeda.commands import session, start
from andromeda.errors import AndromedaError
from andromeda.training.engines import Engine
from andromeda.training.loop import Loop
from andromeda.training.objective import Batch


def _at_step(step: int, action: Callable[[], object]) -> None:
    original = Loop.step

    def stepping(loop: Loop) -> None:
        if loop.state.step == step - 1:
            action()
        original(loop)

    patch.object(Loop, "step", stepping).start()


def comes_late(who: int, seconds: float, rank: int) -> None:
    if rank == who:
        time.sleep(seconds)


def sleeps(who: int, step: int, seconds: float, rank: int) -> None:
    if rank == who:
        _at_step(step, lambda: time.sleep(seconds))


def is_stopped(who: int, step: int, rank: int) -> None:
    """As by a debugger, or a machine that has gone."""
    if rank == who:
        _at_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def hangs_in_a_step(who: int, step: int, rank: int) -> None:
    """In the middle of one, where the others wait within the engine."""
    original = Engine.accumulate

    def accumulate(engine: Engine, *arguments: Any, **keys: Any) -> torch.Tensor:
        if steps[0] == step:
            time.sleep(3600)
        return original(engine, *arguments, **keys)

    steps = [0]
    if rank == who:
        _at_step(step, lambda: steps.__setitem__(0, step))
        patch.object(Engine, "accumulate", accumulate).start()


def has_no_gradient(who: int, step: int, rank: int) -> None:
    """One of its losses is no number."""

    def poisoned(engine: Engine, batch: Batch, divisor: Any, last: bool) -> torch.Tensor:
        if steps:
            steps.clear()
            divisor = divisor * math.nan
        return original(engine, batch, divisor, last)

    original, steps = Engine.accumulate, list[int]()
    if rank == who:
        _at_step(step, lambda: steps.append(step))
        patch.object(Engine, "accumulate", poisoned).start()


def has_no_space(name: str, rank: int) -> None:
    """The disk is full when a checkpoint is written."""
    save = checkpoint.save_checkpoint

    def full(directory: Path, *arguments: Any, **keys: Any) -> Any:
        def fails(_: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        return save(directory, *arguments, **{**keys, "files": fails} if directory.name == name else keys)

    patch.object(session, "save_checkpoint", full).start()


def reads_damage(who: int, name: str, rank: int) -> None:
    """What the others can read, it cannot."""
    load = checkpoint.load_checkpoint

    def damaged(path: Path) -> Any:
        if path.name == name:
            raise AndromedaError(f"{path}: cannot be read here")
        return load(path)

    if rank == who:
        patch.object(start, "load_checkpoint", damaged).start()
