"""What lies between the matrix products of a block, in one pass each; forward only (`prepare` has gradients).

* `prepare_queries_and_keys`: QK norm, gains, temperature, log-n and rotation, as `flash` reads them.
* `activate` and `activate_to_fp8`: the feed-forward's activation, in place, or with the attention's output to e4m3.
* `add_norm_shift`: residual, LayerNorm and token shift.

Token shift costs nothing here, because the residual is kept in *delayed rows*: part i of the channels of token t lies
in row t + i, so that row t is exactly the shifted token t which the next product reads. A row of the normalised
residual goes back to the places it came from.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.kernels.geometry import Rotary
from andromeda.kernels.launch import written
from andromeda.kernels.rotate import decay_exponent, turn
from andromeda.kernels.rotation import rotation_constants, xpos_chunk

TILE = 1024  # channel pairs that a program of `_prepare_kernel` handles at a time
ACTIVATION_BLOCK = 2048


@triton.jit
def load_pairs(source, inside, NORMALISE: tl.constexpr, PAIRS: tl.constexpr):
    """Both halves of one head, (tokens, PAIRS) float32, of unit length if so wished."""
    x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + PAIRS, mask=inside, other=0.0).to(tl.float32)
    if NORMALISE:
        length = tl.sqrt(tl.sum(x1 * x1 + x2 * x2, 1))
        inverse = (1.0 / tl.maximum(length, 1e-12))[:, None]
        x1 *= inverse
        x2 *= inverse
    return x1, x2


@triton.jit
def load_gains(gain_ptr, head, PAIRS: tl.constexpr):
    """Both halves of one head's gains, (1, PAIRS) float32."""
    at = gain_ptr + head * (2 * PAIRS) + tl.arange(0, PAIRS)
    return tl.load(at).to(tl.float32)[None, :], tl.load(at + PAIRS).to(tl.float32)[None, :]


@triton.jit
def store_pairs(target, x1, x2, inside, PAIRS: tl.constexpr):
    """Both halves of one head, (tokens, PAIRS) each."""
    tl.store(target, x1.to(target.dtype.element_ty), mask=inside)
    tl.store(target + PAIRS, x2.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _prepare_kernel(
    q_ptr, out_ptr, k_ptr, keys_ptr, q_gain_ptr, k_gain_ptr, turns_ptr, decay_ptr,
    q_b, q_t, out_b, out_t, k_b, k_t, keys_w, keys_b, keys_h,
    tokens, offset, scale, key_scale, log_n,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, ROTATED: tl.constexpr, LOCAL: tl.constexpr, LOG_N: tl.constexpr,
    NORMALISE: tl.constexpr, GAINS: tl.constexpr, CHUNK: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens, all heads. Keys go to the slots of their positions."""
    batch = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = (t < tokens)[:, None]
    position = offset + t
    p = tl.arange(0, PAIRS)[None, :]
    if ROTATED > 0:
        cos, sin = turn(position, turns_ptr, PAIRS)
        exponent = decay_exponent(position, decay_ptr, CHUNK, PAIRS)
    if HEADS > 0:
        at_q = q_ptr + batch * q_b + t.to(tl.int64)[:, None] * q_t + p
        at_out = out_ptr + batch * out_b + t.to(tl.int64)[:, None] * out_t + p
        if ROTATED > 0:
            decay = tl.exp2(exponent)
            q_cos, q_sin = cos * decay, sin * decay
        sharpened = tl.zeros([TOKENS, 1], tl.float32) + 1.0
        if LOG_N:
            sharpened = tl.maximum(tl.log((position + 1).to(tl.float32)) * log_n, 1.0)[:, None]
        for h in range(HEADS):
            x1, x2 = load_pairs(at_q + h * (2 * PAIRS), inside, NORMALISE, PAIRS)
            if GAINS:
                g1, g2 = load_gains(q_gain_ptr, h, PAIRS)
                x1 *= g1
                x2 *= g2
            factor = scale * tl.where(h >= LOCAL, sharpened, 1.0)
            x1 *= factor
            x2 *= factor
            y1, y2 = x1, x2
            if ROTATED > 0:  # known when compiling, the other is not  # noqa: SIM102
                if h < ROTATED:
                    y1, y2 = x1 * q_cos - x2 * q_sin, x2 * q_cos + x1 * q_sin
            store_pairs(at_out + h * (2 * PAIRS), y1, y2, inside, PAIRS)
    if KV_HEADS > 0:
        at_k = k_ptr + batch * k_b + t.to(tl.int64)[:, None] * k_t + p
        slot = keys_ptr + batch * keys_b + position.to(tl.int64)[:, None] * (2 * PAIRS) + p
        if ROTATED > 0:
            growth = tl.exp2(-exponent)
            k_cos, k_sin = cos * growth, sin * growth
        for h in range(KV_HEADS):
            x1, x2 = load_pairs(at_k + h * (2 * PAIRS), inside, NORMALISE, PAIRS)
            if GAINS:
                g1, g2 = load_gains(k_gain_ptr, h, PAIRS)
                x1 *= g1
                x2 *= g2
            x1 *= key_scale
            x2 *= key_scale
            store_pairs(slot + h * keys_h, x1, x2, inside, PAIRS)
            if ROTATED > 0:
                y1, y2 = x1 * k_cos - x2 * k_sin, x2 * k_cos + x1 * k_sin
                store_pairs(slot + keys_w + h * keys_h, y1, y2, inside, PAIRS)


def prepare_queries_and_keys(
    q: Tensor | None,
    k: Tensor | None,
    keys: Tensor | None,
    *,
    rotary: Rotary | None,
    offset: int,
    scale: float,
    key_scale: float = 1.0,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    normalise: bool = True,
    local_heads: int = 0,
    trained_length: int | None = None,
    out: Tensor | None = None,
) -> None:
    """Queries in place or to `out`, keys into their slots, as `flash.prepared_attention` takes them.

    Args:
        q: (B, T, heads, D), any batch and token strides; heads lie side by side. None: keys alone.
        k: (B, T, kv_heads, D) likewise. None: queries alone.
        keys: (1 or 2, B, kv_heads, S, D): slots offset..offset + T - 1 are written; two sorts if heads are rotated.
        rotary: of the first rotary.heads heads.
        offset: position of the first token.
        scale: on queries: the temperature, and log2(e) for kernels in base 2. key_scale: on keys.
        q_gain, k_gain: (heads, D), (kv_heads, D), both or none.
        normalise: L2-normalise both first.
        local_heads, trained_length: heads from local_heads on are multiplied by
            max(1, ln(i + 1) / ln(trained_length)) at position i; None: they are not.
        out: like q. It and keys may be in e4m3.
    """
    given = q if q is not None else k
    assert given is not None
    batch, tokens, _, dim_head = given.shape
    pairs = dim_head // 2
    turns, decay = (given, given) if rotary is None else rotation_constants(rotary, given.device)
    q_gain, k_gain = (None if gain is None else gain.contiguous() for gain in (q_gain, k_gain))
    gained = q_gain if q_gain is not None else k_gain
    at_keys = (0, 0, 0) if keys is None else keys.stride()[:3]
    rows = max(1, TILE // pairs)
    with written(q if out is None else out) as target, written(keys) as slots:
        _prepare_kernel[(triton.cdiv(tokens, rows), batch)](
            *(given if x is None else x for x in (q, target, k, slots, q_gain, k_gain)),
            turns, decay, *row_strides(q), *row_strides(target), *row_strides(k), *at_keys,
            tokens, offset, scale, key_scale, 0.0 if trained_length is None else 1 / math.log(trained_length),
            HEADS=0 if q is None else q.shape[2], KV_HEADS=0 if k is None else k.shape[2],
            ROTATED=0 if rotary is None else rotary.heads, LOCAL=local_heads, LOG_N=trained_length is not None,
            NORMALISE=normalise, GAINS=gained is not None, CHUNK=1 if rotary is None else xpos_chunk(rotary),
            PAIRS=pairs, TOKENS=rows, num_warps=4,
        )  # fmt: skip


def row_strides(x: Tensor | None) -> tuple[int, int]:
    """Of batch and token; (B, T, heads, D) with heads side by side."""
    if x is None:
        return 0, 0
    assert x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    return x.stride(0), x.stride(1)


@triton.jit
def _activated(x, KIND: tl.constexpr):
    if KIND == "relu2":
        x = tl.maximum(x, 0.0)
        return x * x
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _activate_kernel(x_ptr, row, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = x_ptr + tl.program_id(0).to(tl.int64) * row + c
    x = tl.load(at, mask=c < width, other=0.0).to(tl.float32)
    tl.store(at, _activated(x, KIND).to(x_ptr.dtype.element_ty), mask=c < width)


def activate(x: Tensor, kind: str) -> None:
    """The activation of x (rows, width), in place; rows may lie apart."""
    rows, width = x.shape
    block = min(ACTIVATION_BLOCK, triton.next_power_of_2(width))
    _activate_kernel[(rows, triton.cdiv(width, block))](x, x.stride(0), width, KIND=kind, BLOCK=block, num_warps=4)


@triton.jit
def _activate_to_fp8_kernel(
    x_ptr, out_ptr, scale_ptr, row, out_row,
    PLAIN: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, PLAIN_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row, PLAIN channels as they are and the WIDTH behind them activated."""
    r = tl.program_id(0).to(tl.int64)
    c, d = tl.arange(0, PLAIN_BLOCK), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + r * row + c, mask=c < PLAIN, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + r * row + PLAIN + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    y = _activated(y, KIND)
    top = tl.maximum(tl.max(tl.abs(x), 0), tl.max(tl.abs(y), 0))
    top = tl.maximum(top, 1e-30)
    inverse = 448.0 / top
    out = out_ptr + r * out_row
    tl.store(out + c, (x * inverse).to(out_ptr.dtype.element_ty), mask=c < PLAIN)
    tl.store(out + PLAIN + d, (y * inverse).to(out_ptr.dtype.element_ty), mask=d < WIDTH)
    tl.store(scale_ptr + r, top * (1.0 / 448.0))


def activate_to_fp8(x: Tensor, plain: int, kind: str, out: Tensor, scale: Tensor) -> None:
    """The first `plain` channels as they are, the others activated, all in e4m3 with a scale a row.

    Args:
        x: (rows, plain + width), rows may lie apart. out: (rows, plain + width) float8_e4m3fn. scale: (rows,) float32.
    """
    rows, columns = x.shape
    block = triton.next_power_of_2(columns - plain)
    with written(out) as target:
        assert target is not None
        _activate_to_fp8_kernel[(rows,)](
            x, target, scale, x.stride(0), target.stride(0),
            PLAIN=plain, WIDTH=columns - plain, KIND=kind, PLAIN_BLOCK=triton.next_power_of_2(plain), BLOCK=block,
            num_warps=min(16, max(4, block // 1024)),
        )  # fmt: skip


@triton.jit
def _add_norm_shift_kernel(
    x_ptr, o_ptr, weight_ptr, h_ptr,
    rows, alpha, eps, h_factor,
    DIM: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
    POST: tl.constexpr, SEPARATE: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One program: one token. Part i of its channels lies i rows further on."""
    r = tl.program_id(1).to(tl.int64) * rows + tl.program_id(0)
    c = tl.arange(0, BLOCK)
    inside = c < DIM
    part = c // WIDTH
    place = (r + tl.where(part > SHIFT, 0, part)) * DIM + c
    o = tl.load(o_ptr + r * DIM + c, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0)
    x = alpha * x + o
    centred = tl.where(inside, x - tl.sum(x, 0) / DIM, 0.0)
    plain = centred * tl.rsqrt(tl.sum(centred * centred, 0) / DIM + eps)
    y = plain * weight
    if POST:
        x = y
    tl.store(x_ptr + place, x.to(x_ptr.dtype.element_ty), mask=inside)
    if SEPARATE:
        h = y if WEIGHTED else plain * h_factor
        tl.store(h_ptr + place, h.to(h_ptr.dtype.element_ty), mask=inside)


def add_norm_shift(
    x: Tensor,
    o: Tensor,
    weight: Tensor,
    *,
    shift: int,
    alpha: float,
    eps: float,
    post: bool,
    h: Tensor | None = None,
    h_factor: float | None = None,
) -> None:
    """x <- LN(alpha * x + o) (post-norm), or x <- alpha * x + o and h = LN(x) (pre-norm), all in delayed rows.

    Args:
        x: (B, T + shift, dim) contiguous, the residual; part i of token t in row t + i. Changed in place.
        o: (B, T + shift, dim) contiguous, what is added, token t in row t.
        weight: (dim,) float32, LayerNorm's.
        h: like x, where the normalised goes as well; None: nowhere.
        h_factor: what h is multiplied by in place of the weight; None: h is as LayerNorm gives it.
    """
    batch, rows, dim = x.shape
    block = triton.next_power_of_2(dim)
    with written(h) as target:
        _add_norm_shift_kernel[(rows - shift, batch)](
            x, o, weight, x if target is None else target,
            rows, alpha, eps, 1.0 if h_factor is None else h_factor,
            DIM=dim, WIDTH=dim // (shift + 1), SHIFT=shift, BLOCK=block,
            POST=post, SEPARATE=h is not None, WEIGHTED=h_factor is None,
            num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip


def to_delayed_rows(x: Tensor, shift: int, out: Tensor) -> None:
    """(B, T, dim) -> out (B, T + shift, dim), of which the rows before the first token's parts are left alone."""
    tokens, width = x.shape[1], x.shape[2] // (shift + 1)
    for i, columns in _parts(shift, width, x.shape[2]):
        out[:, i : i + tokens, columns] = x[:, :, columns]


def from_delayed_rows(rows: Tensor, shift: int, first: int, tokens: int) -> Tensor:
    """(B, T + shift, dim) -> (B, tokens, dim): tokens first.. as they were before the shift."""
    width = rows.shape[2] // (shift + 1)
    out = torch.empty(rows.shape[0], tokens, rows.shape[2], dtype=rows.dtype, device=rows.device)
    for i, columns in _parts(shift, width, rows.shape[2]):
        out[:, :, columns] = rows[:, first + i : first + i + tokens, columns]
    return out


def _parts(shift: int, width: int, dim: int) -> list[tuple[int, slice]]:
    """(delay, channels) of each part; channels left over by the division are not delayed."""
    parts = [(i, slice(i * width, (i + 1) * width)) for i in range(shift + 1)]
    return [*parts, (0, slice((shift + 1) * width, dim))]
