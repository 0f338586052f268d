"""Decode of one token of one sequence on a Hopper GPU, in Gluon: the function of decode.py at the speed of a copy.

One program a multiprocessor takes every so-manieth tile (a page of 64 keys). The copy engine (TMA) fills a ring of
tiles in shared memory, which no register and no instruction of the tile's arithmetic waits for; products take them from
there with keys as rows (`wgmma`), so a tile costs few instructions: 16 heads, not 64 rows, are weighed for each key.

What is small (length, pages, queries, tables) is asked for before the ring: behind 17 MB of tiles it would wait for
microseconds. The first tiles are the oldest, whose place does not hang on the length; then come the newest, which the
local heads see too, while the ring is full, and the others backwards.

The local heads' keys are rotated in the ring, after the global heads' products. A tile's anchor is its last key, also
where that lies beyond the length: a table rotates the keys, and the queries are rotated by their distance to it.

`merge_kernel` adds the parts up, in the programs' order: results are the same bit for bit. It is launched before they
are there (programmatic dependent launch).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

from collections.abc import Sequence

import torch
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
from triton.language.extra.cuda.gdc import gdc_launch_dependents, gdc_wait
from triton.language.extra.cuda.libdevice import fast_cosf, fast_sinf

D, PAGE, ROWS = 128, 64, 16  # ROWS: heads of a set
STAGES = 4
CHANNELS = 32  # of a head, added up by one program

LOG2_E = gl.constexpr(1.4426950408889634)
TURN = gl.constexpr(6.283185307179586)
MAX_BOUND = gl.constexpr(40.0)  # flash_forward.MAX_BOUND
KEEP = gl.constexpr("evict_last")
TILE_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)
WEIGHT_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(2 * ROWS, 16, 2))


def launch(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, slopes: Tensor, windows: Tensor,
    bounds: Tensor, tables: Sequence[Tensor], cut: int, programs: int,
) -> Tensor:  # fmt: skip
    """decode.launch for what `decode.fits_the_ring` admits; `tables` are decode's, for tiles of 64 keys.

    Heads below `cut` have slopes and windows and are rotated; the others, at most 16 as well, see everything.
    """
    heads, tiles = q.shape[2], page_table.shape[1]
    parts = torch.empty(programs, heads, D, dtype=torch.float32, device=q.device)
    tops, totals = torch.empty(2, programs, heads, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    keys, values = (
        TensorDescriptor(x, [x.shape[0] * PAGE, D], [x.stride(1), 1], [PAGE, D], TILE_LAYOUT)
        for x in (k_pages, v_pages)
    )
    ring_kernel[(programs,)](
        q, keys, values, page_table, lengths, slopes, windows, bounds, *tables, parts, tops, totals, q.stride(2), tiles,
        CUT=cut, GROUP=heads, D=D, PAGE=PAGE, ROWS=ROWS, STAGES=STAGES, PROGRAMS=programs,
        TABLE=max(32, triton.next_power_of_2(triton.cdiv(tiles, programs))), num_warps=4,
    )  # fmt: skip
    merge_kernel[(heads * (D // CHANNELS),)](
        parts, tops, totals, bounds, out, GROUP=heads, D=D, PROGRAMS=programs, CHANNELS=CHANNELS, num_warps=8,
        launch_pdl=True,
    )  # fmt: skip
    return out


@gluon.jit
def _all_bounded(bounds_ptr, GROUP: gl.constexpr, LINE: gl.constexpr):
    """Whether all heads go without the running maximum. Each warp asks for all: then one instruction tells, and the
    compiler knows that no warp parts in two, without which it takes addresses of products from registers, one by one.
    """
    head = gl.arange(0, 32, LINE)
    bounds = gl.load(bounds_ptr + head, mask=head < GROUP, other=0.0, eviction_policy=KEEP)
    return gl.max((bounds.to(gl.float32) > MAX_BOUND).to(gl.int32), axis=0) == 0


@gluon.jit
def _longest(windows_ptr, CUT: gl.constexpr, LINE: gl.constexpr):
    """The longest window of the local heads; as above."""
    head = gl.arange(0, 32, LINE)
    window = gl.load(windows_ptr + head, mask=head < CUT, other=0, eviction_policy=KEEP)
    return gl.max(gl.minimum(window, 2147483647).to(gl.int32), axis=0)


@gluon.jit
def _fill(k_desc, v_desc, page, ring, slot, pred, PAGE: gl.constexpr, D: gl.constexpr):
    """Asks for a page's keys and values."""
    ks, vs, full = ring
    mbarrier.expect(full.index(slot), 4 * PAGE * D, pred)
    tma.async_copy_global_to_shared(k_desc, [page * PAGE, 0], full.index(slot), ks.index(slot), pred)
    tma.async_copy_global_to_shared(v_desc, [page * PAGE, 0], full.index(slot), vs.index(slot), pred)


@gluon.jit
def _tile(k, p, tiles, rounds, STAGES: gl.constexpr, PROGRAMS: gl.constexpr):
    """Which tile program p takes as the k-th, given how many rounds of the newest there are.

    The last programs have one more, those left over. So the others take their first two before them: of the newest,
    which cost more.
    """
    others = PROGRAMS - gl.maximum(tiles - STAGES * PROGRAMS, 0) % PROGRAMS
    r = k - STAGES
    first_two = gl.where(p < others, p + r * others, others + p + r * (PROGRAMS - others))
    behind = gl.where((r < 2) & (rounds >= 2), first_two, p + r * PROGRAMS)
    left_over = STAGES * PROGRAMS + PROGRAMS - 1 - p
    return gl.where(k < STAGES, p + k * PROGRAMS, gl.where(r < rounds, tiles - 1 - behind, left_over))


@gluon.jit
def _weighed(state, s, ONLINE: gl.constexpr):
    """A set's state, and the weights (PAGE, ROWS) of base-2 logits s.

    The state: accumulator (D, ROWS), running maximum (ROWS), sums (PAGE, ROWS) of every PAGE-th key.
    """
    acc, top, sums = state
    if ONLINE:
        new_top = gl.maximum(top, gl.max(s, axis=0))
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
        scale = gl.exp2(top - base)[None, :]
        acc = acc * scale
        sums = sums * scale
        top = new_top
        s = s - base[None, :]
    weights = gl.exp2(s).to(gl.bfloat16)  # what is summed is what weighs the values
    return acc, top, sums + weights.to(gl.float32), weights


@gluon.jit
def _local(
    state, keys, values, weight_tile, query_tile, rotation, tile, length, slope, window,
    D: gl.constexpr, PAGE: gl.constexpr, S: gl.constexpr, BLOCKED: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """A tile more in the state of the local heads. Keys are rotated where they lie."""
    q1s, q2s, coss, sins, turns, decays = rotation
    k1, k2 = keys.slice(0, D // 2, dim=1), keys.slice(D // 2, D // 2, dim=1)
    x1, x2 = k1.load(BLOCKED).to(gl.float32), k2.load(BLOCKED).to(gl.float32)
    cos, sin = coss.load(BLOCKED).to(gl.float32), sins.load(BLOCKED).to(gl.float32)
    k1.store((x1 * cos + x2 * sin).to(gl.bfloat16))
    k2.store((x2 * cos - x1 * sin).to(gl.bfloat16))
    ahead = length - tile * PAGE - PAGE  # of the tile's last key; negative where that lies beyond the length
    angle = ahead.to(gl.float64) * turns.load(gl.SliceLayout(0, BLOCKED))
    angle = (angle - gl.floor(angle + 0.5)).to(gl.float32) * TURN
    scale = gl.exp2(ahead.to(gl.float32) * decays.load(gl.SliceLayout(0, BLOCKED)))
    cos, sin = (fast_cosf(angle) * scale)[None, :], (fast_sinf(angle) * scale)[None, :]
    q1, q2 = q1s.load(BLOCKED).to(gl.float32), q2s.load(BLOCKED).to(gl.float32)
    query_tile.slice(0, D // 2, dim=1).store((q1 * cos - q2 * sin).to(gl.bfloat16))
    query_tile.slice(D // 2, D // 2, dim=1).store((q2 * cos + q1 * sin).to(gl.bfloat16))
    fence_async_shared()
    s = warpgroup_mma(keys, query_tile.permute((1, 0)), gl.zeros_like(state[2]), use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    distance = (length - 1 - tile * PAGE - gl.arange(0, PAGE, gl.SliceLayout(1, S)))[:, None]
    s = s * LOG2_E - slope[None, :] * distance.to(gl.float32)
    s = gl.where((distance >= 0) & (distance < window[None, :]), s, float("-inf"))
    acc, top, sums, weights = _weighed(state, s, ONLINE)
    weight_tile.store(weights)
    fence_async_shared()
    acc = warpgroup_mma(values.permute((1, 0)), weight_tile, acc, is_async=True)
    return warpgroup_mma_wait(0, deps=(acc,)), top, sums


@gluon.jit
def _clear(values, beyond, PAGE: gl.constexpr):
    """Values from row `beyond` on become 0: they may be anything, NaN too."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    row = gl.arange(0, PAGE, gl.SliceLayout(1, L))[:, None]
    x = values.load(L)
    values.store(gl.where(row < beyond, x, gl.zeros_like(x)))


@gluon.jit
def _walk(
    k_desc, v_desc, ring, ids, q_tile, work, rotation, p, n, rounds, length, tile_a, slope, window,
    D: gl.constexpr, PAGE: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
    TABLE: gl.constexpr, S: gl.constexpr, BLOCKED: gl.constexpr, LINE: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """The states of the local and of the global heads after a program's tiles, the first of which are on their way.

    Without ONLINE the values' product runs on until the next tile's scores are there; its slot is filled again then.
    """
    LAZY: gl.constexpr = not ONLINE
    ks, vs, full = ring
    weight_tile, local_tile, query_tile = work
    tiles = gl.cdiv(length, PAGE)
    start = gl.full([ROWS], float("-inf") if ONLINE else 0.0, gl.float32, gl.SliceLayout(0, S))
    zero = gl.zeros([PAGE, ROWS], gl.float32, S)
    local = (gl.zeros([D, ROWS], gl.float32, S), start, zero)
    acc = gl.zeros([D, ROWS], gl.float32, S)
    if LAZY:
        acc = warpgroup_mma_init(acc)
    top = start
    sums = zero
    slot = 0
    before = 0
    phase = 0
    for k in range(n):
        tile = _tile(k, p, tiles, rounds, STAGES, PROGRAMS)
        refilled = k - 1 if LAZY else k
        page = gl.max(ids.index(gl.minimum(refilled + STAGES, TABLE - 1)).load(LINE), axis=0)
        wanted = (refilled >= 0) & (refilled + STAGES < n)
        mbarrier.wait(full.index(slot), phase)
        keys = ks.index(slot)
        values = vs.index(slot)
        s = warpgroup_mma(keys, q_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        if LAZY:
            s, done = warpgroup_mma_wait(0, deps=(s, acc))
            debug_barrier()  # no warp reads the slot any more
            _fill(k_desc, v_desc, page, ring, before, wanted, PAGE, D)
        else:
            s = warpgroup_mma_wait(0, deps=(s,))
            done = acc
        s *= LOG2_E
        left = length - tile * PAGE
        if left < PAGE:
            s = gl.where(gl.arange(0, PAGE, gl.SliceLayout(1, S))[:, None] < left, s, float("-inf"))
            _clear(values, left, PAGE)
        done, top, sums, weights = _weighed((done, top, sums), s, ONLINE)
        weight_tile.store(weights)
        fence_async_shared()
        acc = warpgroup_mma(values.permute((1, 0)), weight_tile, done, is_async=True)
        if tile >= tile_a:
            local = _local(
                local, keys, values, local_tile, query_tile, rotation, tile, length, slope, window,
                D, PAGE, S, BLOCKED, ONLINE,
            )  # fmt: skip
        if not LAZY:
            acc = warpgroup_mma_wait(0, deps=(acc,))
            debug_barrier()  # no warp reads the slot any more
            _fill(k_desc, v_desc, page, ring, slot, wanted, PAGE, D)
        before = slot
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
    if LAZY:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    return local, (acc, top, sums)


@gluon.jit
def _store_set(acc, top, at, real, parts_ptr, tops_ptr, D: gl.constexpr, S: gl.constexpr):
    """A set's accumulator and maxima to rows `at` + 0..ROWS - 1, of which `real` exist."""
    ALONG: gl.constexpr = gl.BlockedLayout([4, 1], [32, 1], [1, 4], [0, 1])
    row = gl.arange(0, acc.shape[1], gl.SliceLayout(0, ALONG))
    channel = gl.arange(0, D, gl.SliceLayout(1, ALONG))
    where = parts_ptr + ((at + row) * D)[None, :] + channel[:, None]
    gl.store(where, gl.convert_layout(acc, ALONG), mask=(row < real)[None, :])
    row = gl.arange(0, acc.shape[1], gl.SliceLayout(0, S))
    gl.store(tops_ptr + at + row, top, mask=row < real)


@gluon.jit
def _store(
    local, far, p, parts_ptr, tops_ptr, totals_ptr,
    CUT: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """A program's part of every head."""
    _store_set(local[0], local[1], p * GROUP, CUT, parts_ptr, tops_ptr, D, S)
    _store_set(far[0], far[1], p * GROUP + CUT, GROUP - CUT, parts_ptr, tops_ptr, D, S)
    local_total, far_total = gl.split(gl.sum(gl.join(local[2], far[2]), axis=0))
    row = gl.arange(0, local_total.shape[0], local_total.type.layout)
    gl.store(totals_ptr + p * GROUP + row, local_total, mask=row < CUT)
    gl.store(totals_ptr + p * GROUP + CUT + row, far_total, mask=CUT + row < GROUP)


@gluon.jit
def ring_kernel(
    q_ptr, k_desc, v_desc, pages_ptr, lengths_ptr, slopes_ptr, windows_ptr, bounds_ptr,
    cos_ptr, sin_ptr, turns_ptr, decay_ptr, parts_ptr, tops_ptr, totals_ptr, stride_head, num_pages,
    CUT: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, ROWS: gl.constexpr,
    STAGES: gl.constexpr, PROGRAMS: gl.constexpr, TABLE: gl.constexpr,
):  # fmt: skip
    """Grid (PROGRAMS,). A program leaves its part of the softmax of every head, not yet divided by its sum."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    BLOCKED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    gdc_launch_dependents()
    p = gl.program_id(0)
    length = gl.load(lengths_ptr, eviction_policy=KEEP)
    pages = ()
    for i in gl.static_range(STAGES):  # some may lie beyond the length: these are not used
        at = p + i * PROGRAMS
        pages = pages + (gl.load(pages_ptr + at, mask=at < num_pages, other=0, eviction_policy=KEEP),)  # noqa: RUF005
    row = gl.arange(0, ROWS, gl.SliceLayout(1, BLOCKED))[:, None]
    pair = gl.arange(0, D // 2, gl.SliceLayout(0, BLOCKED))
    q_at = q_ptr + row * stride_head + pair[None, :]
    far_at = q_at + CUT * stride_head
    far1 = gl.load(far_at, mask=CUT + row < GROUP, other=0.0)
    far2 = gl.load(far_at + D // 2, mask=CUT + row < GROUP, other=0.0)
    q1 = gl.load(q_at, mask=row < CUT, other=0.0)
    q2 = gl.load(q_at + D // 2, mask=row < CUT, other=0.0)
    head = gl.arange(0, ROWS, gl.SliceLayout(0, S))
    window = gl.load(windows_ptr + head, mask=head < CUT, other=0, eviction_policy=KEEP)
    slope = gl.load(slopes_ptr + head, mask=head < CUT, other=0.0, eviction_policy=KEEP).to(gl.float32) * LOG2_E
    reach = _longest(windows_ptr, CUT, LINE)
    bounded = _all_bounded(bounds_ptr, GROUP, LINE)
    behind = PAGE - 1 - gl.arange(0, PAGE, gl.SliceLayout(1, BLOCKED))
    table_at = behind[:, None] * (D // 2) + pair[None, :]
    cos = gl.load(cos_ptr + table_at, eviction_policy=KEEP)
    sin = gl.load(sin_ptr + table_at, eviction_policy=KEEP)
    turns = gl.load(turns_ptr + pair, eviction_policy=KEEP)
    decay = gl.load(decay_ptr + pair, eviction_policy=KEEP)
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, PAGE, D], k_desc.layout)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, PAGE, D], v_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    ring = (ks, vs, full)
    tiles = gl.cdiv(length, PAGE)
    rest = gl.maximum(tiles - STAGES * PROGRAMS, 0)  # that do not lie at places known before the length is
    rounds = rest // PROGRAMS
    n = gl.where(tiles <= STAGES * PROGRAMS, gl.cdiv(gl.maximum(tiles - p, 0), PROGRAMS), STAGES + rounds)
    n += (PROGRAMS - 1 - p < rest % PROGRAMS).to(gl.int32)
    k = gl.arange(0, TABLE, LINE)
    at = _tile(k, p, tiles, rounds, STAGES, PROGRAMS)
    of_program = gl.load(pages_ptr + at, mask=k < n, other=0, eviction_policy=KEEP)
    for i in gl.static_range(STAGES):
        _fill(k_desc, v_desc, pages[i], ring, i, i < n, PAGE, D)
    q_tile = gl.allocate_shared_memory(gl.bfloat16, [ROWS, D], k_desc.layout)
    q_tile.slice(0, D // 2, dim=1).store(far1)
    q_tile.slice(D // 2, D // 2, dim=1).store(far2)
    ids = gl.allocate_shared_memory(gl.int32, [TABLE], FLAT, of_program)._reinterpret(gl.int32, [TABLE, 1], FLAT)
    rotation = (
        gl.allocate_shared_memory(gl.bfloat16, [ROWS, D // 2], PLAIN, q1),
        gl.allocate_shared_memory(gl.bfloat16, [ROWS, D // 2], PLAIN, q2),
        gl.allocate_shared_memory(gl.float16, [PAGE, D // 2], PLAIN, cos),
        gl.allocate_shared_memory(gl.float16, [PAGE, D // 2], PLAIN, sin),
        gl.allocate_shared_memory(gl.float64, [D // 2], FLAT, turns),
        gl.allocate_shared_memory(gl.float32, [D // 2], FLAT, decay),
    )
    work = (
        gl.allocate_shared_memory(gl.bfloat16, [PAGE, ROWS], WEIGHT_LAYOUT),
        gl.allocate_shared_memory(gl.bfloat16, [PAGE, ROWS], WEIGHT_LAYOUT),
        gl.allocate_shared_memory(gl.bfloat16, [ROWS, D], k_desc.layout),
    )
    fence_async_shared()
    window = gl.minimum(window, 2147483647).to(gl.int32)
    tile_a = gl.maximum(length - reach, 0) // PAGE
    if bounded:
        local, far = _walk(
            k_desc, v_desc, ring, ids, q_tile, work, rotation, p, n, rounds, length, tile_a, slope, window,
            D, PAGE, ROWS, STAGES, PROGRAMS, TABLE, S, BLOCKED, LINE, False,
        )  # fmt: skip
    else:
        local, far = _walk(
            k_desc, v_desc, ring, ids, q_tile, work, rotation, p, n, rounds, length, tile_a, slope, window,
            D, PAGE, ROWS, STAGES, PROGRAMS, TABLE, S, BLOCKED, LINE, True,
        )  # fmt: skip
    _store(local, far, p, parts_ptr, tops_ptr, totals_ptr, CUT, GROUP, D, S)


@gluon.jit
def merge_kernel(
    parts_ptr, tops_ptr, totals_ptr, bounds_ptr, out_ptr,
    GROUP: gl.constexpr, D: gl.constexpr, PROGRAMS: gl.constexpr, CHANNELS: gl.constexpr,
):  # fmt: skip
    """Grid (GROUP * D // CHANNELS,): out (GROUP, D), the parts' sum over their mass; 0 where nothing was seen."""
    WARPS: gl.constexpr = gl.num_warps()
    LANES: gl.constexpr = CHANNELS // 4
    AT_ONCE: gl.constexpr = 32 // LANES * WARPS
    STEPS: gl.constexpr = (PROGRAMS + AT_ONCE - 1) // AT_ONCE
    L: gl.constexpr = gl.BlockedLayout([1, 4], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    head = gl.program_id(0) // (D // CHANNELS)
    channel = gl.program_id(0) % (D // CHANNELS) * CHANNELS + gl.arange(0, CHANNELS, gl.SliceLayout(0, L))
    bounded = _all_bounded(bounds_ptr, GROUP, gl.BlockedLayout([1], [32], [WARPS], [0]))
    gdc_wait()
    parts = ()
    totals = ()
    for i in gl.static_range(STEPS):  # all are asked for before any is waited for
        slot = i * AT_ONCE + gl.arange(0, AT_ONCE, gl.SliceLayout(1, L))
        at = slot * GROUP + head
        of = slot < PROGRAMS
        part = gl.load(parts_ptr + (at * D)[:, None] + channel[None, :], mask=of[:, None], other=0.0)
        parts = parts + (part,)  # noqa: RUF005
        totals = totals + (gl.load(totals_ptr + at, mask=of, other=0.0),)  # noqa: RUF005
    acc = gl.zeros([AT_ONCE, CHANNELS], gl.float32, L)
    total = gl.zeros([AT_ONCE], gl.float32, gl.SliceLayout(1, L))
    if bounded:
        for i in gl.static_range(STEPS):
            acc += parts[i]
            total += totals[i]
    else:
        tops = ()
        top = gl.full([AT_ONCE], float("-inf"), gl.float32, gl.SliceLayout(1, L))
        for i in gl.static_range(STEPS):
            slot = i * AT_ONCE + gl.arange(0, AT_ONCE, gl.SliceLayout(1, L))
            tops = tops + (  # noqa: RUF005
                gl.load(tops_ptr + slot * GROUP + head, mask=slot < PROGRAMS, other=float("-inf")),
            )
            top = gl.maximum(top, tops[i])
        base = gl.max(top, axis=0)
        base = gl.where(base == float("-inf"), 0.0, base)
        for i in gl.static_range(STEPS):
            weight = gl.exp2(tops[i] - base)
            acc += parts[i] * weight[:, None]
            total += totals[i] * weight
    mass = gl.sum(total, axis=0)
    out = gl.where(mass > 0, gl.sum(acc, axis=0) / gl.where(mass > 0, mass, 1.0), 0.0)
    gl.store(out_ptr + head * D + channel, out.to(gl.bfloat16))
