"""The backward kernels: dq by tiles of queries, dk and dv by blocks of keys; no atomics, so repeatable bit for bit.

Probabilities are computed again from the log-sum-exp that the forward pass kept; windows leave out the same blocks.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from andromeda.kernels.flash_forward import LOG2_E, dot, head_window, row_limits

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def delta_kernel(
    out_ptr, dout_ptr, lse_ptr, rows_ptr,
    out_b, out_t, out_h, dout_b, dout_t, dout_h, tokens, heads, offset, rows_h,
    D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """rows (2, B, heads, rows_h): the log-sum-exp, and delta = sum over channels of out * dout.

    Delta is the softmax's own share of the gradient. A query at position i stands in place i - offset // 4 * 4 of its
    row, because tensor descriptors want places in multiples of 16 bytes.
    """
    batch, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = t < tokens
    c = tl.arange(0, D)[None, :]
    out = tl.load(out_ptr + batch * out_b + h * out_h + t[:, None] * out_t + c, mask=inside[:, None], other=0.0)
    dout = tl.load(dout_ptr + batch * dout_b + h * dout_h + t[:, None] * dout_t + c, mask=inside[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    lse = tl.load(lse_ptr + tl.program_id(1).to(tl.int64) * tokens + t, mask=inside, other=0.0)
    row = tl.program_id(1).to(tl.int64) * rows_h + t + offset % 4
    tl.store(rows_ptr + row, lse, mask=inside)
    tl.store(rows_ptr + tl.num_programs(1).to(tl.int64) * rows_h + row, delta, mask=inside)


@triton.jit
def _dq_blocks(
    dq, q, dout, lse, delta, keys, v, which, batch, kv,
    lo, hi, first, i, start, slope, window,
    MASKED: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    ahead = lse
    if LOCAL:
        ahead += slope * (i - first).to(tl.float32)
    for j0 in tl.range(lo, hi, BN):
        k = keys.load([which, batch, kv, j0, 0]).reshape(BN, D)
        values = v.load([batch, kv, j0, 0]).reshape(BN, D)
        s = dot(q, k.T, tl.zeros([BM, BN], tl.float32), WIDEN)
        dp = dot(dout, values.T, tl.zeros([BM, BN], tl.float32), WIDEN)
        j = j0 + tl.arange(0, BN)
        if LOCAL:
            s += (slope * (j - first).to(tl.float32))[None, :]
        p = tl.exp2(s - ahead[:, None])
        if MASKED:
            seen = j[None, :] <= i[:, None]
            if LOCAL:
                seen = seen & (j[None, :] > (i - window)[:, None])
            if PACKED:
                seen = seen & (j[None, :] >= start[:, None])
            p = tl.where(seen, p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq, WIDEN)
    return dq


@triton.jit
def _dq_span(
    dq, q, dout, lse, delta, keys, v, which, batch, kv,
    lo, hi, all_from, first, i, start, slope, window,
    LOCAL: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    left = lo
    if LOCAL or PACKED:
        left = tl.minimum(tl.maximum(tl.cdiv(all_from, BN) * BN, lo), hi)
    right = tl.maximum(tl.minimum((first + 1) // BN * BN, hi), left)
    if LOCAL or PACKED:
        dq = _dq_blocks(
            dq, q, dout, lse, delta, keys, v, which, batch, kv, lo, left, first, i, start, slope, window,
            True, LOCAL, PACKED, WIDEN, D, BM, BN,
        )  # fmt: skip
    dq = _dq_blocks(
        dq, q, dout, lse, delta, keys, v, which, batch, kv, left, right, first, i, start, slope, window,
        False, LOCAL, PACKED, WIDEN, D, BM, BN,
    )  # fmt: skip
    return _dq_blocks(
        dq, q, dout, lse, delta, keys, v, which, batch, kv, right, hi, first, i, start, slope, window,
        True, LOCAL, PACKED, WIDEN, D, BM, BN,
    )  # fmt: skip


@triton.jit
def dq_kernel(
    q_ptr, keys, v, dout_ptr, lse_ptr, delta_ptr, dq_ptr, rows_h,
    slopes_ptr, windows_ptr, starts_ptr, decay_ptr,
    q_b, q_t, q_h, dout_b, dout_t, dout_h, dq_b, dq_t, dq_h,
    queries, num_keys, heads, first_head, num_heads, group, tiles,
    WHICH: tl.constexpr, CHUNK: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
    HAS_WINDOWS: tl.constexpr, WIDEN: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid and shapes of the forward kernel; delta, lse (B, heads, rows_h)."""
    batch = tl.program_id(1)
    h = first_head + num_heads - 1 - tl.program_id(0) // tiles
    offset = num_keys - queries
    first = (offset // BM + tiles - 1 - tl.program_id(0) % tiles) * BM
    i = first + tl.arange(0, BM)
    row = (i - offset).to(tl.int64)
    inside = (row >= 0) & (row < queries)
    c = tl.arange(0, D)[None, :]
    wide = batch.to(tl.int64)
    q = tl.load(q_ptr + wide * q_b + h * q_h + row[:, None] * q_t + c, mask=inside[:, None], other=0.0)
    dout = tl.load(dout_ptr + wide * dout_b + h * dout_h + row[:, None] * dout_t + c, mask=inside[:, None], other=0.0)
    rows = (wide * heads + h) * rows_h + row + offset % 4
    lse = tl.load(lse_ptr + rows, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=inside, other=0.0)

    window = head_window(windows_ptr, h, HAS_WINDOWS)
    slope = 0.0
    if LOCAL:
        slope = tl.load(slopes_ptr + h).to(tl.float32) * LOG2_E
    starts_ptr += wide * num_keys
    start = i
    if PACKED:
        start = tl.load(starts_ptr + i, mask=inside, other=0).to(tl.int32)
    last = tl.minimum(first + BM, num_keys) - 1
    lo, all_from = row_limits(tl.maximum(first, offset), last, starts_ptr, window, PACKED)
    lo = lo // BN * BN
    dq = tl.zeros([BM, D], tl.float32)
    if CHUNK > 0:
        log_decay = tl.load(decay_ptr + tl.arange(0, D) % (D // 2)) * CHUNK
        for chunk in range(lo // CHUNK, first // CHUNK + 1):
            behind = (first // CHUNK - chunk).to(tl.float32)
            aged = (q.to(tl.float32) * tl.exp2(log_decay * behind)[None, :]).to(q.dtype)
            dq = dq * tl.exp2(log_decay)[None, :]  # Horner's rule: what came before is one chunk further away
            dq = _dq_span(
                dq, aged, dout, lse, delta, keys, v, WHICH, batch, h // group, tl.maximum(lo, chunk * CHUNK),
                tl.minimum(last + 1, (chunk + 1) * CHUNK), all_from, first, i, start, slope, window,
                LOCAL, PACKED, WIDEN, D, BM, BN,
            )  # fmt: skip
    else:
        dq = _dq_span(
            dq, q, dout, lse, delta, keys, v, WHICH, batch, h // group, lo, last + 1, all_from, first, i, start,
            slope, window, LOCAL, PACKED, WIDEN, D, BM, BN,
        )  # fmt: skip
    dq_ptrs = dq_ptr + wide * dq_b + h * dq_h + row[:, None] * dq_t + c
    tl.store(dq_ptrs, (dq * LN_2).to(dq_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _dkv_tiles(
    dk, dv, k, values, q, dout, lse, delta, starts_ptr,
    batch, h, lo, hi, first, j, slope, window, offset, queries,
    MASKED: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Tiles of queries lo, lo + BM, ... below hi; all products transposed: keys by queries."""
    behind = slope * (j - first).to(tl.float32)
    for i0 in tl.range(lo, hi, BM):
        q_tile = q.load([batch, h, i0 - offset, 0]).reshape(BM, D)
        dout_tile = dout.load([batch, h, i0 - offset, 0]).reshape(BM, D)
        i = i0 + tl.arange(0, BM)
        # all zeros in rows that are no query's: they add nothing
        ahead = lse.load([batch, h, i0 - offset // 4 * 4]).reshape(BM)
        own = delta.load([batch, h, i0 - offset // 4 * 4]).reshape(BM)
        s = dot(k, q_tile.T, tl.zeros([BN, BM], tl.float32), WIDEN)
        dp = dot(values, dout_tile.T, tl.zeros([BN, BM], tl.float32), WIDEN)
        if LOCAL:
            ahead += slope * (i - first).to(tl.float32)
            s += behind[:, None]
        p = tl.exp2(s - ahead[None, :])
        if MASKED:
            seen = j[:, None] <= i[None, :]
            if LOCAL:
                seen = seen & (j[:, None] > (i - window)[None, :])
            if PACKED:
                start = tl.load(starts_ptr + i, mask=i < offset + queries, other=0).to(tl.int32)
                seen = seen & (j[:, None] >= start[None, :])
            p = tl.where(seen, p, 0.0)
        dv = dot(p.to(dout_tile.dtype), dout_tile, dv, WIDEN)
        ds = p * (dp - own[None, :])
        dk = dot(ds.to(q_tile.dtype), q_tile, dk, WIDEN)
    return dk, dv


@triton.jit
def _dkv_span(
    dk, dv, k, values, q, dout, lse, delta, starts_ptr,
    batch, h, lo, hi, all_until, first, j, slope, window, offset,
    queries,
    LOCAL: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Queries lo..hi - 1: on the diagonal, whole, cut by the window's or the document's end."""
    left = tl.minimum(tl.maximum(tl.cdiv(first + BN - 1, BM) * BM, lo), hi)
    right = hi
    if LOCAL or PACKED:
        right = tl.maximum(tl.minimum(all_until // BM * BM, hi), left)
    dk, dv = _dkv_tiles(
        dk, dv, k, values, q, dout, lse, delta, starts_ptr, batch, h, lo, left, first, j, slope, window,
        offset, queries, True, LOCAL, PACKED, WIDEN, D, BM, BN,
    )  # fmt: skip
    dk, dv = _dkv_tiles(
        dk, dv, k, values, q, dout, lse, delta, starts_ptr, batch, h, left, right, first, j, slope, window,
        offset, queries, False, LOCAL, PACKED, WIDEN, D, BM, BN,
    )  # fmt: skip
    if LOCAL or PACKED:
        dk, dv = _dkv_tiles(
            dk, dv, k, values, q, dout, lse, delta, starts_ptr, batch, h, right, hi, first, j, slope, window,
            offset, queries, True, LOCAL, PACKED, WIDEN, D, BM, BN,
        )  # fmt: skip
    return dk, dv


@triton.jit
def dkv_kernel(
    q, keys, v, dout, lse, delta, dk_ptr, dv_ptr,
    slopes_ptr, windows_ptr, starts_ptr, ends_ptr, decay_ptr,
    queries, num_keys, first_head, num_groups, group,
    WHICH: tl.constexpr, CHUNK: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
    HAS_WINDOWS: tl.constexpr, WIDEN: tl.constexpr, SHARE: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks * num_groups, batch): early keys, which most queries see, first.

    A program sums over SHARE heads of one key/value head: q, dout (B, heads, T, D) and lse, delta (B, heads, T) as
    descriptors; dk, dv (num_groups, B, S, D) float32.
    """
    batch = tl.program_id(1)
    member = tl.program_id(0) % num_groups
    first = tl.program_id(0) // num_groups * BN
    j = first + tl.arange(0, BN)
    h0 = first_head + member * SHARE
    offset = num_keys - queries
    k = keys.load([WHICH, batch, h0 // group, first, 0]).reshape(BN, D)
    values = v.load([batch, h0 // group, first, 0]).reshape(BN, D)
    last = tl.minimum(first + BN, num_keys) - 1
    starts_ptr += batch.to(tl.int64) * num_keys
    ends_ptr += batch.to(tl.int64) * num_keys
    end, whole_end = num_keys, num_keys
    if PACKED:
        end = tl.load(ends_ptr + last).to(tl.int32)
        whole_end = tl.load(ends_ptr + first).to(tl.int32)
    lo = tl.maximum(first, offset) // BM * BM
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    if CHUNK > 0:
        farthest = end
        if LOCAL:
            farthest = lo
            for h in range(h0, h0 + SHARE):
                farthest = tl.maximum(farthest, tl.minimum(end, last + head_window(windows_ptr, h, HAS_WINDOWS)))
        log_decay = tl.load(decay_ptr + tl.arange(0, D) % (D // 2)) * CHUNK
        nearest = first // CHUNK
        for back in range((farthest - 1) // CHUNK - nearest + 1):
            chunk = (farthest - 1) // CHUNK - back
            aged = (k.to(tl.float32) * tl.exp2(log_decay * (chunk - nearest).to(tl.float32))[None, :]).to(k.dtype)
            dk = dk * tl.exp2(log_decay)[None, :]  # Horner's rule, as in dq
            for h in range(h0, h0 + SHARE):
                window = head_window(windows_ptr, h, HAS_WINDOWS)
                slope = 0.0
                if LOCAL:
                    slope = tl.load(slopes_ptr + h).to(tl.float32) * LOG2_E
                dk, dv = _dkv_span(
                    dk, dv, aged, values, q, dout, lse, delta, starts_ptr, batch, h,
                    tl.maximum(lo, chunk * CHUNK), tl.minimum(tl.minimum(end, last + window), (chunk + 1) * CHUNK),
                    tl.minimum(whole_end, first + window), first, j, slope, window, offset, queries,
                    LOCAL, PACKED, WIDEN, D, BM, BN,
                )  # fmt: skip
    else:
        for h in range(h0, h0 + SHARE):
            window = head_window(windows_ptr, h, HAS_WINDOWS)
            slope = 0.0
            if LOCAL:
                slope = tl.load(slopes_ptr + h).to(tl.float32) * LOG2_E
            dk, dv = _dkv_span(
                dk, dv, k, values, q, dout, lse, delta, starts_ptr, batch, h,
                lo, tl.minimum(end, last + window), tl.minimum(whole_end, first + window), first, j, slope, window,
                offset, queries, LOCAL, PACKED, WIDEN, D, BM, BN,
            )  # fmt: skip
    target = ((member * tl.num_programs(1) + batch).to(tl.int64) * num_keys + j[:, None]) * D + tl.arange(0, D)[None, :]
    tl.store(dk_ptr + target, dk * LN_2, mask=(j < num_keys)[:, None])
    tl.store(dv_ptr + target, dv, mask=(j < num_keys)[:, None])
