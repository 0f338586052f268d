"""Attention of one or a few new tokens over a long paged cache, in Triton: the function of `decode_reference`.

Its time is that of reading the cache. All query heads of a key/value head share each load; the work of a ragged batch
is shared out evenly on the device (see decode_kernels.py), so the grid depends on shapes alone, nothing is read on the
host, and a CUDA graph replays for other lengths. No atomics: results are the same bit for bit.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from andromeda.kernels.decode_kernels import decode_kernel, merge_kernel
from andromeda.kernels.geometry import Geometry, Rotary
from andromeda.kernels.launch import has_hopper_gluon, on_device_of
from andromeda.kernels.paged import MAX_NEW, MAX_UNITS, check_paged
from andromeda.kernels.rotation import longest_span

INTERPRETED = not hasattr(decode_kernel, "warmup") or triton.knobs.runtime.interpret
MAX_ROWS = 64  # of a set of heads and a chunk of new tokens; more would not fit in registers
DIMS = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernel runs.

    Attributes:
        block: keys of a tile. warps: Triton's. stages: Triton's, two for each tile that is loaded ahead, and one.
        residency: programs a multiprocessor, shared by the chunks of new tokens.
        far, near: what a tile costs that one set of heads sees, and that both see, for sharing the work.
    """

    block: int = 64
    warps: int = 8
    stages: int = 5
    residency: int = 1
    far: int = 2
    near: int = 3


def decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, geometry: Geometry
) -> Tensor:
    """Each row's new tokens over its own keys, as `reference_attention` defines it. Inference only.

    Args:
        q: (B, N, heads, dim_head), N <= 16; normalised and scaled, not rotated. Queries of row b stand at positions
            lengths[b] - N .. lengths[b] - 1; those before position 0 (padding) give zeros.
        k_pages, v_pages: (pages, page_size, kv_heads, dim_head) in q's dtype, keys not rotated, those of the new tokens
            included. What lies beyond a row's length or before its windows is never used.
        page_table: (B, max_pages) int32: token j of row b is in page page_table[b, j // page_size].
        lengths: (B,) int32, at most max_pages * page_size.
        geometry: `starts` must be None; with `bounds` it is faster.

    Returns:
        (B, N, heads, dim_head) in q's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or that the kernel does not take.
    """
    check_paged(q, k_pages, v_pages, page_table, lengths, geometry)
    _check_taken(q, k_pages, v_pages, geometry.rotary)
    heads, rotary = q.shape[2], geometry.rotary
    out: Tensor = torch.ops.andromeda.decode_attention(
        q, k_pages, v_pages, page_table, lengths, geometry.slopes, geometry.windows, geometry.bounds,
        first_set(heads, rotary, geometry.local_heads),
        0 if rotary is None else rotary.heads, 1.0 if rotary is None else rotary.base,
        1.0 if rotary is None else rotary.interpolation, None if rotary is None else rotary.xpos_scale,
        geometry.local_heads,
    )  # fmt: skip
    return out


def first_set(heads: int, rotary: Rotary | None, local_heads: int | None) -> int:
    """Heads below this one form a set of their own: the rotated ones, or the local ones if all or none are rotated."""
    rotated = 0 if rotary is None else rotary.heads
    if 0 < rotated < heads:
        return rotated
    return heads if local_heads is None else local_heads


def choose_config(units: int, rows: int, dim_head: int, page_size: int, device: torch.device) -> DecodeConfig:
    """By the work there is, the rows of query heads and tokens that share a load, and a multiprocessor's memory.

    Two programs a multiprocessor fill each other's waits. For one sequence they cost more, in parts to be added up; it
    wants more tiles ahead instead.
    """
    block = min(32 if rows > 64 else 64, max(32, page_size))
    tile, rest = 2 * 2 * block * dim_head, 3 * dim_head * rows  # bytes; the rest is room for queries and weights
    room = _shared_memory(device)
    if units == 1 and 5 * tile + rest <= room:
        return DecodeConfig(block=block, stages=7, far=1, near=2)
    programs = 2 if rows <= 32 and units > 1 and 2 * (3 * tile + rest) <= room else 1
    stages = 5 if 3 * tile + rest <= room else 3
    return DecodeConfig(block=block, warps=8 // programs, stages=stages, residency=programs)


def _check_taken(q: Tensor, k_pages: Tensor, v_pages: Tensor, rotary: Rotary | None) -> None:
    taken = (*DTYPES, torch.float32) if INTERPRETED else DTYPES
    if q.dtype not in taken or k_pages.dtype != q.dtype or v_pages.dtype != q.dtype:
        raise ValueError(
            f"decode: q and pages must be of one type out of {', '.join(map(str, taken))}; "
            f"got {q.dtype}, {k_pages.dtype}, {v_pages.dtype}"
        )
    if q.shape[3] not in DIMS:
        raise ValueError(f"decode: dim_head must be one of {DIMS}; got {q.shape[3]}")
    if not 1 <= q.shape[1] <= MAX_NEW:
        raise ValueError(f"decode: 1 to {MAX_NEW} new tokens a sequence; got {q.shape[1]}")
    if q.shape[1] > longest_span(rotary):
        raise ValueError(f"decode: {q.shape[1]} new tokens are too many for the steep decay of {rotary}")
    if q.shape[0] * k_pages.shape[2] > MAX_UNITS:
        raise ValueError(f"decode: sequences times kv heads must be at most {MAX_UNITS}; got {tuple(q.shape)}")
    if q.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"decode: the kernel runs on CUDA devices, or under TRITON_INTERPRET=1; got {q.device}")


@torch.library.custom_op("andromeda::decode_attention", mutates_args=())
def _decode(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, slopes: Tensor | None,
    windows: Tensor | None, bounds: Tensor | None, cut: int, rotated: int, base: float, interpolation: float,
    xpos_scale: float | None, local_heads: int | None = None,
) -> Tensor:  # fmt: skip
    rotary = Rotary(rotated, q.shape[3] // 2, base, interpolation, xpos_scale) if rotated else None
    with on_device_of(q):
        return launch(
            q, k_pages, v_pages, page_table, lengths, slopes, windows, bounds, cut, rotary, local_heads=local_heads
        )


@_decode.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def launch(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, slopes: Tensor | None,
    windows: Tensor | None, bounds: Tensor | None, cut: int, rotary: Rotary | None,
    config: DecodeConfig | None = None, local_heads: int | None = None,
) -> Tensor:  # fmt: skip
    """`decode_attention` on checked inputs; heads below `cut` form the first set."""
    if (
        slopes is not None and windows is not None and bounds is not None and rotary is not None
        and config is None and rotary.heads == cut == local_heads and fits_the_ring(q, k_pages, v_pages, cut, rotary)
    ):  # fmt: skip
        return _launch_ring(q, k_pages, v_pages, page_table, lengths, slopes, windows, bounds, cut, rotary)
    q, k_pages, v_pages, page_table = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_pages, v_pages, page_table)
    )
    lengths, slopes, windows, bounds = lengths.contiguous(), *map(_contiguous, (slopes, windows, bounds))
    batch, new, heads, dim_head = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group, units = heads // kv_heads, batch * kv_heads
    sets = _set_sizes(cut, heads, kv_heads)
    tokens = min(new, max(1, MAX_ROWS // max(sets)))
    rows = [max(16, triton.next_power_of_2(size * tokens)) if size else 0 for size in sets]
    config = config or choose_config(units, sum(rows), dim_head, page_size, q.device)
    chunks = triton.cdiv(new, tokens)
    programs = max(1, _multiprocessors(q.device) * config.residency // chunks)
    rotated = 0 if rotary is None else rotary.heads
    tables = _tables(rotary, config.block, q.device, torch.float32 if q.dtype == torch.float32 else torch.float16)
    slots = programs + units
    acc = torch.empty(slots, new, group, dim_head, dtype=torch.float32, device=q.device)
    top, total = torch.empty(2, slots, new, group, dtype=torch.float32, device=q.device)
    unit_slots = torch.empty(units, 2, dtype=torch.int32, device=q.device)
    out = torch.empty(batch, new, heads, dim_head, dtype=q.dtype, device=q.device)
    decode_kernel[programs, chunks](
        q, k_pages, v_pages, page_table, lengths, slopes, windows, bounds, *tables, acc, top, total, unit_slots,
        *q.stride()[:3], *k_pages.stride()[:3], *v_pages.stride()[:3], page_table.stride(0), units,
        N=new, TOKENS=tokens, CUT=cut, KV=kv_heads, GROUP=group, D=dim_head, PAGE=page_size, BLOCK=config.block,
        ROWS_A=rows[0], ROWS_B=rows[1], A_ROTATED=0 < cut <= rotated, B_ROTATED=rotated > cut,
        SLOPED=slopes is not None, WINDOWED=windows is not None,
        BOUNDED=bounds is not None and q.dtype != torch.float16, FAR=config.far, NEAR=config.near,
        UNITS=triton.next_power_of_2(units), MEMBERS=triton.next_power_of_2(group),
        WIDEN=INTERPRETED, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    at_once = min(256, max(16, triton.next_power_of_2(programs // units + 2)))  # slots of a unit, if lengths were equal
    channels = min(dim_head, max(16, 8192 // at_once))
    merge_kernel[batch * new * heads, dim_head // channels](
        acc, top, total, unit_slots, out, N=new, KV=kv_heads, GROUP=group, D=dim_head,
        SLOTS=at_once, CHANNELS=channels, PROGRAMS=programs if units == 1 else 0, num_warps=8, num_stages=1,
    )  # fmt: skip
    return out


def fits_the_ring(q: Tensor, k_pages: Tensor, v_pages: Tensor, cut: int, rotary: Rotary) -> bool:
    """Whether decode_hopper.py takes it, given that heads below `cut` are rotated and local, and no others."""
    batch, new, heads, dim_head = q.shape
    return (
        (batch, new, dim_head) == (1, 1, 128)
        and q.dtype == torch.bfloat16
        and 0 < cut <= 16
        and 0 < heads - cut <= 16
        and q.stride(3) == 1
        and all(
            x.shape[1:] == (64, 1, 128)
            and x.stride(0) == 64 * x.stride(1)
            and x.stride(1) % 8 == 0
            and x.stride(3) == 1
            and x.data_ptr() % 16 == 0
            for x in (k_pages, v_pages)
        )
        and longest_span(rotary) >= 64
        and not INTERPRETED
        and has_hopper_gluon(q.device)
    )


def _launch_ring(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, slopes: Tensor, windows: Tensor,
    bounds: Tensor, cut: int, rotary: Rotary,
) -> Tensor:  # fmt: skip
    from andromeda.kernels import decode_hopper  # Gluon, which is imported where it runs alone

    tables = [x for x in _tables(rotary, 64, q.device, torch.float16) if x is not None]
    return decode_hopper.launch(
        q, k_pages, v_pages, page_table if page_table.stride(-1) == 1 else page_table.contiguous(), lengths,
        slopes.contiguous(), windows.contiguous(), bounds.contiguous(), tables, cut, _multiprocessors(q.device),
    )  # fmt: skip


def _set_sizes(cut: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """Heads of the two sets, those below `cut` and the others: the most that a kv head has of each."""
    group = heads // kv_heads
    below = [min(max(cut - kv * group, 0), group) for kv in range(kv_heads)]
    return max(below), group - min(below)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes a multiprocessor's programs have together."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor if device.type == "cuda" else 0


@functools.cache  # never dropped: a CUDA graph remembers where they lie
def _tables(
    rotary: Rotary | None, block: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """What the kernel rotates by.

    cos and sin (block, pairs), times the decay, for keys 0..block - 1 tokens behind the anchor; (pairs,) float64 turns
    and float32 base-2 logarithm of the decay, a token.
    """
    if rotary is None:
        return None, None, None, None
    with torch.inference_mode(False):
        behind = torch.arange(block, dtype=torch.float64)[:, None]
        decay, angle = torch.exp(rotary.log_decay() * behind), rotary.rates() * behind
        turns, log_decay = rotary.rates() / (2 * math.pi), rotary.log_decay() / math.log(2)
        cos, sin = ((decay * f(angle)).to(device, dtype) for f in (torch.cos, torch.sin))
        return cos, sin, turns.to(device), log_decay.to(device, torch.float32)
