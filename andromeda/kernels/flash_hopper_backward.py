"""The backward pass of global heads on a Hopper GPU, in Gluon: flash_backward.py's kernels for what attends to all.

dq goes as the forward pass does (flash_hopper.py): 128 queries a program, a ring of blocks of keys and values. The next
block's scores and dout @ v^T run while the weights are taken.

For dk and dv a program owns 128 keys, 64 for each of two warp groups, and walks over the tiles of 64 queries that see
them (of packed documents, to the end of the last key's), one head after the other: the tiles form one sequence of
steps. The copy engine (TMA) fills a ring of stages in shared memory, each a tile's queries, output gradients,
log-sum-exps and deltas, which both groups use; the first group also fills it again.

A step has four products, all transposed, keys by queries. The weights are taken while v @ dout^T runs, the logits'
gradient while dv's product runs; a step begins the next one's scores and waits for all, while the other group goes on.
With 64 queries a product's two sides are of a size: what is read from shared memory for it takes as long as it does.

Nothing is added atomically: results are the same bit for bit.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import debug_barrier

from andromeda.kernels.flash_hopper import GROUPS, D, descriptor, filled_ring, leave_block, next_stage

ROWS = 64  # keys of a warp group, and queries of a tile
STAGES, LAG = 4, 2  # of tiles of queries
DQ_STAGES, DQ_LAG = 5, 1  # of blocks of keys

LN_2 = gl.constexpr(0.6931471805599453)
TILE_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
LINE_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(0, 32, 2))


def launch_dq(
    q: Tensor, keys: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dq: Tensor,
    first_head: int, num_heads: int, which: int,
) -> None:  # fmt: skip
    """flash_backward.dq_kernel for the heads from `first_head` on, of what `flash.fits_the_dq_ring` admits.

    Args:
        q, out, dout, dq: (B, T, heads, 128), keys: (1 or 2, B, kv_heads, S, 128), v: (B, S, kv_heads, 128) in bfloat16,
            keys and values as tensor descriptors need them, out and dq contiguous; dq is written.
        lse, delta: (B, heads, T) float32, contiguous; delta is written.
    """
    batch, queries, heads, _ = q.shape
    num_keys, tile = keys.shape[3], GROUPS * ROWS
    tiles = (num_keys - 1) // tile - (num_keys - queries) // tile + 1
    ring_dq_kernel[(tiles * num_heads, batch)](
        q, descriptor(keys), descriptor(v.transpose(1, 2)), out, dout, lse, delta, dq,
        *q.stride()[:3], *dout.stride()[:3], *dq.stride()[:3],
        queries, num_keys, heads, first_head, num_heads, heads // keys.shape[2], tiles,
        WHICH=which, D=D, ROWS=ROWS, STAGES=DQ_STAGES, LAG=DQ_LAG, num_warps=4,
    )  # fmt: skip


def launch_dkv(
    dout: Tensor, lse: Tensor, delta: Tensor, q: Tensor, keys: Tensor, v: Tensor, dk: Tensor, dv: Tensor,
    first_head: int, share: int, which: int, ends: Tensor | None,
) -> None:  # fmt: skip
    """flash_backward.dkv_kernel for the heads from `first_head` on, of what `flash.fits_the_dkv_ring` admits.

    Args:
        q, dout: (B, T, heads, 128) and keys: (1 or 2, B, kv_heads, T, 128), v: (B, T, kv_heads, 128) in bfloat16, as
            tensor descriptors need them. lse, delta: (B, heads, T), contiguous.
        dk, dv: (groups, B, T, 128) float32, written: each sums over `share` heads, that are `groups` apart.
        ends: (B, T) integers, contiguous: the position behind each token's document.
    """
    batch, tokens, heads, _ = q.shape
    groups, tile = dk.shape[0], GROUPS * ROWS
    ring_dkv_kernel[(triton.cdiv(tokens, tile) * groups, batch)](
        *(descriptor(x.transpose(1, 2)) for x in (q, dout)), line_descriptor(lse), line_descriptor(delta),
        descriptor(keys), descriptor(v.transpose(1, 2)), dk, dv, dk if ends is None else ends,
        tokens, heads, first_head, groups, heads // keys.shape[2],
        WHICH=which, PACKED=ends is not None, SHARE=share, D=D, ROWS=ROWS, STAGES=STAGES, LAG=LAG, num_warps=4,
    )  # fmt: skip


def line_descriptor(x: Tensor) -> TensorDescriptor:
    """(B, heads, T): ROWS numbers of one head; those outside read as zeros."""
    lines = x.flatten(0, 1)
    return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), [1, ROWS], LINE_LAYOUT.value)


@gluon.jit
def _dq_group(
    GROUP: gl.constexpr, source, ring, tensors, tile,
    D: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
):  # fmt: skip
    """What warp group GROUP does: its rows of the tile, over all `blocks` of the ring or, if the first, one fewer."""
    queries_at, dout_at, dq_at, out_ptr, lse_ptr, delta_ptr = tensors
    q_ptr, q_b, q_t, q_h = queries_at
    dout_ptr, dout_b, dout_t, dout_h = dout_at
    dq_ptr, dq_b, dq_t, dq_h = dq_at
    first, offset, queries, heads, h, blocks, dout_tiles = tile
    ks, vs, full, _ = ring
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    GRADIENT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, GRADIENT, 2)
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    first += GROUP * ROWS
    row = first - offset + gl.arange(0, ROWS, gl.SliceLayout(1, L))
    there = (row >= 0) & (row < queries)
    inside, wide = there[:, None], row.to(gl.int64)[:, None]
    channel = gl.arange(0, D, gl.SliceLayout(0, L))[None, :]
    batch = source[3].to(gl.int64)
    out = gl.load(out_ptr + batch * dq_b + h * dq_h + wide * dq_t + channel, mask=inside, other=0.0)
    dout = gl.load(dout_ptr + batch * dout_b + h * dout_h + wide * dout_t + channel, mask=inside, other=0.0)
    dout_tile = dout_tiles.index(GROUP)
    dout_tile.store(dout)
    delta = gl.sum(out.to(gl.float32) * dout.to(gl.float32), axis=1)
    line = (batch * heads + h) * queries + row
    gl.store(delta_ptr + line, delta, mask=there)
    delta = gl.convert_layout(delta, gl.SliceLayout(1, S))[:, None]
    lse = gl.load(lse_ptr + line, mask=there, other=float("inf"))
    lse = gl.convert_layout(lse, gl.SliceLayout(1, S))[:, None]
    q = gl.load(q_ptr + batch * q_b + h * q_h + wide * q_t + channel, mask=inside, other=0.0)
    q = gl.convert_layout(q, gl.DotOperandLayout(0, S, 2))
    fence_async_shared()
    own = blocks - 1 if GROUP == 0 else blocks
    zero = gl.zeros([ROWS, ROWS], gl.float32, S)
    dq = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, GRADIENT))
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(q, ks.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    old = 0
    slot = 0
    ahead, ahead_phase = next_stage(0, 0, STAGES)
    refilled = STAGES - 1 - LAG
    refilled_phase = 1
    for j in range(own - 1):
        dp = warpgroup_mma(dout_tile, vs.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(full.index(ahead), ahead_phase)
        coming = warpgroup_mma(q, ks.index(ahead).permute((1, 0)), zero, use_acc=False, is_async=True)
        p = gl.exp2(s - lse)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds = p * (dp - delta)
        dq = warpgroup_mma(gl.convert_layout(ds.to(gl.bfloat16), WEIGHTS), ks.index(slot), dq, is_async=True)
        s = warpgroup_mma_wait(1, deps=(coming,))
        refilled, refilled_phase = leave_block(
            GROUP, source, ring, j, old, blocks, refilled, refilled_phase, ROWS, D, STAGES, LAG
        )
        old = slot
        slot = ahead
        ahead, ahead_phase = next_stage(ahead, ahead_phase, STAGES)
    dp = warpgroup_mma(dout_tile, vs.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    i, j = first + gl.arange(0, ROWS, gl.SliceLayout(1, S)), gl.arange(0, ROWS, gl.SliceLayout(0, S))
    p = gl.where(((own - 1) * ROWS + j)[None, :] <= i[:, None], gl.exp2(s - lse), 0.0)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = p * (dp - delta)
    dq = warpgroup_mma(gl.convert_layout(ds.to(gl.bfloat16), WEIGHTS), ks.index(slot), dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=(dq,))
    dq = gl.convert_layout((dq * LN_2).to(gl.bfloat16), L)
    gl.store(dq_ptr + batch * dq_b + h * dq_h + wide * dq_t + channel, dq, mask=inside)


@gluon.jit
def ring_dq_kernel(
    q_ptr, k_desc, v_desc, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_b, q_t, q_h, dout_b, dout_t, dout_h, dq_b, dq_t, dq_h,
    queries, num_keys, heads, first_head, num_heads, group, tiles,
    WHICH: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
):  # fmt: skip
    """Grid and shapes of flash_hopper.ring_forward_kernel; out and dq have the same strides.

    Leaves delta (B, heads, T) behind, as flash_backward.dq_kernel does.
    """
    gl.static_assert(STAGES - LAG >= 3, "the last blocks would never be asked for")
    batch, program = gl.program_id(1), gl.program_id(0)
    h = first_head + program % num_heads
    offset = num_keys - queries
    first = (offset // (2 * ROWS) + tiles - 1 - program // num_heads) * (2 * ROWS)
    blocks = first // ROWS + 2
    source = (k_desc, v_desc, WHICH, batch, h // group)
    ring = filled_ring(source, blocks, ROWS, D, STAGES)
    dout_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, D], TILE_LAYOUT)
    tensors = (
        (q_ptr, q_b, q_t, q_h), (dout_ptr, dout_b, dout_t, dout_h), (dq_ptr, dq_b, dq_t, dq_h),
        out_ptr, lse_ptr, delta_ptr,
    )  # fmt: skip
    tile = (first, offset, queries, heads, h, blocks, dout_tiles)
    # Constants may not stand in a tuple that has a name.
    gl.warp_specialize([
        (_dq_group, (0, source, ring, tensors, tile, D, ROWS, STAGES, LAG)),
        (_dq_group, (1, source, ring, tensors, tile, D, ROWS, STAGES, LAG)),
    ], [4], [256])  # fmt: skip


@gluon.jit
def _fill(source, ring, h, tile, slot, pred, ROWS: gl.constexpr, D: gl.constexpr):
    """Asks for a tile's queries and gradients of head h."""
    q_desc, dout_desc, lse_desc, delta_desc, batch, heads, _ = source
    qs, douts, lses, deltas, full, _ = ring
    line, at = batch * heads + h, tile * ROWS
    mbarrier.expect(full.index(slot), 4 * ROWS * D + 8 * ROWS, pred)
    tma.async_copy_global_to_shared(q_desc, [batch, h, at, 0], full.index(slot), qs.index(slot), pred)
    tma.async_copy_global_to_shared(dout_desc, [batch, h, at, 0], full.index(slot), douts.index(slot), pred)
    tma.async_copy_global_to_shared(lse_desc, [line, at], full.index(slot), lses.index(slot), pred)
    tma.async_copy_global_to_shared(delta_desc, [line, at], full.index(slot), deltas.index(slot), pred)


@gluon.jit
def _line(lines, slot, S: gl.constexpr, ROWS: gl.constexpr):
    """(1, ROWS): a number for each query of a stage."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return lines.index(slot)._reinterpret(gl.float32, [ROWS], FLAT).load(gl.SliceLayout(0, S))[None, :]


@gluon.jit
def _scores(keys, ring, slot, phase, zero):
    """Begins keys @ q^T of a stage, once it is full."""
    mbarrier.wait(ring[4].index(slot), phase)
    return warpgroup_mma(keys, ring[0].index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _add(
    s, dk, dv, values, ring, slot, zero, limit,
    MASKED: gl.constexpr, PACKED: gl.constexpr, S: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """A step more in dk, whose product still runs, and dv, given its scores. `limit`: of a tile's queries, those before
    it see a key.

    What is hidden is taken out of p: taken out of s, which goes round the loop, it would make each product wait.
    """
    q, dout, lses, deltas = ring[0].index(slot), ring[1].index(slot), ring[2], ring[3]
    ROWS: gl.constexpr = s.shape[0]
    dp = warpgroup_mma(values, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
    p = gl.exp2(s - _line(lses, slot, S, ROWS))
    if MASKED:
        query, key = gl.arange(0, ROWS, gl.SliceLayout(0, S)), gl.arange(0, ROWS, gl.SliceLayout(1, S))
        p = gl.where(query[None, :] >= key[:, None], p, 0.0)
    if PACKED:
        p = gl.where(gl.arange(0, ROWS, gl.SliceLayout(0, S))[None, :] < limit[:, None], p, 0.0)
    dv = warpgroup_mma(gl.convert_layout(p.to(gl.bfloat16), WEIGHTS), dout, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = p * (dp - _line(deltas, slot, S, ROWS))
    dk = warpgroup_mma(gl.convert_layout(ds.to(gl.bfloat16), WEIGHTS), q, dk, is_async=True)
    return dk, dv


@gluon.jit
def _leave(
    GROUP: gl.constexpr, source, ring, slot, refill, first_tile, tiles, steps,
    D: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """After a group's last use of a stage. The first one fills that of LAG steps before again.

    `refill`: that stage and its phase, and which step it will hold, of which head and tile.
    """
    refilled, phase, step, h, tile = refill
    debug_barrier()  # no warp of the group reads the stage any more
    if GROUP == 0:
        wanted = (step >= STAGES) & (step < steps)
        mbarrier.wait(ring[5].index(refilled), phase, pred=wanted)
        _fill(source, ring, h, tile, refilled, wanted, ROWS, D)
        refilled, phase = next_stage(refilled, phase, STAGES)
        h, tile = _next_tile(h, tile, first_tile, tiles, source[6])
    else:
        mbarrier.arrive(ring[5].index(slot), count=1)
    return refilled, phase, step + 1, h, tile


@gluon.jit
def _next_tile(h, tile, first_tile, tiles, num_groups):
    """Behind a head's last tile comes the first of the next head."""
    tile += 1
    return gl.where(tile == tiles, h + num_groups, h), gl.where(tile == tiles, first_tile, tile)


@gluon.jit
def _dkv_group(
    GROUP: gl.constexpr, source, key_tiles, ring, out, first_tile, tiles, h, tile, ends_ptr,
    PACKED: gl.constexpr, SHARE: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
    LAG: gl.constexpr,
):  # fmt: skip
    """What warp group GROUP does: its keys, over all steps. `h` and `tile`: of step STAGES - LAG."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    GRADIENT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, GRADIENT, 2)
    ks, vs, loaded = key_tiles
    dk_ptr, dv_ptr, rows = out
    keys, values = ks.index(GROUP), vs.index(GROUP)
    zero = gl.zeros([ROWS, ROWS], gl.float32, S)
    dk = gl.zeros([ROWS, D], gl.float32, GRADIENT)
    dv = gl.zeros([ROWS, D], gl.float32, GRADIENT)
    steps = (tiles - first_tile) * SHARE
    refill = (STAGES - LAG, 1, STAGES - LAG, h, tile)
    slot = 0
    phase = 0
    mbarrier.wait(loaded.index(0), 0)
    for _ in range(SHARE):
        limit = 0
        if PACKED:  # counted from the first query of the tile
            row = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S))
            limit = gl.load(ends_ptr + row, mask=row < rows, other=0).to(gl.int32) - (first_tile + GROUP) * ROWS
        if GROUP == 1:  # the first tile sees the first group's keys alone
            mbarrier.wait(ring[4].index(slot), phase)
            refill = _leave(GROUP, source, ring, slot, refill, first_tile, tiles, steps, D, ROWS, STAGES)
            slot, phase = next_stage(slot, phase, STAGES)
        s = warpgroup_mma_wait(0, deps=(_scores(keys, ring, slot, phase, zero),))
        dk, dv = _add(s, dk, dv, values, ring, slot, zero, limit, True, PACKED, S, WEIGHTS)
        old = slot
        slot, phase = next_stage(slot, phase, STAGES)
        s, dk, dv = warpgroup_mma_wait(0, deps=(_scores(keys, ring, slot, phase, zero), dk, dv))
        refill = _leave(GROUP, source, ring, old, refill, first_tile, tiles, steps, D, ROWS, STAGES)
        for _ in range(first_tile + GROUP + 2, tiles):
            limit -= ROWS
            dk, dv = _add(s, dk, dv, values, ring, slot, zero, limit, False, PACKED, S, WEIGHTS)
            old = slot
            slot, phase = next_stage(slot, phase, STAGES)
            s, dk, dv = warpgroup_mma_wait(0, deps=(_scores(keys, ring, slot, phase, zero), dk, dv))
            refill = _leave(GROUP, source, ring, old, refill, first_tile, tiles, steps, D, ROWS, STAGES)
        limit -= ROWS
        dk, dv = _add(s, dk, dv, values, ring, slot, zero, limit, False, PACKED, S, WEIGHTS)
        dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
        refill = _leave(GROUP, source, ring, slot, refill, first_tile, tiles, steps, D, ROWS, STAGES)
        slot, phase = next_stage(slot, phase, STAGES)
    row = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, GRADIENT))[:, None]
    at = row * D + gl.arange(0, D, gl.SliceLayout(0, GRADIENT))[None, :]
    gl.store(dk_ptr + at, dk * LN_2, mask=row < rows)
    gl.store(dv_ptr + at, dv, mask=row < rows)


@gluon.jit
def ring_dkv_kernel(
    q_desc, dout_desc, lse_desc, delta_desc, k_desc, v_desc, dk_ptr, dv_ptr, ends_ptr,
    num_keys, heads, first_head, num_groups, group,
    WHICH: gl.constexpr, PACKED: gl.constexpr, SHARE: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
    STAGES: gl.constexpr, LAG: gl.constexpr,
):  # fmt: skip
    """Grid (blocks of 128 keys * num_groups, batch): early keys, which most queries see, first."""
    batch = gl.program_id(1)
    member, block = gl.program_id(0) % num_groups, gl.program_id(0) // num_groups
    h, kv = first_head + member, (first_head + member) // group
    key_tiles = (
        gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, D], TILE_LAYOUT),
        gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, D], TILE_LAYOUT),
        gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()),
    )
    ring = (
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, D], TILE_LAYOUT),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, D], TILE_LAYOUT),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], LINE_LAYOUT),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], LINE_LAYOUT),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    ks, vs, loaded = key_tiles
    mbarrier.init(loaded.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ring[4].index(i), count=1)
        mbarrier.init(ring[5].index(i), count=1)
    fence_async_shared()
    mbarrier.expect(loaded.index(0), 8 * ROWS * D)
    for i in gl.static_range(2):
        at = (2 * block + i) * ROWS
        tma.async_copy_global_to_shared(k_desc, [WHICH, batch, kv, at, 0], loaded.index(0), ks.index(i))
        tma.async_copy_global_to_shared(v_desc, [batch, kv, at, 0], loaded.index(0), vs.index(i))
    source = (q_desc, dout_desc, lse_desc, delta_desc, batch, heads, num_groups)
    # A group has two steps a head or more: it begins the second in the first. Tiles beyond the queries are zeros.
    first_tile = 2 * block
    seen_until = num_keys
    if PACKED:
        ends_ptr += batch.to(gl.int64) * num_keys
        last = gl.minimum((first_tile + 2) * ROWS, num_keys) - 1
        seen_until = gl.load(ends_ptr + last).to(gl.int32)
        ends_ptr += first_tile * ROWS
    tiles = gl.maximum(gl.cdiv(seen_until, ROWS), first_tile + 3)
    steps = (tiles - first_tile) * SHARE
    tile = first_tile
    next_h, next_tile = h, tile
    for i in gl.static_range(STAGES):
        _fill(source, ring, next_h, next_tile, i, i < steps, ROWS, D)
        next_h, next_tile = _next_tile(next_h, next_tile, first_tile, tiles, num_groups)
        if i < STAGES - LAG:
            h, tile = next_h, next_tile
    target = ((member * gl.num_programs(1) + batch).to(gl.int64) * num_keys + block * (2 * ROWS)) * D
    out = (dk_ptr + target, dv_ptr + target, num_keys - block * (2 * ROWS))
    # Constants may not stand in a tuple that has a name.
    gl.warp_specialize([
        (_dkv_group, (
            0, source, key_tiles, ring, out, first_tile, tiles, h, tile, ends_ptr, PACKED, SHARE, D, ROWS, STAGES, LAG
        )),
        (_dkv_group, (
            1, source, key_tiles, ring, out, first_tile, tiles, h, tile, ends_ptr, PACKED, SHARE, D, ROWS, STAGES, LAG
        )),
    ], [4], [256])  # fmt: skip
