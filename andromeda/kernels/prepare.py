"""QK norm, gains, temperature, log-n and rotation in one pass, with gradients.

A candidate for what training puts before attention; `bench attention` compares it with what the model does today.

The backward pass computes the normalised vectors again from the projections' outputs. Gradients of the gains are summed
per program and then over programs, in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.kernels.geometry import Rotary
from andromeda.kernels.launch import on_device_of
from andromeda.kernels.pointwise import TILE, _gains, _load_pairs, _row_strides, _store_pairs
from andromeda.kernels.pointwise import prepare_queries_and_keys as prepare_into
from andromeda.kernels.rotate import decay_exponent, turn
from andromeda.kernels.rotation import rotation_constants, xpos_chunk


@triton.jit
def _head_gradient(
    source, target, partial, gain_ptr, h, g1, g2, inside,
    NORMALISE: tl.constexpr, GAINS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """From (g1, g2), the gradient of gain * x / |x|, to that of x, and this program's share of the gain's."""
    x1, x2 = _load_pairs(source, inside, False, PAIRS)
    inverse = tl.zeros([x1.shape[0], 1], tl.float32) + 1.0
    if NORMALISE:
        inverse = (1.0 / tl.maximum(tl.sqrt(tl.sum(x1 * x1 + x2 * x2, 1)), 1e-12))[:, None]
        x1 *= inverse
        x2 *= inverse
    if GAINS:
        p = tl.arange(0, PAIRS)
        tl.store(partial + h * (2 * PAIRS) + p, tl.sum(g1 * x1, 0))
        tl.store(partial + h * (2 * PAIRS) + PAIRS + p, tl.sum(g2 * x2, 0))
        gain1, gain2 = _gains(gain_ptr, h, PAIRS)
        g1 *= gain1
        g2 *= gain2
    if NORMALISE:
        along = tl.sum(g1 * x1 + g2 * x2, 1)[:, None]
        g1 = (g1 - x1 * along) * inverse
        g2 = (g2 - x2 * along) * inverse
    _store_pairs(target, g1, g2, inside, PAIRS)


@triton.jit
def _prepare_backward_kernel(
    q_ptr, k_ptr, dout_ptr, dkeys_ptr, dq_ptr, dk_ptr, q_part_ptr, k_part_ptr, q_gain_ptr, k_gain_ptr, turns_ptr,
    decay_ptr, q_b, q_t, k_b, k_t, dout_b, dout_t, dkeys_w, dkeys_b, dkeys_h,
    tokens, scale, log_n,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, ROTATED: tl.constexpr, LOCAL: tl.constexpr, LOG_N: tl.constexpr,
    NORMALISE: tl.constexpr, GAINS: tl.constexpr, CHUNK: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens, all heads. dq (B, T, H, D) and dk (B, T, kv_heads, D) are contiguous."""
    batch, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    program = batch * tl.num_programs(0) + block
    t = block * TOKENS + tl.arange(0, TOKENS)
    row = t.to(tl.int64)[:, None]
    inside = (t < tokens)[:, None]
    p = tl.arange(0, PAIRS)[None, :]
    D: tl.constexpr = 2 * PAIRS
    if ROTATED > 0:
        cos, sin = turn(t, turns_ptr, PAIRS)
        exponent = decay_exponent(t, decay_ptr, CHUNK, PAIRS)
        shrink, growth = tl.exp2(exponent), tl.exp2(-exponent)
    sharpened = tl.zeros([TOKENS, 1], tl.float32) + 1.0
    if LOG_N:
        sharpened = tl.maximum(tl.log((t + 1).to(tl.float32)) * log_n, 1.0)[:, None]
    for h in range(HEADS):
        d1, d2 = _load_pairs(dout_ptr + batch * dout_b + row * dout_t + h * D + p, inside, False, PAIRS)
        factor = scale * tl.where(h >= LOCAL, sharpened, 1.0)
        d1 *= factor
        d2 *= factor
        g1, g2 = d1, d2
        if ROTATED > 0:  # known when compiling, the other is not  # noqa: SIM102
            if h < ROTATED:
                g1, g2 = (d1 * cos + d2 * sin) * shrink, (d2 * cos - d1 * sin) * shrink
        _head_gradient(
            q_ptr + batch * q_b + row * q_t + h * D + p, dq_ptr + ((batch * tokens + row) * HEADS + h) * D + p,
            q_part_ptr + program * (HEADS * D), q_gain_ptr, h, g1, g2, inside, NORMALISE, GAINS, PAIRS,
        )  # fmt: skip
    for h in range(KV_HEADS):
        at_dkeys = dkeys_ptr + batch * dkeys_b + h * dkeys_h + row * D + p
        g1, g2 = _load_pairs(at_dkeys, inside, False, PAIRS)
        if ROTATED > 0:
            d1, d2 = _load_pairs(at_dkeys + dkeys_w, inside, False, PAIRS)
            g1 += (d1 * cos + d2 * sin) * growth
            g2 += (d2 * cos - d1 * sin) * growth
        _head_gradient(
            k_ptr + batch * k_b + row * k_t + h * D + p, dk_ptr + ((batch * tokens + row) * KV_HEADS + h) * D + p,
            k_part_ptr + program * (KV_HEADS * D), k_gain_ptr, h, g1, g2, inside, NORMALISE, GAINS, PAIRS,
        )  # fmt: skip


class _Prepare(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, q_gain: Tensor | None, k_gain: Tensor | None,
        rotary: Rotary | None, options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(q, k, q_gain, k_gain)
        ctx.rotary, ctx.options = rotary, options
        batch, tokens, kv_heads, dim_head = k.shape
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        sorts = 1 if rotary is None else 2
        keys = torch.empty(sorts, batch, kv_heads, tokens, dim_head, dtype=k.dtype, device=k.device)
        with on_device_of(q):
            prepare_into(q, k, keys, rotary=rotary, offset=0, q_gain=q_gain, k_gain=k_gain, out=out, **options)
        return out, keys

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, q_gain, k_gain = ctx.saved_tensors
        dout, dkeys = grads
        with on_device_of(q):
            return (*_backward(dout, dkeys, q, k, q_gain, k_gain, ctx.rotary, **ctx.options), None, None)


def _backward(
    dout: Tensor, dkeys: Tensor, q: Tensor, k: Tensor, q_gain: Tensor | None, k_gain: Tensor | None,
    rotary: Rotary | None, scale: float, normalise: bool, local_heads: int, trained_length: int | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    batch, tokens, heads, dim_head = q.shape
    kv_heads, pairs, rows = k.shape[2], dim_head // 2, max(1, TILE // (dim_head // 2))
    programs = batch * triton.cdiv(tokens, rows)
    turns, decay = (q, q) if rotary is None else rotation_constants(rotary, q.device)
    dout, dkeys = dout.contiguous(), dkeys.contiguous()
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    gained = q_gain is not None
    parts = [
        torch.empty(programs if gained else 0, n, dim_head, dtype=torch.float32, device=q.device)
        for n in (heads, kv_heads)
    ]
    _prepare_backward_kernel[(triton.cdiv(tokens, rows), batch)](
        q, k, dout, dkeys, dq, dk, *parts, *(q if g is None else g.contiguous() for g in (q_gain, k_gain)),
        turns, decay, *_row_strides(q), *_row_strides(k), *_row_strides(dout), *dkeys.stride()[:3],
        tokens, scale, 0.0 if trained_length is None else 1 / math.log(trained_length),
        HEADS=heads, KV_HEADS=kv_heads, ROTATED=0 if rotary is None else rotary.heads, LOCAL=local_heads,
        LOG_N=trained_length is not None, NORMALISE=normalise, GAINS=gained,
        CHUNK=1 if rotary is None else xpos_chunk(rotary), PAIRS=pairs, TOKENS=rows, num_warps=4,
    )  # fmt: skip
    if q_gain is None or k_gain is None:
        return dq, dk, None, None
    return dq, dk, parts[0].sum(0).to(q_gain.dtype), parts[1].sum(0).to(k_gain.dtype)


def prepare(
    q: Tensor,
    k: Tensor,
    rotary: Rotary | None,
    *,
    scale: float,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    normalise: bool = True,
    local_heads: int = 0,
    trained_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries (B, T, heads, D) and keys (1 or 2, B, kv_heads, T, D) for `flash.prepared_attention`, differentiable.

    Arguments as in `pointwise.prepare_queries_and_keys`, of a sequence that begins at position 0.
    """
    options = {
        "scale": scale, "normalise": normalise, "local_heads": local_heads, "trained_length": trained_length,
    }  # fmt: skip
    out: tuple[Tensor, Tensor] = _Prepare.apply(q, k, q_gain, k_gain, rotary, options)
    return out
