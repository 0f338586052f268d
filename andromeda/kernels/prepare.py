"""What training puts before attention in one pass, as a custom operator with its gradient: `norm.QKNorm` and rotation.

The backward pass computes the normalised vectors again from the projections' outputs. Gradients of the gains are summed
per program and then over programs, in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.kernels.geometry import Rotary
from andromeda.kernels.launch import on_device_of
from andromeda.kernels.norm import QKNorm
from andromeda.kernels.pointwise import TILE, load_gains, load_pairs, row_strides, store_pairs
from andromeda.kernels.pointwise import prepare_queries_and_keys as prepare_into
from andromeda.kernels.rotate import decay_exponent, plain_constants, turn
from andromeda.kernels.rotation import rotation_constants, xpos_chunk


@triton.jit
def _head_gradient(
    source, target, partial, gain_ptr, h, g1, g2, inside,
    NORMALISE: tl.constexpr, GAINS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """From (g1, g2), the gradient of gain * x / |x|, to that of x, and this program's share of the gain's."""
    x1, x2 = load_pairs(source, inside, False, PAIRS)
    inverse = tl.zeros([x1.shape[0], 1], tl.float32) + 1.0
    if NORMALISE:
        inverse = (1.0 / tl.maximum(tl.sqrt(tl.sum(x1 * x1 + x2 * x2, 1)), 1e-12))[:, None]
        x1 *= inverse
        x2 *= inverse
    if GAINS:
        p = tl.arange(0, PAIRS)
        tl.store(partial + h * (2 * PAIRS) + p, tl.sum(g1 * x1, 0))
        tl.store(partial + h * (2 * PAIRS) + PAIRS + p, tl.sum(g2 * x2, 0))
        gain1, gain2 = load_gains(gain_ptr, h, PAIRS)
        g1 *= gain1
        g2 *= gain2
    if NORMALISE:
        along = tl.sum(g1 * x1 + g2 * x2, 1)[:, None]
        g1 = (g1 - x1 * along) * inverse
        g2 = (g2 - x2 * along) * inverse
    store_pairs(target, g1, g2, inside, PAIRS)


@triton.jit
def _prepare_backward_kernel(
    q_ptr, k_ptr, dout_ptr, dkeys_ptr, dq_ptr, dk_ptr, q_part_ptr, k_part_ptr, q_gain_ptr, k_gain_ptr, turns_ptr,
    decay_ptr, q_b, q_t, k_b, k_t, dout_b, dout_t, dkeys_w, dkeys_b, dkeys_h,
    tokens, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, ROTATED: tl.constexpr,
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
    for h in range(HEADS):
        d1, d2 = load_pairs(dout_ptr + batch * dout_b + row * dout_t + h * D + p, inside, False, PAIRS)
        d1 *= scale
        d2 *= scale
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
        g1, g2 = load_pairs(at_dkeys, inside, False, PAIRS)
        if ROTATED > 0:
            d1, d2 = load_pairs(at_dkeys + dkeys_w, inside, False, PAIRS)
            g1 += (d1 * cos + d2 * sin) * growth
            g2 += (d2 * cos - d1 * sin) * growth
        _head_gradient(
            k_ptr + batch * k_b + row * k_t + h * D + p, dk_ptr + ((batch * tokens + row) * KV_HEADS + h) * D + p,
            k_part_ptr + program * (KV_HEADS * D), k_gain_ptr, h, g1, g2, inside, NORMALISE, GAINS, PAIRS,
        )  # fmt: skip


@torch.library.custom_op("andromeda::prepare", mutates_args=())
def _prepare(
    q: Tensor, k: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, scale: float, unit: bool, rotated: int,
    base: float, interpolation: float, xpos_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Queries (B, T, heads, D), keys (1 or 2, B, kv_heads, T, D)."""
    rotary = _rotary(q, rotated, base, interpolation, xpos_scale)
    out, keys = torch.empty(q.shape, dtype=q.dtype, device=q.device), _empty_keys(k, rotated)
    with on_device_of(q):
        prepare_into(
            _heads_adjoin(q), _heads_adjoin(k), keys, rotary=rotary, offset=0, scale=scale, q_gain=q_gain,
            k_gain=k_gain, normalise=unit, out=out,
        )  # fmt: skip
    return out, keys


@_prepare.register_fake
def _(
    q: Tensor, k: Tensor, _q_gain: Tensor | None, _k_gain: Tensor | None, _scale: float, _unit: bool, rotated: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), _empty_keys(k, rotated)


@torch.library.custom_op("andromeda::prepare_backward", mutates_args=())
def _backward(
    dout: Tensor, dkeys: Tensor, q: Tensor, k: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, scale: float,
    unit: bool, rotated: int, base: float, interpolation: float, xpos_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, and what the gains get, in float32: zeros where there are none."""
    batch, tokens, heads, dim_head = q.shape
    kv_heads, rows = k.shape[2], max(1, TILE // (dim_head // 2))
    blocks = triton.cdiv(tokens, rows)
    rotary = _rotary(q, rotated, base, interpolation, xpos_scale)
    turns, decay = (q, q) if rotary is None else rotation_constants(rotary, q.device)
    q, k, dout, dkeys = _heads_adjoin(q), _heads_adjoin(k), dout.contiguous(), dkeys.contiguous()
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    gained = q_gain is not None
    parts = [
        torch.empty(batch * blocks if gained else 0, n, dim_head, dtype=torch.float32, device=q.device)
        for n in (heads, kv_heads)
    ]
    with on_device_of(q):
        _prepare_backward_kernel[(blocks, batch)](
            q, k, dout, dkeys, dq, dk, *parts, *(q if g is None else g.contiguous() for g in (q_gain, k_gain)),
            turns, decay, *row_strides(q), *row_strides(k), *row_strides(dout), *dkeys.stride()[:3],
            tokens, scale, HEADS=heads, KV_HEADS=kv_heads, ROTATED=rotated, NORMALISE=unit, GAINS=gained,
            CHUNK=1 if rotary is None else xpos_chunk(rotary), PAIRS=dim_head // 2, TOKENS=rows, num_warps=4,
        )  # fmt: skip
    return dq, dk, parts[0].sum(0), parts[1].sum(0)


@_backward.register_fake
def _(_dout: Tensor, _dkeys: Tensor, q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq_gain, dk_gain = (x.new_empty(x.shape[2:], dtype=torch.float32) for x in (q, k))
    return q.new_empty(q.shape), k.new_empty(k.shape), dq_gain, dk_gain


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG001 - called by name
    ctx.save_for_backward(*inputs[:4])
    ctx.constants = inputs[4:]


def _gradients(ctx: Any, dout: Tensor, dkeys: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = _backward(dout, dkeys, *saved, *ctx.constants)
    return (*(None if x is None else g.to(x.dtype) for x, g in zip(saved, grads, strict=True)), *[None] * 6)


_prepare.register_autograd(_gradients, setup_context=_save)


def prepare(q: Tensor, k: Tensor, rotary: Rotary | None, norm: QKNorm) -> tuple[Tensor, Tensor]:
    """Queries (B, T, heads, D) and keys (1 or 2, B, kv_heads, T, D) for `flash.prepared_attention`, differentiable.

    Args:
        q: (B, T, heads, D). k: (B, T, kv_heads, D). Both of a sequence that begins at position 0.
        rotary: of the first rotary.heads heads.
        norm: its scale times log2(e), for kernels in base 2.
    """
    numbers = (0, 1.0, 1.0, 0.0) if rotary is None else (rotary.heads, *plain_constants(rotary))
    out: tuple[Tensor, Tensor] = _prepare(q, k, norm.q_gain, norm.k_gain, norm.scale, norm.unit, *numbers)
    return out


def _rotary(q: Tensor, rotated: int, base: float, interpolation: float, xpos_scale: float) -> Rotary | None:
    return None if rotated == 0 else Rotary(rotated, q.shape[3] // 2, base, interpolation, xpos_scale or None)


def _empty_keys(k: Tensor, rotated: int) -> Tensor:
    """As they are, and rotated if any query head is."""
    batch, tokens, kv_heads, dim_head = k.shape
    return torch.empty(2 if rotated else 1, batch, kv_heads, tokens, dim_head, dtype=k.dtype, device=k.device)


def _heads_adjoin(x: Tensor) -> Tensor:
    """x (B, T, heads, D), a token's heads side by side, as the kernels read them."""
    return x if x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3]) else x.contiguous()
