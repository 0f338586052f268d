"""The backward kernels: dq by tiles of queries, dk and dv by blocks of keys; no atomics, so repeatable bit for bit.

Probabilities are computed again from the log-sum-exp that the forward pass kept; windows leave out the same blocks.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from andromeda.kernels.flash_forward import (
    chunk_decay,
    dot,
    head_and_tile,
    head_slope,
    head_window,
    in_chunk,
    mask,
    query_tile,
)  # fmt: skip

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _dq_span(
    dq, q, dout, lse, delta, keys, v, which, batch, kv,
    lo, hi, all_from, first, i, start, slope, window,
    LOCAL: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Key blocks lo, lo + BN, ... below hi, as in the forward kernel."""
    ahead = lse
    if LOCAL:
        ahead += slope * (i - first).to(tl.float32)
    for j0 in tl.range(lo, hi, BN):
        k = keys.load([which, batch, kv, j0, 0]).reshape(BN, D)
        values = v.load([batch, kv, j0, 0]).reshape(BN, D)
        s = dot(q, k.T, tl.zeros([BM, BN], tl.float32), WIDEN)
        j = j0 + tl.arange(0, BN)
        if LOCAL:
            s += (slope * (j - first).to(tl.float32))[None, :]
        if (j0 < all_from) | (j0 + BN > first + 1):
            s = tl.where(mask(i[:, None], j[None, :], start[:, None], window, LOCAL, PACKED), s, float("-inf"))
        dp = dot(dout, values.T, tl.zeros([BM, BN], tl.float32), WIDEN)
        p = tl.exp2(s - ahead[:, None])  # while the product runs
        ds = p * (dp - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq, WIDEN)
    return dq


@triton.jit
def dq_kernel(
    q_ptr, keys, v, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    slopes_ptr, windows_ptr, starts_ptr, decay_ptr,
    q_b, q_t, q_h, dout_b, dout_t, dout_h, dq_b, dq_t, dq_h,
    queries, num_keys, heads, first_head, num_heads, group, tiles,
    WHICH: tl.constexpr, CHUNK: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
    HAS_WINDOWS: tl.constexpr, WIDEN: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid and shapes of the forward kernel; out and dq have the same strides.

    Leaves delta (B, heads, T) behind, the softmax's own share of the gradient: the sum over channels of out * dout.
    """
    batch = tl.program_id(1)
    h, tile = head_and_tile(tl.program_id(0), first_head, num_heads, tiles, LOCAL)
    first, i, row, inside, start, window, lo, hi, all_from = query_tile(
        tile, h, batch, windows_ptr, starts_ptr, queries, num_keys, PACKED, HAS_WINDOWS, BM, BN
    )
    slope = head_slope(slopes_ptr, h, LOCAL)
    wide, c = batch.to(tl.int64), tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + wide * q_b + h * q_h + row[:, None] * q_t + c, mask=inside[:, None], other=0.0)
    dout = tl.load(dout_ptr + wide * dout_b + h * dout_h + row[:, None] * dout_t + c, mask=inside[:, None], other=0.0)
    out = tl.load(out_ptr + wide * dq_b + h * dq_h + row[:, None] * dq_t + c, mask=inside[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    rows = (wide * heads + h) * queries + row
    tl.store(delta_ptr + rows, delta, mask=inside)
    lse = tl.load(lse_ptr + rows, mask=inside, other=float("inf"))
    dq = tl.zeros([BM, D], tl.float32)
    chunks, oldest = 1, 0
    if CHUNK > 0:
        oldest = lo // CHUNK
        chunks = first // CHUNK - oldest + 1
    log_decay = chunk_decay(decay_ptr, CHUNK, D)
    for chunk in range(chunks):
        aged, begin, end = in_chunk(q, log_decay, oldest + chunk, chunks - 1 - chunk, lo, hi, CHUNK)
        if CHUNK > 0:
            dq = dq * tl.exp2(log_decay)  # Horner's rule: what came before is one chunk further away
        dq = _dq_span(
            dq, aged, dout, lse, delta, keys, v, WHICH, batch, h // group, begin, end, all_from, first, i, start,
            slope, window, LOCAL, PACKED, WIDEN, D, BM, BN,
        )  # fmt: skip
    dq_ptrs = dq_ptr + wide * dq_b + h * dq_h + row[:, None] * dq_t + c
    tl.store(dq_ptrs, (dq * LN_2).to(dq_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _row_sums(lse_ptr, delta_ptr, row, queries):
    """The log-sum-exp and delta of queries `row`; zeros in rows that are no query's: they add nothing."""
    inside = (row >= 0) & (row < queries)
    return tl.load(lse_ptr + row, mask=inside, other=0.0), tl.load(delta_ptr + row, mask=inside, other=0.0)


@triton.jit
def _dkv_span(
    dk, dv, k, values, q, dout, lse_ptr, delta_ptr, starts_ptr,
    batch, h, lo, hi, all_until, first, j, slope, window, offset, queries,
    LOCAL: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Tiles of queries lo, lo + BM, ... below hi; all products transposed: keys by queries."""
    behind = slope * (j - first).to(tl.float32)
    next_lse, next_delta = _row_sums(lse_ptr, delta_ptr, lo - offset + tl.arange(0, BM), queries)
    for i0 in tl.range(lo, hi, BM):
        q_tile = q.load([batch, h, i0 - offset, 0]).reshape(BM, D)
        dout_tile = dout.load([batch, h, i0 - offset, 0]).reshape(BM, D)
        i = i0 + tl.arange(0, BM)
        lse, delta = next_lse, next_delta
        # a step ahead and into registers: through shared memory each would cost barriers
        next_lse, next_delta = _row_sums(lse_ptr, delta_ptr, i + BM - offset, queries)
        s = dot(k, q_tile.T, tl.zeros([BN, BM], tl.float32), WIDEN)
        if LOCAL:
            lse += slope * (i - first).to(tl.float32)
            s += behind[:, None]
        if (i0 < first + BN - 1) | (i0 + BM > all_until):
            start = i
            if PACKED:
                start = tl.load(starts_ptr + i, mask=i < offset + queries, other=0).to(tl.int32)
            s = tl.where(mask(i[None, :], j[:, None], start[None, :], window, LOCAL, PACKED), s, float("-inf"))
        dp = dot(values, dout_tile.T, tl.zeros([BN, BM], tl.float32), WIDEN)
        p = tl.exp2(s - lse[None, :])  # while the product runs
        dv = dot(p.to(dout_tile.dtype), dout_tile, dv, WIDEN)
        ds = p * (dp - delta[None, :])
        dk = dot(ds.to(q_tile.dtype), q_tile, dk, WIDEN)
    return dk, dv


@triton.jit
def dkv_kernel(
    q, keys, v, dout, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    slopes_ptr, windows_ptr, starts_ptr, ends_ptr, decay_ptr,
    queries, num_keys, heads, first_head, num_groups, group,
    WHICH: tl.constexpr, CHUNK: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
    HAS_WINDOWS: tl.constexpr, WIDEN: tl.constexpr, SHARE: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks * num_groups, batch): early keys, which most queries see, first.

    A program sums over SHARE heads of one key/value head, num_groups apart, so that each has wide and narrow windows:
    q, dout (B, heads, T, D) as descriptors; lse, delta (B, heads, T); dk, dv (num_groups, B, S, D) float32.
    """
    batch = tl.program_id(1)
    member = tl.program_id(0) % num_groups
    first = tl.program_id(0) // num_groups * BN
    j = first + tl.arange(0, BN)
    h0 = first_head + member
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
    chunks, nearest = 1, 0
    if CHUNK > 0:
        farthest = end
        if LOCAL:
            farthest = lo
            for h in range(h0, h0 + SHARE * num_groups, num_groups):
                farthest = tl.maximum(farthest, tl.minimum(end, last + head_window(windows_ptr, h, HAS_WINDOWS)))
        nearest = first // CHUNK
        chunks = (farthest - 1) // CHUNK - nearest + 1
    log_decay = chunk_decay(decay_ptr, CHUNK, D)
    for back in range(chunks):
        away = chunks - 1 - back
        aged, begin, stop = in_chunk(k, log_decay, nearest + away, away, lo, end, CHUNK)
        if CHUNK > 0:
            dk = dk * tl.exp2(log_decay)  # Horner's rule, as in dq
        for h in range(h0, h0 + SHARE * num_groups, num_groups):
            row = (batch * heads + h).to(tl.int64) * queries
            window = head_window(windows_ptr, h, HAS_WINDOWS)
            slope = head_slope(slopes_ptr, h, LOCAL)
            dk, dv = _dkv_span(
                dk, dv, aged, values, q, dout, lse_ptr + row, delta_ptr + row, starts_ptr, batch, h,
                begin, tl.minimum(stop, last + window), tl.minimum(whole_end, first + window), first, j, slope, window,
                offset, queries, LOCAL, PACKED, WIDEN, D, BM, BN,
            )  # fmt: skip
    target = ((member * tl.num_programs(1) + batch).to(tl.int64) * num_keys + j[:, None]) * D + tl.arange(0, D)[None, :]
    tl.store(dk_ptr + target, dk * LN_2, mask=(j < num_keys)[:, None])
    tl.store(dv_ptr + target, dv, mask=(j < num_keys)[:, None])
