"""Decode on one GPU: one new token against 131,072 tokens of paged cache, beside SDPA and a copy, in one run.

bfloat16, 24 query heads (12 with ALiBi, certified windows for B = 11.3), one key/value head, 128 channels. A run is a
CUDA graph over several caches, like the layers of a model, so that none is found in the L2 cache. GB/s count the bytes
of keys and values that must be read. SDPA has no bias and no windows, and its batch is not ragged: rows of the mean
length.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from andromeda.benchmarks import measure
from andromeda.benchmarks.measure import CUDA, DEVICE, DTYPE, Report, Save
from andromeda.config import AndromedaConfig
from andromeda.kernels import Geometry, Rotary
from andromeda.kernels.decode import DecodeConfig, choose_config, decode_attention, first_set, launch
from andromeda.kernels.paged import decode_reference
from andromeda.positions import certified_windows, head_slopes

HEADS, LOCAL, D, PAGE = 24, 12, 128, 64
BOUND, EPSILON, XPOS_SCALE = 11.3, 1e-4, 512.0
CONTEXT, SHORTEST = 131072, 16384  # tokens
CACHED_BYTES = 1 << 30  # several times any GPU's L2 cache
SWEEP = [
    DecodeConfig(block=block, warps=warps, stages=stages, residency=residency, far=2, near=near)
    for block, warps, stages, residency, near in [
        *itertools.product((32, 64), (4, 8), (3, 5), (1, 2), (3,)),
        *itertools.product((64,), (4, 8), (5,), (1,), (4, 6)),
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
        slopes, windows, bounds, rotary = geometry.slopes, geometry.windows, geometry.bounds, geometry.rotary
        cut = first_set(HEADS, rotary, geometry.local_heads)

        def run() -> None:
            for k, v in self.caches:
                launch(
                    self.q, k, v, self.page_table, self.lengths, slopes, windows, bounds, cut, rotary, config,
                    geometry.local_heads,
                )  # fmt: skip

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
    bounds = torch.full((HEADS,), BOUND, dtype=torch.float64, device=device)
    windows = certified_windows(bounds, slopes, EPSILON)
    rotary = Rotary(LOCAL, D // 2, xpos_scale=XPOS_SCALE)
    return Geometry(slopes=slopes, windows=windows, bounds=bounds, rotary=rotary, local_heads=LOCAL)


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


def settings(copies: int | None = None) -> list[Setting]:
    """With so many caches, by default more than an L2 cache holds."""
    ragged = torch.randint(SHORTEST, CONTEXT + 1, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    sizes = {"batch 1": [CONTEXT], "batch 32, ragged": ragged}
    return [
        setting(name, rows, copies or max(2, CACHED_BYTES // (sum(rows) * 4 * D)), DEVICE, DTYPE)
        for name, rows in sizes.items()
    ]


def check() -> float:
    """The largest error at tiny shapes, relative to the largest output, of one sequence and of two.

    Raises:
        WrongResultError: it is large.
    """
    positions = geometry(DEVICE)

    def error(lengths: list[int]) -> float:
        tiny = setting("check", lengths, 1, DEVICE, DTYPE)
        k, v = tiny.caches[0]
        ours = decode_attention(tiny.q, k, v, tiny.page_table, tiny.lengths, positions)
        exact = decode_reference(tiny.q.double(), k.double(), v.double(), tiny.page_table, tiny.lengths, positions)
        return ((ours - exact).abs().max() / exact.abs().max()).item()

    largest = max(error([200, 70]), error([200]))
    measure.require("decode", largest, 0.02 if CUDA else 1e-4)
    return largest


def compare(size: Setting, copy: float) -> Iterator[dict[str, Any]]:
    """Ours, then SDPA; `problem` where a backend does not take the shape."""

    def row(contender: str, run: Runnable, read: int) -> dict[str, Any]:
        microseconds = 1e3 * measure.milliseconds(measure.captured(run)) / len(size.caches)
        rate = 1e6 * read / microseconds
        speed = f"{microseconds:9.1f} us {rate / 1e9:7.0f} GB/s, {rate / copy:4.0%} of a copy"
        print(f"{size.name:18} {contender:24} {speed}", flush=True)
        return {
            "setting": size.name, "contender": contender, "us": microseconds, "gbps": rate / 1e9,
            "of_copy": rate / copy,
        }  # fmt: skip

    yield row("ours", size.ours(geometry(DEVICE)), size.bytes_read)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        name = f"SDPA {backend.name.split('_')[0].lower()}"
        try:
            yield row(name, *size.sdpa(backend))
        except RuntimeError as reason:
            problem = str(reason).splitlines()[0]
            print(f"{size.name:18} {name:24} not taken: {problem}", flush=True)
            yield {"setting": size.name, "contender": name, "problem": problem}


def sweep(size: Setting, copy: float) -> list[dict[str, Any]]:
    """Every candidate, the fastest first."""
    rows = []
    for config in SWEEP:
        try:
            replay = measure.captured(size.ours(geometry(DEVICE), config))
        except Exception as reason:  # noqa: BLE001  what a candidate asks for may be more than the device has
            print(f"{config}: {type(reason).__name__}: {str(reason).splitlines()[0]}", flush=True)
            continue
        microseconds = 1e3 * measure.milliseconds(replay) / len(size.caches)
        share = 1e6 * size.bytes_read / microseconds / copy
        rows.append({"setting": size.name, **dataclasses.asdict(config), "us": microseconds, "of_copy": share})
    rows.sort(key=lambda row: row["us"])
    for row in rows:
        cells = (f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print("  ".join(cells), flush=True)
    return rows


def _compile(config: DecodeConfig) -> None:
    for size in settings(copies=1):
        with suppress(Exception):  # what fails here fails again where it is timed
            size.ours(geometry(DEVICE), config)()


def run(sweeping: bool, save: Save) -> Report:
    """Both settings: peers, or candidate configurations of the kernel in their place."""
    report: Report = {"machine": measure.machine(), "error": check(), "rows": []}
    copy = measure.copy_rate(CACHED_BYTES)
    report["copy_gbps"] = copy / 1e9
    print(measure.headline(report["machine"]))
    print(f"largest relative error, tiny shapes: {report['error']:.1e}; copy {copy / 1e9:.0f} GB/s (read + written)")
    if sweeping:
        measure.in_processes(_compile, SWEEP)
    for size in settings():
        if sweeping:
            default = choose_config(len(size.lengths), 2 * 16, D, PAGE, size.q.device)
            print(f"{size.name}: {default}", flush=True)
            parts = measure.by_kernel(size.ours(geometry(DEVICE)))
            print(size.name, {name: f"{1e3 * ms / len(size.caches):.1f} us" for name, ms in parts.items()}, flush=True)
        for row in sweep(size, copy) if sweeping else compare(size, copy):
            report["rows"].append(row)
            save(report)
    return report
