"""What training reports: a JSON object a line, and floating-point operations a second, achieved and possible."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from andromeda.atomic import replace_file
from andromeda.errors import AndromedaError
from andromeda.model import Andromeda

# In a line of metrics.jsonl; all its other values are the same for every run of a recipe on one machine.
TIMINGS = (
    "seconds", "tokens_per_second", "flops_per_second", "possible_flops_per_second", "peak_host_bytes",
    "peak_device_bytes",
)  # fmt: skip

BACKWARD_AND_FORWARD = 3  # the backward pass makes two products for each of the forward pass
PEAK_SECONDS = 0.3
PEAK_SIZE = {"cpu": 1024, "cuda": 8192}  # rows of the square matrices


class MetricsFile:
    """metrics.jsonl, one object for each step that is logged.

    What finds no room on the disk is kept, and written when there is some.

    Args:
        step: where training goes on; lines beyond it, and one that a kill cut short, are dropped.

    Raises:
        AndromedaError: another line is damaged, or the file cannot be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = "".join(_line(line) for line in read_metrics(path) if line["step"] <= step).encode()
        try:
            replace_file(path, kept)
            self._file = path.open("r+b", buffering=0)
        except OSError as error:
            raise AndromedaError(f"{path}: cannot be written: {error.strerror}; free space") from error
        self._lines: list[bytes] = []  # since all were on the disk last
        self._written = 0  # of these lines
        self._end = self._synced = len(kept)  # bytes: of whole lines, and of those on the disk

    def write(self, values: dict[str, Any]) -> None:
        """Raises AndromedaError where it cannot be written now; it is kept then."""
        self._lines.append(_line(values).encode())
        self._write()

    def sync(self) -> None:
        """On the disk, before a checkpoint that counts on it. Raises AndromedaError where that cannot be."""
        if not self._lines:
            return
        self._write()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:  # after which the kernel may have dropped all that was written since the last time
            self._written, self._end = 0, self._synced
            raise self._failed(error) from error
        self._lines, self._written, self._synced = [], 0, self._end

    def close(self) -> None:
        with suppress(AndromedaError):  # told when it failed first
            self._write()
        self._file.close()

    def _write(self) -> None:
        try:
            for line in self._lines[self._written :]:
                done = 0  # over what an attempt that failed has left of it
                while done < len(line):
                    done += os.pwrite(self._file.fileno(), line[done:], self._end + done)
                self._written, self._end = self._written + 1, self._end + done
        except OSError as error:
            with suppress(OSError):  # for whoever reads meanwhile
                self._file.truncate(self._end)
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> AndromedaError:
        step = json.loads(self._lines[self._written])["step"]
        return AndromedaError(
            f"{self._path}: cannot be written: {error.strerror}; free space: what was measured from step {step:,} on "
            "is not in it"
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines that are there; a last one that was cut short is none.

    Raises:
        AndromedaError: another line is damaged.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith(b"\n")]
    except ValueError as error:
        raise AndromedaError(f"{path}: holds a line that is not JSON ({error}); remove that line") from error


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"


# ---- memory --------------------------------------------------------------------------------------


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes that this process has had at once at most, of the host's memory, and of its device's where it has one."""
    found = {"peak_host_bytes": peak_resident_bytes()}
    if device.type == "cuda":
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def peak_resident_bytes() -> int:
    """The kernel's own account where it gives one: ru_maxrss begins with the size of the parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(row.split()[1]) for row in status.read_text().splitlines() if row.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- achieved and possible -----------------------------------------------------------------------


@dataclass(frozen=True)
class Meter:
    """What turns losses and times into the figures of a line of metrics."""

    bytes_per_token: float  # of the training data
    flops_per_token: Callable[[int], float]  # of a sequence length
    possible_flops_per_second: float


def training_flops_per_token(model: Andromeda, seq_len: int) -> float:
    """Operations that a training step needs for a token, at the windows that the weights certify now.

    What a certified window leaves out is not counted, nor is what is computed twice.
    """
    config = model.config
    products = config.flops_per_token(seq_len).products
    attention = 0.0
    for block in model.blocks:
        windows = block.attention.windows()
        limits = None if windows is None else windows.tolist()
        attention += config.flops_per_token(seq_len, limits).attention / config.depth
    return BACKWARD_AND_FORWARD * (products + attention)


def possible_flops_per_second(device: torch.device, precision: torch.dtype) -> float:
    """The best of many large matrix products on this device: what training is measured against."""
    size = PEAK_SIZE.get(device.type, PEAK_SIZE["cpu"])
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(precision) for _ in range(2))
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < PEAK_SECONDS or best == float("inf"):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
