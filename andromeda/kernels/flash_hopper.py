"""The forward kernel of global heads on a Hopper GPU, in Gluon: flash_forward.py's function for what attends to all.

A program owns 128 queries of a head, 64 for each of two warp groups. The copy engine (TMA) fills a ring of stages in
shared memory, each a block of 64 keys and its values, which both groups use: half the traffic of a group by itself.
Queries stay in registers, and the next block's keys are multiplied while a block's exponentials are taken.

The first group also fills the ring: a third one that did would leave each of them 168 registers, too few. It fills a
stage again LAG blocks after its own last use, so as not to wait for the other group. Between a product and its wait
there are predicates, no branches: at a branch the assembler makes each product wait.

The sums' order is fixed: results are the same bit for bit.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import torch
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

D, ROWS, KEYS = 128, 64, 64  # ROWS: queries of a warp group. KEYS: of a block
GROUPS = 2
RINGS = {torch.bfloat16: (6, 2), torch.float8_e4m3fn: (8, 4)}  # STAGES and LAG by the keys' type: 192 KiB of stages

MAX_BOUND = gl.constexpr(40.0)  # flash_forward.MAX_BOUND
VALUE_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


def launch(
    q: Tensor, keys: Tensor, v: Tensor, bounds: Tensor, out: Tensor, lse: Tensor, first_head: int, num_heads: int,
    which: int, out_scale: float,
) -> None:  # fmt: skip
    """flash_forward.forward_kernel for the heads from `first_head` on, of what `flash.fits_the_ring` admits.

    Heads whose bound is above MAX_BOUND are left alone.

    Args:
        q, out: (B, T, heads, 128), each in bfloat16 or e4m3. keys: (1 or 2, B, kv_heads, S, 128) in q's type, of which
            those of `which` are used. v: (B, S, kv_heads, 128) in bfloat16. Keys and values as tensor descriptors need
            them. bounds: (heads,), contiguous. lse: (B, heads, T) float32, base 2. out_scale: on out.
    """
    batch, queries, heads, _ = q.shape
    num_keys, tile, (stages, lag) = keys.shape[3], GROUPS * ROWS, RINGS[keys.dtype]
    tiles = (num_keys - 1) // tile - (num_keys - queries) // tile + 1
    ring_forward_kernel[(tiles * num_heads, batch)](
        q, descriptor(keys), descriptor(v.transpose(1, 2)), out, lse, bounds, *q.stride()[:3], *out.stride()[:3],
        queries, num_keys, heads, first_head, num_heads, heads // keys.shape[2], tiles, out_scale,
        WHICH=which, D=D, ROWS=ROWS, KEYS=KEYS, STAGES=stages, LAG=lag, num_warps=4,
    )  # fmt: skip


def descriptor(x: Tensor) -> TensorDescriptor:
    """(..., S, D): blocks of KEYS rows of one head; rows outside read as zeros."""
    block, layout = [1] * (x.dim() - 2) + [KEYS, D], gl.NVMMASharedLayout(128, 8 * x.element_size(), x.dim())
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


@gluon.jit
def next_stage(slot, phase, STAGES: gl.constexpr):
    """The stage after this one, and which use of it is meant, odd or even."""
    slot += 1
    wrapped = slot == STAGES
    return gl.where(wrapped, 0, slot), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def fill_block(source, ring, block, slot, pred, KEYS: gl.constexpr, D: gl.constexpr):
    """Asks for a block's keys and values."""
    k_desc, v_desc, which, batch, kv = source
    ks, vs, full, _ = ring
    BYTES: gl.constexpr = KEYS * D * (k_desc.dtype.primitive_bitwidth + v_desc.dtype.primitive_bitwidth) // 8
    at = block * KEYS
    mbarrier.expect(full.index(slot), BYTES, pred)
    tma.async_copy_global_to_shared(k_desc, [which, batch, kv, at, 0], full.index(slot), ks.index(slot), pred)
    tma.async_copy_global_to_shared(v_desc, [batch, kv, at, 0], full.index(slot), vs.index(slot), pred)


@gluon.jit
def leave_block(
    GROUP: gl.constexpr, source, ring, j, old, blocks, refilled, phase,
    KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
):  # fmt: skip
    """After a group's last use of block j - 1, in stage `old`. The first fills the stage of block j - 1 - LAG again.

    Returns the stage that it fills next, and its phase.
    """
    empty = ring[3]
    debug_barrier()  # no warp of the group reads the stage any more
    if GROUP == 0:
        done = j - 1 - LAG
        wanted = (done >= 0) & (done + STAGES < blocks)
        mbarrier.wait(empty.index(refilled), phase, pred=wanted)
        fill_block(source, ring, done + STAGES, refilled, wanted, KEYS, D)
        refilled, phase = next_stage(refilled, phase, STAGES)
    else:
        mbarrier.arrive(empty.index(old), count=1, pred=j > 0)
    return refilled, phase


@gluon.jit
def filled_ring(source, blocks, KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """A ring of blocks of keys and values, with a barrier for full and one for empty a stage; its first blocks come."""
    k_desc, v_desc, _, _, _ = source
    KEY_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, k_desc.dtype.primitive_bitwidth, 2)
    ring = (
        gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, D], KEY_LAYOUT),
        gl.allocate_shared_memory(v_desc.dtype, [STAGES, KEYS, D], VALUE_LAYOUT),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(ring[2].index(i), count=1)
        mbarrier.init(ring[3].index(i), count=1)
    fence_async_shared()
    for i in gl.static_range(STAGES):
        fill_block(source, ring, i, i, i < blocks, KEYS, D)
    return ring


@gluon.jit
def _sums(p):
    """(ROWS, KEYS) -> (ROWS, 8): each thread adds up what it holds."""
    return gl.sum(p.reshape(p.shape[0], p.shape[1] // 8, 8), axis=1)


@gluon.jit
def _group(
    GROUP: gl.constexpr, source, ring, tensors, tile,
    D: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
):  # fmt: skip
    """What warp group GROUP does: its rows of the tile, over all `blocks` of the ring or, if the first, one fewer."""
    queries_at, out_at, lse_ptr = tensors
    q_ptr, q_b, q_t, q_h = queries_at
    out_ptr, out_b, out_t, out_h = out_at
    first, offset, queries, heads, h, blocks, stored, out_scale = tile
    ks, vs, full, _ = ring
    BITS: gl.constexpr = ks.dtype.primitive_bitwidth
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 256 // BITS])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # noqa: E741 - of the output
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    first += GROUP * ROWS
    row = first - offset + gl.arange(0, ROWS, gl.SliceLayout(1, L))
    inside = ((row >= 0) & (row < queries))[:, None]
    row = row.to(gl.int64)[:, None]
    channel = gl.arange(0, D, gl.SliceLayout(0, L))[None, :]
    batch = source[3].to(gl.int64)
    q = gl.load(q_ptr + batch * q_b + h * q_h + row * q_t + channel, mask=inside, other=0.0)
    q = gl.convert_layout(q, gl.DotOperandLayout(0, S, 32 // BITS))
    own = gl.maximum(blocks - 1, 1) if GROUP == 0 else blocks
    zero = gl.zeros([ROWS, KEYS], gl.float32, S)
    acc = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, O))
    total = _sums(zero)
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(q, ks.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    old = 0
    slot = 0
    ahead, ahead_phase = next_stage(0, 0, STAGES)
    refilled = STAGES - 1 - LAG  # where block j - 1 - LAG was, j being 0
    refilled_phase = 1
    for j in range(own - 1):
        mbarrier.wait(full.index(ahead), ahead_phase)
        coming = warpgroup_mma(q, ks.index(ahead).permute((1, 0)), zero, use_acc=False, is_async=True)
        p = gl.exp2(s)
        total += _sums(p)
        p = gl.convert_layout(p.to(gl.bfloat16), WEIGHTS)
        acc = warpgroup_mma(p, vs.index(slot), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(coming,))  # the product with the values of block j - 1 is done as well
        refilled, refilled_phase = leave_block(
            GROUP, source, ring, j, old, blocks, refilled, refilled_phase, KEYS, D, STAGES, LAG
        )
        old = slot
        slot = ahead
        ahead, ahead_phase = next_stage(ahead, ahead_phase, STAGES)
    i = first + gl.arange(0, ROWS, gl.SliceLayout(1, S))
    k = (own - 1) * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, S))
    p = gl.exp2(gl.where(k[None, :] <= i[:, None], s, float("-inf")))
    total += _sums(p)
    p = gl.convert_layout(p.to(gl.bfloat16), WEIGHTS)
    acc = warpgroup_mma(p, vs.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mass = gl.sum(total, axis=1)
    out = acc * (out_scale / gl.convert_layout(mass, gl.SliceLayout(1, O)))[:, None]
    out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), L)
    gl.store(out_ptr + batch * out_b + h * out_h + row * out_t + channel, out, mask=inside & stored)
    line = i - offset
    mass = gl.convert_layout(mass, gl.SliceLayout(1, S))
    lse_at = lse_ptr + (batch * heads + h) * queries + line
    gl.store(lse_at, gl.log2(mass), mask=(line >= 0) & (line < queries) & stored)


@gluon.jit
def ring_forward_kernel(
    q_ptr, k_desc, v_desc, out_ptr, lse_ptr, bounds_ptr, q_b, q_t, q_h, out_b, out_t, out_h,
    queries, num_keys, heads, first_head, num_heads, group, tiles, out_scale,
    WHICH: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, LAG: gl.constexpr,
):  # fmt: skip
    """Grid (tiles * num_heads, batch), the longest tiles first, heads of a tile side by side.

    Tiles are aligned to positions: the first holds the first query, not always in its first row.
    """
    gl.static_assert(STAGES - LAG >= 3, "the last blocks would never be asked for")
    gl.static_assert(ROWS == KEYS, "a group's last block alone is cut by the diagonal")
    batch, program = gl.program_id(1), gl.program_id(0)
    h = first_head + program % num_heads
    stored = (gl.load(bounds_ptr + h).to(gl.float32) > MAX_BOUND) == 0  # where the bound is NaN as well
    offset = num_keys - queries
    first = (offset // (2 * ROWS) + tiles - 1 - program // num_heads) * (2 * ROWS)
    blocks = gl.where(stored, first // KEYS + 2, 1)  # a head that is left alone pays for one
    source = (k_desc, v_desc, WHICH, batch, h // group)
    ring = filled_ring(source, blocks, KEYS, D, STAGES)
    tensors = (q_ptr, q_b, q_t, q_h), (out_ptr, out_b, out_t, out_h), lse_ptr
    tile = (first, offset, queries, heads, h, blocks, stored, out_scale)
    # Constants may not stand in a tuple that has a name.
    gl.warp_specialize([
        (_group, (0, source, ring, tensors, tile, D, ROWS, KEYS, STAGES, LAG)),
        (_group, (1, source, ring, tensors, tile, D, ROWS, KEYS, STAGES, LAG)),
    ], [4], [256])  # fmt: skip
