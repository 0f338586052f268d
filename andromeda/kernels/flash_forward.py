"""The forward kernel: FlashAttention-2 (Dao 2023) with certified windows.

A program owns a tile of queries of one head and walks over the key blocks that the head can see: blocks cut by the
window or a document's border, whole blocks without a mask, blocks on the diagonal. Heads of one segment (local or
global, rotated or not) share a launch. Logits are in base 2: queries carry log2(e).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# Up to this bound (nats) 2^logit neither overflows in a float32 sum over millions of keys, nor does the key a query
# holds for itself vanish, so the running maximum is left out.
MAX_BOUND = tl.constexpr(40.0)
LOG2_E = tl.constexpr(1.4426950408889634)
NO_WINDOW = tl.constexpr(2**30)


@triton.jit
def dot(a, b, acc, WIDEN: tl.constexpr):
    """a @ b + acc. The interpreter's products are right in float32 only."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def head_window(windows_ptr, h, HAS_WINDOWS: tl.constexpr):
    """Tokens that head h sees, itself included."""
    window = NO_WINDOW
    if HAS_WINDOWS:
        window = tl.minimum(tl.load(windows_ptr + h), NO_WINDOW).to(tl.int32)
    return window


@triton.jit
def row_limits(first, last, starts_ptr, window, PACKED: tl.constexpr):
    """The first key that query `first` sees, and the first that query `last` (no earlier one) sees."""
    lo = tl.maximum(first - window + 1, 0)
    all_from = tl.maximum(last - window + 1, 0)
    if PACKED:
        lo = tl.maximum(lo, tl.load(starts_ptr + first).to(tl.int32))
        all_from = tl.maximum(all_from, tl.load(starts_ptr + last).to(tl.int32))
    return lo, all_from


@triton.jit
def _blocks(
    acc, total, top, q, keys, v, which, batch, kv, lo, hi,
    first, i, start, slope, window,
    MASKED: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr, ONLINE: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Key blocks lo, lo + BN, ... below hi."""
    ahead = slope * (i - first).to(tl.float32)
    for j0 in tl.range(lo, hi, BN):
        k = keys.load([which, batch, kv, j0, 0]).reshape(BN, D)
        s = dot(q, k.T, tl.zeros([BM, BN], tl.float32), WIDEN)
        j = j0 + tl.arange(0, BN)
        if LOCAL:
            s += (slope * (j - first).to(tl.float32))[None, :] - ahead[:, None]
        if MASKED:
            seen = j[None, :] <= i[:, None]
            if LOCAL:
                seen = seen & (j[None, :] > (i - window)[:, None])
            if PACKED:
                seen = seen & (j[None, :] >= start[:, None])
            s = tl.where(seen, s, float("-inf"))
        if ONLINE:
            new_top = tl.maximum(top, tl.max(s, 1))
            shrink = tl.exp2(top - new_top)
            total = total * shrink
            acc = acc * shrink[:, None]
            s = s - new_top[:, None]
            top = new_top
        p = tl.exp2(s)
        values = v.load([batch, kv, j0, 0]).reshape(BN, D)
        acc = dot(p.to(values.dtype), values, acc, WIDEN)
        total += tl.sum(p, 1)  # while the product runs
    return acc, total, top


@triton.jit
def _span(
    acc, total, top, q, keys, v, which, batch, kv, lo, hi,
    all_from, first, i, start, slope, window,
    LOCAL: tl.constexpr, PACKED: tl.constexpr, ONLINE: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Keys lo..hi - 1: cut on the left, whole, cut on the right."""
    left = lo
    if LOCAL or PACKED:
        left = tl.minimum(tl.maximum(tl.cdiv(all_from, BN) * BN, lo), hi)
    right = tl.maximum(tl.minimum((first + 1) // BN * BN, hi), left)
    if LOCAL or PACKED:
        acc, total, top = _blocks(
            acc, total, top, q, keys, v, which, batch, kv, lo, left, first, i, start, slope, window,
            True, LOCAL, PACKED, ONLINE, WIDEN, D, BM, BN,
        )  # fmt: skip
    acc, total, top = _blocks(
        acc, total, top, q, keys, v, which, batch, kv, left, right, first, i, start, slope, window,
        False, LOCAL, PACKED, ONLINE, WIDEN, D, BM, BN,
    )  # fmt: skip
    return _blocks(
        acc, total, top, q, keys, v, which, batch, kv, right, hi, first, i, start, slope, window,
        True, LOCAL, PACKED, ONLINE, WIDEN, D, BM, BN,
    )  # fmt: skip


@triton.jit
def _tile(
    q, keys, v, decay_ptr, which, batch, kv, lo, hi,
    all_from, first, i, start, slope, window,
    CHUNK: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr, ONLINE: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """All keys of a tile of queries; with xPos chunk by chunk, the queries decayed to each chunk's anchor."""
    acc = tl.zeros([BM, D], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], -1e30, tl.float32)
    if CHUNK > 0:
        log_decay = tl.load(decay_ptr + tl.arange(0, D) % (D // 2)) * CHUNK
        for chunk in range(lo // CHUNK, first // CHUNK + 1):
            behind = (first // CHUNK - chunk).to(tl.float32)
            aged = (q.to(tl.float32) * tl.exp2(log_decay * behind)[None, :]).to(q.dtype)
            acc, total, top = _span(
                acc, total, top, aged, keys, v, which, batch, kv, tl.maximum(lo, chunk * CHUNK),
                tl.minimum(hi, (chunk + 1) * CHUNK), all_from, first, i, start, slope, window,
                LOCAL, PACKED, ONLINE, WIDEN, D, BM, BN,
            )  # fmt: skip
    else:
        acc, total, top = _span(
            acc, total, top, q, keys, v, which, batch, kv, lo, hi, all_from, first, i, start, slope, window,
            LOCAL, PACKED, ONLINE, WIDEN, D, BM, BN,
        )  # fmt: skip
    return acc, total, top


@triton.jit
def forward_kernel(
    q_ptr, keys, v, out_ptr, lse_ptr,
    slopes_ptr, windows_ptr, bounds_ptr, starts_ptr, decay_ptr,
    q_b, q_t, q_h, out_b, out_t, out_h,
    queries, num_keys, heads, first_head, num_heads, group, tiles,
    WHICH: tl.constexpr, CHUNK: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
    HAS_WINDOWS: tl.constexpr, HAS_BOUNDS: tl.constexpr, ONLINE: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * num_heads, batch): the last tiles, which see the most keys, first.

    q, out (B, T, heads, D); keys (1 or 2, B, kv_heads, S, D) and v (B, kv_heads, S, D) as tensor descriptors;
    lse (B, heads, T), base 2.
    """
    batch = tl.program_id(1)
    h = first_head + num_heads - 1 - tl.program_id(0) // tiles
    offset = num_keys - queries
    first = (offset // BM + tiles - 1 - tl.program_id(0) % tiles) * BM  # a position; tiles are aligned to positions
    i = first + tl.arange(0, BM)
    row = i - offset
    inside = (row >= 0) & (row < queries)
    channel = tl.arange(0, D)
    q_ptrs = q_ptr + batch.to(tl.int64) * q_b + h * q_h + row.to(tl.int64)[:, None] * q_t + channel[None, :]
    q = tl.load(q_ptrs, mask=inside[:, None], other=0.0)

    window = head_window(windows_ptr, h, HAS_WINDOWS)
    slope = 0.0
    if LOCAL:
        slope = tl.load(slopes_ptr + h).to(tl.float32) * LOG2_E
    starts_ptr += batch.to(tl.int64) * num_keys
    start = i
    if PACKED:
        start = tl.load(starts_ptr + i, mask=inside, other=0).to(tl.int32)
    last = tl.minimum(first + BM, num_keys) - 1
    lo, all_from = row_limits(tl.maximum(first, offset), last, starts_ptr, window, PACKED)
    lo = lo // BN * BN

    if HAS_BOUNDS:  # noqa: SIM102 - two launches share the heads: one without the running maximum, one with
        if (tl.load(bounds_ptr + h).to(tl.float32) > MAX_BOUND) != ONLINE:
            return
    acc, total, top = _tile(
        q, keys, v, decay_ptr, WHICH, batch, h // group, lo, last + 1, all_from, first, i, start, slope, window,
        CHUNK, LOCAL, PACKED, ONLINE, WIDEN, D, BM, BN,
    )  # fmt: skip
    if not ONLINE:
        top = tl.zeros([BM], tl.float32)
    out_ptrs = out_ptr + batch.to(tl.int64) * out_b + h * out_h + row.to(tl.int64)[:, None] * out_t + channel[None, :]
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None])
    lse_ptrs = lse_ptr + (batch * heads + h).to(tl.int64) * queries + row
    tl.store(lse_ptrs, tl.log2(total) + top, mask=inside)
