"""The forward kernel: FlashAttention-2 (Dao 2023) with certified windows.

A program owns a tile of queries of one head and walks over the key blocks that the head can see; only blocks that the
diagonal, the window or a document's border cuts are masked. Heads of one segment (local or global, rotated or not)
share a launch. Logits are in base 2: queries carry log2(e).
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
def head_slope(slopes_ptr, h, LOCAL: tl.constexpr):
    """What head h loses a token of distance, in base 2."""
    slope = 0.0
    if LOCAL:
        slope = tl.load(slopes_ptr + h).to(tl.float32) * LOG2_E
    return slope


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
def mask(i, j, start, window, LOCAL: tl.constexpr, PACKED: tl.constexpr):
    """Whether a query at position i, of a document that begins at `start`, sees key j."""
    seen = j <= i
    if LOCAL:
        seen = seen & (j > i - window)
    if PACKED:
        seen = seen & (j >= start)
    return seen


@triton.jit
def _products(q, keys, which, batch, kv, j0, WIDEN: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(BM, BN) q.k of the block of keys at j0; zeros where there are no keys."""
    k = keys.load([which, batch, kv, j0, 0]).reshape(BN, D)
    return dot(q, k.T, tl.zeros([BM, BN], tl.float32), WIDEN)


@triton.jit
def _span(
    acc, total, top, q, keys, v, which, batch, kv, lo, hi,
    all_from, first, i, start, slope, window,
    LOCAL: tl.constexpr, PACKED: tl.constexpr, ONLINE: tl.constexpr, AHEAD: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Key blocks lo, lo + BN, ... below hi. One loop, because each fills the pipeline anew: a branch for the masks.

    AHEAD: the next block's q.k runs under this one's exponentials (FlashAttention-3, Shah et al. 2024, section 3.2).
    """
    ahead = slope * (i - first).to(tl.float32)
    s_next = tl.zeros([BM, BN], tl.float32)
    if AHEAD:
        s_next = _products(q, keys, which, batch, kv, lo, WIDEN, D, BM, BN)
    for j0 in tl.range(lo, hi, BN):
        if AHEAD:
            s = s_next
            s_next = _products(q, keys, which, batch, kv, j0 + BN, WIDEN, D, BM, BN)
        else:
            s = _products(q, keys, which, batch, kv, j0, WIDEN, D, BM, BN)
        j = j0 + tl.arange(0, BN)
        if LOCAL:
            s += (slope * (j - first).to(tl.float32))[None, :] - ahead[:, None]
        if (j0 < all_from) | (j0 + BN > first + 1):
            s = tl.where(mask(i[:, None], j[None, :], start[:, None], window, LOCAL, PACKED), s, float("-inf"))
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
def forward_kernel(
    q_ptr, keys, v, out_ptr, lse_ptr,
    slopes_ptr, windows_ptr, bounds_ptr, starts_ptr, decay_ptr,
    q_b, q_t, q_h, out_b, out_t, out_h,
    queries, num_keys, heads, first_head, num_heads, group, tiles,
    WHICH: tl.constexpr, CHUNK: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
    HAS_WINDOWS: tl.constexpr, HAS_BOUNDS: tl.constexpr, ONLINE: tl.constexpr, AHEAD: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * num_heads, batch): the last tiles, which see the most keys, first.

    q, out (B, T, heads, D); keys (1 or 2, B, kv_heads, S, D) and v (B, kv_heads, S, D) as tensor descriptors;
    lse (B, heads, T), base 2.
    """
    batch = tl.program_id(1)
    h = first_head + num_heads - 1 - tl.program_id(0) // tiles
    if HAS_BOUNDS:  # noqa: SIM102 - two launches share the heads: one without the running maximum, one with
        if (tl.load(bounds_ptr + h).to(tl.float32) > MAX_BOUND) != ONLINE:
            return
    offset = num_keys - queries
    first = (offset // BM + tiles - 1 - tl.program_id(0) % tiles) * BM  # a position; tiles are aligned to positions
    i = first + tl.arange(0, BM)
    row = i - offset
    inside = (row >= 0) & (row < queries)
    channel = tl.arange(0, D)
    q_ptrs = q_ptr + batch.to(tl.int64) * q_b + h * q_h + row.to(tl.int64)[:, None] * q_t + channel[None, :]
    q = tl.load(q_ptrs, mask=inside[:, None], other=0.0)

    window = head_window(windows_ptr, h, HAS_WINDOWS)
    slope = head_slope(slopes_ptr, h, LOCAL)
    starts_ptr += batch.to(tl.int64) * num_keys
    start = i
    if PACKED:
        start = tl.load(starts_ptr + i, mask=inside, other=0).to(tl.int32)
    last = tl.minimum(first + BM, num_keys) - 1
    lo, all_from = row_limits(tl.maximum(first, offset), last, starts_ptr, window, PACKED)
    lo = lo // BN * BN

    acc = tl.zeros([BM, D], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], -1e30, tl.float32)
    chunks, log_decay = 1, 0.0
    if CHUNK > 0:
        chunks = first // CHUNK - lo // CHUNK + 1
        log_decay = tl.load(decay_ptr + tl.arange(0, D) % (D // 2))[None, :] * CHUNK
    for chunk in range(chunks):
        aged, begin, stop = q, lo, last + 1
        if CHUNK > 0:  # xPos: the queries as seen from this chunk's anchor
            aged = (q.to(tl.float32) * tl.exp2(log_decay * (chunks - 1 - chunk))).to(q.dtype)
            begin = tl.maximum(lo, (lo // CHUNK + chunk) * CHUNK)
            stop = tl.minimum(last + 1, (lo // CHUNK + chunk + 1) * CHUNK)
        acc, total, top = _span(
            acc, total, top, aged, keys, v, WHICH, batch, h // group, begin, stop, all_from, first, i, start, slope,
            window, LOCAL, PACKED, ONLINE, AHEAD, WIDEN, D, BM, BN,
        )  # fmt: skip
    if not ONLINE:
        top = tl.zeros([BM], tl.float32)
    out_ptrs = out_ptr + batch.to(tl.int64) * out_b + h * out_h + row.to(tl.int64)[:, None] * out_t + channel[None, :]
    tl.store(out_ptrs, (acc * (1.0 / total)[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None])
    lse_ptrs = lse_ptr + (batch * heads + h).to(tl.int64) * queries + row
    tl.store(lse_ptrs, tl.log2(total) + top, mask=inside)
