"""Attention through the Triton kernels, as a custom operator with its gradient.

`flash_attention` has the signature of the other paths. `prepared_attention` takes queries and keys as `rotate` stores
them, for callers that fuse the preparation with what comes before.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from andromeda.kernels import rotate
from andromeda.kernels.flash_backward import dkv_kernel, dq_kernel
from andromeda.kernels.flash_forward import forward_kernel
from andromeda.kernels.geometry import Geometry, Rotary
from andromeda.kernels.launch import has_hopper_gluon, on_device_of, written
from andromeda.kernels.rotation import rotation_constants, xpos_chunk

LOG2_E = math.log2(math.e)
INTERPRETED = not hasattr(forward_kernel, "warmup") or triton.knobs.runtime.interpret
ENOUGH_PROGRAMS = 528  # four a multiprocessor of a Hopper GPU
FALLBACK_PROGRAMS = 264  # two
RING_KEYS = 128  # of a program of flash_hopper_backward.py


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a block, and how a program runs."""

    queries: int
    keys: int
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        return {"BM": self.queries, "BN": self.keys, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Plan:
    """Tile sizes of the three kernels."""

    forward: Tiles
    dq: Tiles
    dkv: Tiles


# What measured fastest with 128 channels (benchmarks/results/attention.md); 64 and 32 channels are not tuned.
# Small tiles of one warp group win, two programs a multiprocessor: one's exponentials run under the other's products.
PLANS = {dim_head: Plan(Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 4), Tiles(32, 64, 4, 4)) for dim_head in (32, 64, 128)}
# Many tiles at small lengths.
INTERPRETED_PLAN = Plan(Tiles(32, 16, 4, 1), Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1))


def plan(dim_head: int) -> Plan:
    """Tile sizes for heads of so many channels."""
    return INTERPRETED_PLAN if INTERPRETED else PLANS[dim_head]


@dataclass(frozen=True)
class _Segment:
    """Consecutive heads that one launch serves."""

    first: int
    count: int
    local: bool
    rotated: bool


def flash_attention(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
    """The function of `reference_attention`; shapes as there."""
    offset = k.shape[1] - q.shape[1]
    q = rotate.rotate_queries(q, geometry.rotary, offset, LOG2_E)
    return prepared_attention(q, rotate.stack_keys(k, geometry.rotary), v, geometry)


def prepared_attention(
    q: Tensor, keys: Tensor, v: Tensor, geometry: Geometry, out: Tensor | None = None, out_scale: float = 1.0
) -> Tensor:
    """Attention over prepared queries and keys.

    Args:
        q: (B, T, heads, D), times log2(e), rotated as by `rotate.rotate_queries`.
        keys: (1 or 2, B, kv_heads, S, D) as `rotate.stack_keys` makes them. v: (B, S, kv_heads, D).
        geometry: as in `reference_attention`.
        out: (B, T, heads, D) to write to, any strides but the last; no gradients then. It may be where q came from,
            or in e4m3, in which what is above the range becomes its largest number.
        out_scale: what `out` is multiplied by.

    Returns:
        (B, T, heads, D).
    """
    rotary, heads = geometry.rotary, q.shape[2]
    local = 0 if geometry.slopes is None else heads if geometry.local_heads is None else geometry.local_heads
    arguments = (
        rotate.unit_stride(q), keys, v, geometry.slopes, geometry.windows, geometry.bounds, geometry.starts, local,
        *((0, 0.0, 1.0) if rotary is None else (rotary.heads, rotary.xpos_scale or 0.0, rotary.interpolation)),
    )  # fmt: skip
    if out is not None:
        with on_device_of(q), written(out) as target:
            assert target is not None
            _forward(target, None, *arguments, out_scale)
        return out
    result: Tensor = _attend(*arguments)[0]
    return result


def _aligned(x: Tensor) -> Tensor:
    """As tensor descriptors need it: rows of 16 bytes or multiples, from an address that is one."""
    size = x.element_size()
    good = x.stride(-1) == 1 and all(s * size % 16 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if good else x.contiguous()


@torch.library.custom_op("andromeda::flash_attention", mutates_args=())
def _attend(
    q: Tensor, keys: Tensor, v: Tensor, slopes: Tensor | None, windows: Tensor | None, bounds: Tensor | None,
    starts: Tensor | None, local: int, rotated: int, xpos_scale: float, interpolation: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B, T, heads, D), and the log-sum-exp (B, heads, T) in base 2."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    with on_device_of(q):
        _forward(out, lse, q, keys, v, slopes, windows, bounds, starts, local, rotated, xpos_scale, interpolation)
    return out, lse


@_attend.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


def _forward(
    out: Tensor, lse: Tensor | None, q: Tensor, keys: Tensor, v: Tensor, slopes: Tensor | None,
    windows: Tensor | None, bounds: Tensor | None, starts: Tensor | None, local: int, rotated: int,
    xpos_scale: float, interpolation: float, out_scale: float = 1.0,
) -> None:  # fmt: skip
    batch, queries, heads, dim_head = q.shape
    if lse is None:
        lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    keys, v = _aligned(keys), _aligned(v)
    rotary = _rotary(q, rotated, xpos_scale, interpolation)
    num_keys, tiles = keys.shape[3], plan(dim_head).forward
    first, rows = num_keys - queries, tiles.queries
    num_tiles = (num_keys - 1) // rows - first // rows + 1
    keys_at, v_at = (_descriptor(x, tiles.keys) for x in (keys, v.transpose(1, 2)))
    # With a maximum a weight of 1 is exactly 1, and few keys pay nothing for it; float16 lacks the range to go without.
    if num_keys <= tiles.keys or v.dtype == torch.float16:
        bounds = None
    for segment in _segments(heads, local, rotated):
        switches = _switches(segment, rotary, windows, starts)
        for online in (True,) if bounds is None else (False, True):
            if bounds is not None and not online and fits_the_ring(q, keys, v, out, switches):
                _launch_ring(q, keys, v, bounds, out, lse, out_scale, segment)
                continue
            seldom = online and bounds is not None
            programs = min(num_tiles, FALLBACK_PROGRAMS) if seldom else num_tiles * segment.count
            forward_kernel[(programs, batch)](
                q, keys_at, v_at, out, lse, *(_pointer(x, q) for x in (slopes, windows, bounds, starts)),
                _decay(rotary, q), *q.stride()[:3], *out.stride()[:3],
                queries, num_keys, heads, segment.first, segment.count, heads // keys.shape[2], num_tiles, out_scale,
                **switches, HAS_BOUNDS=bounds is not None, ONLINE=online, D=dim_head, **tiles.options(),
            )  # fmt: skip


def fits_the_ring(q: Tensor, keys: Tensor, v: Tensor, out: Tensor, switches: dict[str, Any]) -> bool:
    """Whether flash_hopper.py takes a launch without the running maximum: global heads of one document a row."""
    return (
        not (switches["LOCAL"] or switches["CHUNK"] or switches["PACKED"])
        and q.shape[3] == 128
        and q.dtype == keys.dtype
        and v.dtype == torch.bfloat16
        and {q.dtype, out.dtype} <= {torch.bfloat16, torch.float8_e4m3fn}
        and not INTERPRETED
        and has_hopper_gluon(q.device)
    )


def _launch_ring(
    q: Tensor, keys: Tensor, v: Tensor, bounds: Tensor, out: Tensor, lse: Tensor, out_scale: float, segment: _Segment
) -> None:
    from andromeda.kernels import flash_hopper  # Gluon, which is imported where it runs alone

    heads = segment.first, segment.count, int(segment.rotated)
    flash_hopper.launch(q, keys, v, bounds.contiguous(), out, lse, *heads, out_scale)


@torch.library.custom_op("andromeda::flash_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, keys: Tensor, v: Tensor, slopes: Tensor | None,
    windows: Tensor | None, starts: Tensor | None, local: int, rotated: int, xpos_scale: float, interpolation: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, and dkeys and dv in float32's sums, rounded to the inputs' types."""
    dout, keys, v = _aligned(dout), _aligned(keys), _aligned(v)
    rotary = _rotary(q, rotated, xpos_scale, interpolation)
    with on_device_of(q):
        dq, delta = _dq(out, dout, lse, q, keys, v, slopes, windows, starts, local, rotary)
        dkeys, dv = _dkv(dout, lse, delta, q, keys, v, slopes, windows, starts, local, rotary)
    return dq, dkeys, dv


def _dq(
    out: Tensor, dout: Tensor, lse: Tensor, q: Tensor, keys: Tensor, v: Tensor, slopes: Tensor | None,
    windows: Tensor | None, starts: Tensor | None, local: int, rotary: Rotary | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq, and what `_dkv` needs of the same rows: delta (B, heads, T)."""
    batch, queries, heads, dim_head = q.shape
    num_keys, tiles = keys.shape[3], plan(dim_head).dq
    first, rows = num_keys - queries, tiles.queries
    out, dq, delta = out.contiguous(), torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty_like(lse)
    num_tiles = (num_keys - 1) // rows - first // rows + 1
    keys_at, v_at = (_descriptor(x, tiles.keys) for x in (keys, v.transpose(1, 2)))
    for segment in _segments(heads, local, 0 if rotary is None else rotary.heads):
        switches = _switches(segment, rotary, windows, starts)
        if fits_the_dq_ring(q, keys, v, dout, switches):
            _launch_dq_ring(q, keys, v, out, dout, lse, delta, dq, segment)
            continue
        dq_kernel[(num_tiles * segment.count, batch)](
            q, keys_at, v_at, out, dout, lse, delta, dq, *(_pointer(x, q) for x in (slopes, windows, starts)),
            _decay(rotary, q), *q.stride()[:3], *dout.stride()[:3], *dq.stride()[:3],
            queries, num_keys, heads, segment.first, segment.count, heads // keys.shape[2], num_tiles,
            **switches, D=dim_head, **tiles.options(),
        )  # fmt: skip
    return dq, delta


def _dkv(
    dout: Tensor, lse: Tensor, delta: Tensor, q: Tensor, keys: Tensor, v: Tensor, slopes: Tensor | None,
    windows: Tensor | None, starts: Tensor | None, local: int, rotary: Rotary | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(W, B, kv_heads, S, D) and (B, S, kv_heads, D): partial sums over groups of heads, added in a fixed order."""
    batch, _, heads, dim_head = q.shape
    _, _, kv_heads, num_keys, _ = keys.shape
    tiles = plan(dim_head).dkv
    keys_at, v_at = (_descriptor(x, tiles.keys) for x in (keys, v.transpose(1, 2)))
    q_at, dout_at = (_descriptor(x.transpose(1, 2), tiles.queries) for x in (_aligned(q), dout))
    ends = None if starts is None else _document_ends(starts)
    sums: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for segment in _segments(heads, local, 0 if rotary is None else rotary.heads):
        switches = _switches(segment, rotary, windows, starts)
        ring = fits_the_dkv_ring(q, keys, v, dout, switches)
        blocks = triton.cdiv(num_keys, RING_KEYS if ring else tiles.keys)
        share = _share(segment.count, blocks * batch) if kv_heads == 1 else 1
        groups = segment.count // share
        dk, dv = (
            torch.empty(groups, batch, num_keys, dim_head, dtype=torch.float32, device=q.device) for _ in range(2)
        )
        if ring:
            _launch_dkv_ring(dout, lse, delta, _aligned(q), keys, v, dk, dv, ends, segment, share)
        else:
            dkv_kernel[(blocks * groups, batch)](
                q_at, keys_at, v_at, dout_at, lse, delta, dk, dv,
                *(_pointer(x, q) for x in (slopes, windows, starts, ends)), _decay(rotary, q),
                q.shape[1], num_keys, heads, segment.first, groups, heads // kv_heads,
                **switches, SHARE=share, D=dim_head, **tiles.options(),
            )  # fmt: skip
        for g in range(groups):
            place = int(segment.rotated), (segment.first + g) // (heads // kv_heads)
            sums.setdefault(place, []).append((dk[g], dv[g]))
    return _add_up(sums, keys, v)


def fits_the_dq_ring(q: Tensor, keys: Tensor, v: Tensor, dout: Tensor, switches: dict[str, Any]) -> bool:
    """Whether flash_hopper_backward.py takes a launch for dq: global heads of one document a row."""
    return fits_the_ring(q, keys, v, dout, switches) and keys.dtype == dout.dtype == torch.bfloat16


def fits_the_dkv_ring(q: Tensor, keys: Tensor, v: Tensor, dout: Tensor, switches: dict[str, Any]) -> bool:
    """Whether flash_hopper_backward.py takes a launch for dk and dv: as for dq, but packed documents too, and all keys
    have their queries.
    """
    return (
        fits_the_dq_ring(q, keys, v, dout, switches | {"PACKED": False})
        and q.shape[1] == keys.shape[3]
        and q.shape[1] % 4 == 0  # rows of float32 that begin at multiples of 16 bytes
    )


def _launch_dq_ring(
    q: Tensor, keys: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dq: Tensor,
    segment: _Segment,
) -> None:  # fmt: skip
    from andromeda.kernels import flash_hopper_backward as hopper  # Gluon, as above

    hopper.launch_dq(q, keys, v, out, dout, lse, delta, dq, segment.first, segment.count, int(segment.rotated))


def _launch_dkv_ring(
    dout: Tensor, lse: Tensor, delta: Tensor, q: Tensor, keys: Tensor, v: Tensor, dk: Tensor, dv: Tensor,
    ends: Tensor | None, segment: _Segment, share: int,
) -> None:  # fmt: skip
    from andromeda.kernels import flash_hopper_backward as hopper  # Gluon, as above

    hopper.launch_dkv(dout, lse, delta, q, keys, v, dk, dv, segment.first, share, int(segment.rotated), ends)


def _add_up(sums: dict[tuple[int, int], list[tuple[Tensor, Tensor]]], keys: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dkeys, dv = torch.zeros(keys.shape, dtype=keys.dtype, device=keys.device), torch.empty_like(v)
    for (which, kv), parts in sums.items():
        dkeys[which, :, kv] = _sum([dk for dk, _ in parts])
    for kv in range(keys.shape[2]):
        dv[:, :, kv] = _sum([part for (_, owner), parts in sums.items() if owner == kv for _, part in parts])
    return dkeys, dv


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _share(count: int, programs: int) -> int:
    """How many heads a program sums over: as many as leave enough programs."""
    return next(
        n for n in range(count, 0, -1) if count % n == 0 and (programs * count // n >= ENOUGH_PROGRAMS or n == 1)
    )


@_backward.register_fake
def _(
    _dout: Tensor, _out: Tensor, _lse: Tensor, q: Tensor, keys: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), keys.new_empty(keys.shape), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, keys, v, slopes, windows, _, starts, *ctx.constants = inputs
    ctx.save_for_backward(*output, q, keys, v, slopes, windows, starts)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(dout, *ctx.saved_tensors, *ctx.constants), *[None] * 8)


_attend.register_autograd(_gradients, setup_context=_save)


def _segments(heads: int, local: int, rotated: int) -> list[_Segment]:
    """Heads that are alike, the widest-reaching first."""
    cuts = sorted({0, local, rotated, heads})
    return [
        _Segment(a, b - a, local=a < local, rotated=a < rotated) for a, b in reversed(list(itertools.pairwise(cuts)))
    ]


def _rotary(q: Tensor, rotated: int, xpos_scale: float, interpolation: float) -> Rotary | None:
    """What of the rotation the kernels need: how far it reaches, and its decay."""
    if rotated == 0:
        return None
    return Rotary(rotated, q.shape[3] // 2, interpolation=interpolation, xpos_scale=xpos_scale or None)


def _decay(rotary: Rotary | None, q: Tensor) -> Tensor:
    return q if rotary is None else rotation_constants(rotary, q.device)[1]


def _switches(
    segment: _Segment, rotary: Rotary | None, windows: Tensor | None, starts: Tensor | None
) -> dict[str, Any]:
    decays = segment.rotated and rotary is not None and rotary.xpos_scale is not None
    return {
        "WHICH": int(segment.rotated), "CHUNK": xpos_chunk(rotary) if rotary is not None and decays else 0,
        "LOCAL": segment.local, "PACKED": starts is not None,
        "HAS_WINDOWS": segment.local and windows is not None, "WIDEN": INTERPRETED,
    }  # fmt: skip


def _pointer(x: Tensor | None, otherwise: Tensor) -> Tensor:
    """A kernel does not read what its switches say is absent."""
    return otherwise if x is None else x.contiguous()


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """(..., S, D): blocks of `rows` rows of one head; rows outside read as zeros."""
    block = [1] * (x.dim() - 2) + [rows, x.shape[-1]]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def _document_ends(starts: Tensor) -> Tensor:
    """(B, S) -> (B, S): the position behind the last of each token's document."""
    index = torch.arange(starts.shape[1], device=starts.device).expand_as(starts).contiguous()
    return torch.searchsorted(starts.contiguous(), index, right=True)
