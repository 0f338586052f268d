"""The Triton kernels of embedding.py. Token i of N (in sorted order: place i) is row i of a (N, dim) matrix."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_kernel(
    ids_ptr, weight_ptr, out_ptr, tokens, num_tokens, dim,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[i] = weight[ids[i]] for ROWS tokens and COLUMNS channels; NaN where there is no such row."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(ids_ptr + i, mask=i < tokens, other=0).to(tl.int64)
    inside = (i < tokens)[:, None] & (column < dim)[None, :]
    known = ((row >= 0) & (row < num_tokens))[:, None]
    x = tl.load(weight_ptr + row[:, None] * dim + column[None, :], mask=inside & known, other=float("nan"))
    tl.store(out_ptr + i[:, None] * dim + column[None, :], x, mask=inside)


@triton.jit
def _sum_tokens(
    acc, rows_ptr, order_ptr, lo, hi, column, dim,
    ROWS: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """acc + the sum of rows lo..hi - 1, or of those that order[lo..hi - 1] names: ROWS at a time, from the first on."""
    for i0 in range(lo, hi, ROWS):
        i = i0 + tl.arange(0, ROWS)
        row = i.to(tl.int64)
        if ORDERED:
            row = tl.load(order_ptr + i, mask=i < hi, other=0)
        mask = (i < hi)[:, None] & (column < dim)[None, :]
        x = tl.load(rows_ptr + row[:, None] * dim + column[None, :], mask=mask, other=0.0)
        acc += tl.sum(x.to(tl.float32), axis=0)
    return acc


@triton.jit
def piece_kernel(
    sorted_ptr, order_ptr, grad_ptr, pieces_ptr, dim,
    PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """pieces[t], float32: the sum over sorted places t * PIECE .. (t + 1) * PIECE - 1, where all are one token."""
    piece = tl.program_id(0)
    lo = piece * PIECE
    if tl.load(sorted_ptr + lo) == tl.load(sorted_ptr + lo + PIECE - 1):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        acc = tl.zeros((COLUMNS,), dtype=tl.float32)
        acc = _sum_tokens(acc, grad_ptr, order_ptr, lo, lo + PIECE, column, dim, ROWS, True)
        tl.store(pieces_ptr + piece.to(tl.int64) * dim + column, acc, mask=column < dim)


@triton.jit
def segment_kernel(
    starts_ptr, order_ptr, grad_ptr, pieces_ptr, out_ptr, dim,
    PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[v] = the sum over sorted places starts[v] .. starts[v + 1] - 1, whole pieces of which are summed already."""
    v = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lo = tl.load(starts_ptr + v)
    hi = tl.load(starts_ptr + v + 1)
    first = tl.minimum((lo + PIECE - 1) // PIECE, hi // PIECE)  # whole pieces: first..last - 1
    last = hi // PIECE
    whole = last > first
    acc = tl.zeros((COLUMNS,), dtype=tl.float32)
    acc = _sum_tokens(acc, grad_ptr, order_ptr, lo, tl.where(whole, first * PIECE, hi), column, dim, ROWS, True)
    if whole:
        acc = _sum_tokens(acc, pieces_ptr, order_ptr, first, last, column, dim, ROWS, False)
        acc = _sum_tokens(acc, grad_ptr, order_ptr, last * PIECE, hi, column, dim, ROWS, True)
    out = out_ptr + v.to(tl.int64) * dim + column
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=column < dim)
