"""Decode on one GPU: one new token against 131,072 tokens of paged cache, beside SDPA and a copy, in one run.

bfloat16, 24 query heads (12 with ALiBi, certified windows for B = 11.3), one key/value head, 128 channels. A run is a
CUDA graph over several caches, like the layers of a model, so that none is found in the L2 cache. GB/s count the bytes
of keys and values that must be read. SDPA has no bias and no windows, and its batch is not ragged: rows of the mean
length.

    python benchmarks/gpu/decode.py
    python benchmarks/gpu/decode.py --sweep         # candidate configurations of the kernel
    python benchmarks/gpu/decode.py --check         # tiny, and interpreted without a GPU
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from andromeda.config import AndromedaConfig
from andromeda.kernels import Geometry, Rotary
from andromeda.kernels.decode import DecodeConfig, choose_config, first_set, launch
from andromeda.kernels.paged import decode_reference
from andromeda.positions import certified_windows, head_slopes

CUDA = torch.cuda.is_available()
HEADS, LOCAL, D, PAGE = 24, 12, 128, 64
BOUND, EPSILON, XPOS_SCALE = 11.3, 1e-4, 512.0
CONTEXT, SHORTEST = 131072, 16384  # tokens
CACHED_BYTES = 1 << 30  # several times any GPU's L2 cache
RUNS = 30
SWEEP = [
    DecodeConfig(block=block, warps=warps, stages=stages, residency=residency, far=2, near=near, overlap=overlap)
    for block, warps, stages, residency, near, overlap in [
        *itertools.product((32, 64), (4,), (3, 5, 7), (2, 3, 4), (3,), (False,)),
        *itertools.product((64, 128), (8,), (3, 5), (1, 2), (3,), (False,)),
        *itertools.product((64,), (4,), (3, 5), (1,), (3,), (False,)),
        *itertools.product((64,), (4,), (5,), (2,), (2, 4, 6), (False,)),
        *itertools.product((64,), (4,), (3, 5), (2,), (3,), (True,)),
    ]
]

Runnable = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """Queries of one token a row, and several caches to walk through."""

    name: str
    lengths: Tensor
    q: Tensor
    caches: list[tuple[Tensor, Tensor]]
    page_table: Tensor

    @property
    def bytes_read(self) -> int:
        """Of one cache: keys and values of every row, as the global heads see all of them."""
        return int(self.lengths.sum()) * 2 * D * self.q.element_size()

    def ours(self, geometry: Geometry, config: DecodeConfig | None = None) -> Runnable:
        slopes, windows, rotary = geometry.slopes, geometry.windows, geometry.rotary
        cut = first_set(HEADS, rotary, geometry.local_heads)

        def run() -> None:
            for k, v in self.caches:
                launch(self.q, k, v, self.page_table, self.lengths, slopes, windows, cut, rotary, config)

        return run

    def sdpa(self, backend: SDPBackend) -> tuple[Runnable, int]:
        """And the bytes it reads of one cache."""
        batch, length = len(self.lengths), int(self.lengths.double().mean())
        q = self.q.transpose(1, 2)
        caches = [
            tuple(x.flatten(0, 1)[: batch * length].view(batch, length, 1, D).transpose(1, 2) for x in pair)
            for pair in self.caches
        ]

        def run() -> None:
            with sdpa_kernel(backend):
                for k, v in caches:
                    F.scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=True)

        return run, batch * length * 2 * D * self.q.element_size()


def geometry(device: str) -> Geometry:
    config = AndromedaConfig(heads=HEADS, dim_head=D, alibi_num_heads=LOCAL)
    slopes = torch.tensor(head_slopes(config), device=device)
    windows = certified_windows(torch.full((HEADS,), BOUND, dtype=torch.float64, device=device), slopes, EPSILON)
    rotary = Rotary(LOCAL, D // 2, xpos_scale=XPOS_SCALE)
    return Geometry(slopes=slopes, windows=windows, rotary=rotary, local_heads=LOCAL)


def setting(name: str, lengths: list[int], copies: int, device: str, dtype: torch.dtype) -> Setting:
    """Pages lie in any order."""
    torch.manual_seed(0)
    used = [-(-length // PAGE) for length in lengths]
    table = torch.zeros(len(lengths), max(used), dtype=torch.int32)
    order = torch.randperm(sum(used)).int()
    for row, (pages, end) in enumerate(zip(used, itertools.accumulate(used), strict=True)):
        table[row, :pages] = order[end - pages : end]

    def cache() -> tuple[Tensor, Tensor]:
        k, v = torch.randn(2, sum(used), PAGE, 1, D, device=device, dtype=dtype)
        return F.normalize(k, dim=-1), v

    q = BOUND * F.normalize(torch.randn(len(lengths), 1, HEADS, D, device=device), dim=-1)
    rows = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Setting(name, rows, q.to(dtype), [cache() for _ in range(copies)], table.to(device))


def settings() -> list[Setting]:
    ragged = torch.randint(SHORTEST, CONTEXT + 1, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    sizes = {"batch 1": [CONTEXT], "batch 32, ragged": ragged}
    return [
        setting(name, rows, max(2, CACHED_BYTES // (sum(rows) * 4 * D)), "cuda", torch.bfloat16)
        for name, rows in sizes.items()
    ]


def median_ms(run: Runnable) -> float:
    """Of replays of a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_gbps() -> float:
    """Bytes read and written, a second."""
    source = torch.zeros(CACHED_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * CACHED_BYTES / median_ms(lambda: target.copy_(source)) / 1e6


def check(device: str, dtype: torch.dtype) -> float:
    """The largest error at tiny shapes, relative to the largest output."""
    tiny = setting("check", [200, 70], 1, device, dtype)
    positions = geometry(device)
    (k, v), cut = tiny.caches[0], first_set(HEADS, positions.rotary, LOCAL)
    ours = launch(
        tiny.q, k, v, tiny.page_table, tiny.lengths, positions.slopes, positions.windows, cut, positions.rotary
    )
    exact = decode_reference(tiny.q.double(), k.double(), v.double(), tiny.page_table, tiny.lengths, positions)
    error = ((ours - exact).abs().max() / exact.abs().max()).item()
    if not error < (0.02 if dtype == torch.bfloat16 else 1e-4):
        raise SystemExit(f"decode: the error is {error:.1e}; no speed is reported")
    return error


def measure(size: Setting, copy: float) -> list[dict[str, Any]]:
    def line(contender: str, run: Runnable, read: int) -> dict[str, Any]:
        microseconds = 1000 * median_ms(run) / len(size.caches)
        gbps = read / microseconds / 1000
        print(f"{size.name:18} {contender:24} {microseconds:9.1f} us {gbps:7.0f} GB/s, {gbps / copy:4.0%} of a copy")
        return {"setting": size.name, "contender": contender, "us": microseconds, "gbps": gbps, "of_copy": gbps / copy}

    lines = [line("ours", size.ours(geometry("cuda")), size.bytes_read)]
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        name = f"SDPA {backend.name.split('_')[0].lower()}"
        try:
            lines.append(line(name, *size.sdpa(backend)))
        except RuntimeError as reason:
            print(f"{size.name:18} {name:24} not taken: {str(reason).splitlines()[0]}")
    return lines


def sweep(size: Setting, copy: float) -> list[dict[str, Any]]:
    """Every candidate, the fastest first."""
    lines = []
    for config in SWEEP:
        try:
            microseconds = 1000 * median_ms(size.ours(geometry("cuda"), config)) / len(size.caches)
        except Exception as reason:  # noqa: BLE001  what a candidate asks for may be more than the device has
            print(f"{config}: {type(reason).__name__}: {str(reason).splitlines()[0]}")
            continue
        gbps = size.bytes_read / microseconds / 1000
        lines.append({"setting": size.name, **dataclasses.asdict(config), "us": microseconds, "of_copy": gbps / copy})
    lines.sort(key=lambda line: line["us"])
    for entry in lines:
        print(
            "  ".join(
                f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in entry.items()
            )
        )
    return lines


def main(out: Path | None = None, sweeping: bool = False) -> None:
    """Measures, prints, and writes the lines as JSON to `out`."""
    print(f"largest relative error in bfloat16, tiny shapes: {check('cuda', torch.bfloat16):.1e}")
    copy = copy_gbps()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {copy:.0f} GB/s (read + written)")
    print(f"default configuration: {choose_config(32, D, PAGE, torch.device('cuda', torch.cuda.current_device()))}")
    lines: list[dict[str, Any]] = []
    for size in settings():
        lines += (sweep if sweeping else measure)(size, copy)
    if out is not None:
        report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gbps": copy, "lines": lines}
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="tiny shapes against the reference, without timing")
    parser.add_argument("--sweep", action="store_true", help="time candidate configurations instead of the peers")
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    if arguments.check:
        device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
        print(f"largest relative error: {check(device, dtype):.1e}")
    elif not CUDA:
        raise SystemExit("decode: timing needs a CUDA device; --check runs without one")
    else:
        main(arguments.json, arguments.sweep)
