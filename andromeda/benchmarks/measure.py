"""What all benchmarks share: clocks, the ceilings of the same run, and the facts of the machine."""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter, sleep
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
GIB = 2**30
ROOT = Path(__file__).parents[2]

LONG = 5e3  # milliseconds: one call that takes longer is enough of each kind

Report = dict[str, Any]
Save = Callable[[Report], None]  # called after each row, so that what is interrupted has not been in vain


class WrongResultError(RuntimeError):
    """What should have been timed computes something else."""


def require(what: str, error: float, limit: float) -> None:
    """Before timing.

    Raises:
        WrongResultError: the error is not below the limit.
    """
    if not error < limit:
        raise WrongResultError(f"{what}: the error is {error:.1e}, not below {limit:.1e}; no speed is reported")


class Deadline:
    """So many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end = seconds, monotonic() + seconds

    def over(self) -> bool:
        return monotonic() > self.end


# ---- clocks --------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], Any], budget: float = 0.5, most: int = 50) -> float:
    """The median of `times`."""
    return median(times(run, budget, most))


def times(run: Callable[[], Any], budget: float = 0.5, most: int = 50, apart: bool = False) -> list[float]:
    """Milliseconds of each of at least 3 calls, as many as fit in about `budget` seconds, after one or two to warm up.
    Of one call where it is LONG.

    By CUDA events where there is a GPU, and by the clock on the wall where not.

    Args:
        run: what is called.
        budget: seconds.
        most: calls at most.
        apart: each call begins when the one before has ended, so that the time to launch it counts.
    """
    run()
    (once,) = clocked(run, 1)
    if once > LONG:
        return [once]
    if 3 * once > 1e3 * budget:
        return [once, *clocked(run, 2)]
    count = max(3, min(most, int(1e3 * budget / max(once, 1e-2))))
    return [clocked(run, 1)[0] for _ in range(count)] if apart else clocked(run, count)


def clocked(run: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds of each of `count` calls, one queued behind the other."""
    if not CUDA:
        return [_seconds(run) * 1e3 for _ in range(count)]
    torch.cuda.synchronize()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def rested(run: Callable[[], Any], count: int = 5, pause: float = 0.3) -> float:
    """The median of `count` calls, each after a pause: a card under load lowers its clock to stay within its power.
    Of one call where it is LONG.
    """
    found: list[float] = []
    while len(found) < count and not (found and found[0] > LONG):
        sleep(pause if CUDA else 0.0)
        found += clocked(run, 1)
    return median(found)


def _seconds(run: Callable[[], Any]) -> float:
    began = perf_counter()
    run()
    return perf_counter() - began


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a CUDA graph of a call: its kernels without the time to launch them from Python."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def by_kernel(run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each kernel of one call, by name."""
    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / 3e3 for event in profiler.key_averages()}


def in_processes(call: Callable[[Any], Any], cases: Sequence[Any]) -> None:
    """Fills the compiler's cache, which one process does with one core: each case once, in as many as there are."""
    workers = min(12, os.cpu_count() or 1, len(cases))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(call, cases))


# ---- memory --------------------------------------------------------------------------------------


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """What a call allocates at most beyond what was there before; None without a GPU."""
    if not CUDA:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def release() -> None:
    """Gives back what nobody holds."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


# ---- ceilings ------------------------------------------------------------------------------------


def product_rate(size: int = 8192 if CUDA else 256) -> float:
    """Operations a second of a product of two square matrices: bf16 on a GPU, float32 elsewhere."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 2e3 * size**3 / milliseconds(lambda: a @ b.t())


def fp8_product_rate(size: int = 8192) -> float:
    """The same in e4m3, on a GPU."""
    a, b = (torch.randn(size, size, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=DEVICE)

    def product() -> None:
        torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2e3 * size**3 / milliseconds(product)


def copy_rate(size: int = GIB if CUDA else 2**20) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2e3 * size / milliseconds(lambda: target.copy_(source))


# ---- facts ---------------------------------------------------------------------------------------


def machine() -> dict[str, str | None]:
    """What a figure has to name. The commit is None outside a git checkout."""
    return {
        "device": torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
        "command": shlex.join(["andromeda", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def version(package: str) -> str | None:
    """None: not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this file is in, `-dirty` where it differs from it."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def headline(facts: dict[str, str | None]) -> str:
    """One line of the facts: NVIDIA H100, torch 2.11.0, triton 3.6.0, ..."""
    parts = [f"{facts['device']}", *(f"{name} {facts[name]}" for name in ("torch", "triton", "python", "commit"))]
    return ", ".join([*parts, str(facts["date"])])
