"""The forward kernel: FlashAttention-2 (Dao 2023) with certified windows.

A program owns a tile of queries of one head and walks over the key blocks that the head can see; only blocks that the
diagonal, the window or a document's border cuts are masked. Heads of one segment (local or global, rotated or not)
share a launch. Logits are in base 2: queries carry log2(e).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# Up to this bound (nats), and up to MAX_ALIBI more either way at half a tile's distance, 2^logit neither overflows in a
# float32 sum over millions of keys, nor does the key a query holds for itself vanish, so the running maximum is left
# out. (bfloat16 has that range too, float16 has not.)
MAX_BOUND = tl.constexpr(40.0)
MAX_ALIBI = tl.constexpr(32.0)
LOG2_E = tl.constexpr(1.4426950408889634)
NO_WINDOW = tl.constexpr(2**30)


@triton.jit
def dot(a, b, acc, WIDEN: tl.constexpr):
    """a @ b + acc. The interpreter's products are right in float32 only."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


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
def head_and_tile(program, first_head, num_heads, tiles, LOCAL: tl.constexpr):
    """Of a program, the longest work first: the last tiles see the most keys.

    Global heads take a tile side by side: together they read the same keys, which need not stay in the L2 cache for
    long. Local ones take turns, the last first: of a power of two of them it has the widest window.
    """
    if LOCAL:
        return first_head + num_heads - 1 - program // tiles, tiles - 1 - program % tiles
    return first_head + program % num_heads, tiles - 1 - program // num_heads


@triton.jit
def query_tile(
    tile, h, batch, windows_ptr, starts_ptr, queries, num_keys,
    PACKED: tl.constexpr, HAS_WINDOWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile's first position, positions and rows, which of these there are, their documents' starts, the window, and
    of the keys the first block that a row sees, the end, and the first key that every row behind it sees.

    Tiles are aligned to positions: the first holds the first query, not always in its first row.
    """
    offset = num_keys - queries
    first = (offset // BM + tile) * BM
    i = first + tl.arange(0, BM)
    row = i - offset
    inside = (row >= 0) & (row < queries)
    nearest, last = tl.maximum(first, offset), tl.minimum(first + BM, num_keys) - 1
    window = head_window(windows_ptr, h, HAS_WINDOWS)
    lo = tl.maximum(nearest - window + 1, 0)
    all_from = tl.maximum(last - window + 1, 0)
    start = i
    if PACKED:
        starts_ptr += batch.to(tl.int64) * num_keys
        start = tl.load(starts_ptr + i, mask=inside, other=0).to(tl.int32)
        lo = tl.maximum(lo, tl.load(starts_ptr + nearest).to(tl.int32))
        all_from = tl.maximum(all_from, tl.load(starts_ptr + last).to(tl.int32))
    return first, i, row.to(tl.int64), inside, start, window, lo // BN * BN, last + 1, all_from


@triton.jit
def in_chunk(x, log_decay, chunk, away, lo, hi, CHUNK: tl.constexpr):
    """x as seen from the anchor of a chunk `away` chunks off, and what of lo..hi - 1 lies in that chunk."""
    if CHUNK > 0:
        x = (x.to(tl.float32) * tl.exp2(log_decay * away)).to(x.dtype)
        lo = tl.maximum(lo, chunk * CHUNK)
        hi = tl.minimum(hi, (chunk + 1) * CHUNK)
    return x, lo, hi


@triton.jit
def chunk_decay(decay_ptr, CHUNK: tl.constexpr, D: tl.constexpr):
    """(1, D) base-2 logarithm of xPos's decay over a chunk; 0 without chunks."""
    log_decay = 0.0
    if CHUNK > 0:
        log_decay = tl.load(decay_ptr + tl.arange(0, D) % (D // 2))[None, :] * CHUNK
    return log_decay


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
def _needs_maximum(bounds_ptr, slopes_ptr, h, LOCAL: tl.constexpr, BM: tl.constexpr):
    """Whether the logits of head h may leave float32's range."""
    needs = tl.load(bounds_ptr + h).to(tl.float32) > MAX_BOUND
    if LOCAL:
        needs = needs | (tl.load(slopes_ptr + h).to(tl.float32) * (BM // 2) > MAX_ALIBI)
    return needs


@triton.jit
def _span(
    acc, total, top, q, keys, v, which, batch, kv, lo, hi,
    all_from, first, i, start, slope, window,
    LOCAL: tl.constexpr, PACKED: tl.constexpr, ONLINE: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Key blocks lo, lo + BN, ... below hi. One loop, because each fills the pipeline anew: a branch for the masks.

    ALiBi is counted from the middle of the tile, not from each query: a row's softmax does not see the difference.
    """
    for j0 in tl.range(lo, hi, BN):
        k = keys.load([which, batch, kv, j0, 0]).reshape(BN, D)
        s = dot(q, k.T, tl.zeros([BM, BN], tl.float32), WIDEN)
        j = j0 + tl.arange(0, BN)
        if LOCAL:
            s += (slope * (j - first - BM // 2).to(tl.float32))[None, :]
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
def _forward_tile(
    tile, h, batch, q_ptr, keys, v, out_ptr, lse_ptr, slopes_ptr, windows_ptr, starts_ptr, decay_ptr,
    q_b, q_t, q_h, out_b, out_t, out_h, queries, num_keys, heads, group, out_scale,
    WHICH: tl.constexpr, CHUNK: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
    HAS_WINDOWS: tl.constexpr, ONLINE: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    first, i, row, inside, start, window, lo, hi, all_from = query_tile(
        tile, h, batch, windows_ptr, starts_ptr, queries, num_keys, PACKED, HAS_WINDOWS, BM, BN
    )
    slope = head_slope(slopes_ptr, h, LOCAL)
    wide, channel = batch.to(tl.int64), tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + wide * q_b + h * q_h + row[:, None] * q_t + channel, mask=inside[:, None], other=0.0)
    acc = tl.zeros([BM, D], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], -1e30, tl.float32)
    chunks, oldest = 1, 0
    if CHUNK > 0:
        oldest = lo // CHUNK
        chunks = first // CHUNK - oldest + 1
    log_decay = chunk_decay(decay_ptr, CHUNK, D)
    for chunk in range(chunks):
        aged, begin, end = in_chunk(q, log_decay, oldest + chunk, chunks - 1 - chunk, lo, hi, CHUNK)
        acc, total, top = _span(
            acc, total, top, aged, keys, v, WHICH, batch, h // group, begin, end, all_from, first, i, start, slope,
            window, LOCAL, PACKED, ONLINE, WIDEN, D, BM, BN,
        )  # fmt: skip
    if not ONLINE:
        top = tl.zeros([BM], tl.float32)
    out = (acc * (out_scale / total)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + wide * out_b + h * out_h + row[:, None] * out_t + channel, out, mask=inside[:, None])
    if LOCAL:
        top -= slope * (i - first - BM // 2).to(tl.float32)
    tl.store(lse_ptr + (wide * heads + h) * queries + row, tl.log2(total) + top, mask=inside)


@triton.jit
def forward_kernel(
    q_ptr, keys, v, out_ptr, lse_ptr,
    slopes_ptr, windows_ptr, bounds_ptr, starts_ptr, decay_ptr,
    q_b, q_t, q_h, out_b, out_t, out_h,
    queries, num_keys, heads, first_head, num_heads, group, tiles, out_scale,
    HAS_BOUNDS: tl.constexpr, WHICH: tl.constexpr, CHUNK: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
    HAS_WINDOWS: tl.constexpr, ONLINE: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * num_heads, batch).

    Where bounds are known there are two launches: one without the running maximum, which leaves heads that need it
    alone, and for these one with it, and with few programs, since there is seldom such a head.

    q, out (B, T, heads, D), out times out_scale; keys (1 or 2, B, kv_heads, S, D) and v (B, kv_heads, S, D) as tensor
    descriptors; lse (B, heads, T), base 2.
    """
    batch, program = tl.program_id(1), tl.program_id(0)
    if HAS_BOUNDS and ONLINE:
        for n in range(num_heads):
            h = first_head + num_heads - 1 - n
            if _needs_maximum(bounds_ptr, slopes_ptr, h, LOCAL, BM):
                for back in range(program, tiles, tl.num_programs(0)):
                    _forward_tile(
                        tiles - 1 - back, h, batch, q_ptr, keys, v, out_ptr, lse_ptr, slopes_ptr, windows_ptr,
                        starts_ptr, decay_ptr, q_b, q_t, q_h, out_b, out_t, out_h, queries, num_keys, heads, group,
                        out_scale, WHICH, CHUNK, LOCAL, PACKED, HAS_WINDOWS, ONLINE, WIDEN, D, BM, BN,
                    )  # fmt: skip
    else:
        h, tile = head_and_tile(program, first_head, num_heads, tiles, LOCAL)
        if HAS_BOUNDS:  # noqa: SIM102 - known when compiling, the other is not
            if _needs_maximum(bounds_ptr, slopes_ptr, h, LOCAL, BM):
                return
        _forward_tile(
            tile, h, batch, q_ptr, keys, v, out_ptr, lse_ptr, slopes_ptr, windows_ptr, starts_ptr, decay_ptr,
            q_b, q_t, q_h, out_b, out_t, out_h, queries, num_keys, heads, group, out_scale,
            WHICH, CHUNK, LOCAL, PACKED, HAS_WINDOWS, ONLINE, WIDEN, D, BM, BN,
        )  # fmt: skip
