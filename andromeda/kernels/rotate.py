"""Queries and keys as the flash kernels read them: rotated by their absolute angle, decayed relative to an anchor.

    stored q = c * zeta^(i - anchor(i)) rot(q, theta * i)      stored k = zeta^(anchor(j) - j) rot(k, theta * j)

with anchors as in `rotation.xpos_chunk`, so that the product of the two needs only a factor per channel and pair of
chunks. Angles are reduced in float64 and right at any position; no exponent leaves half a chunk.
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
from andromeda.kernels.rotation import rotation_constants, xpos_chunk

TOKENS = 32  # a program


@triton.jit
def turn(position, turns_ptr, PAIRS: tl.constexpr):
    """(tokens, PAIRS) cosines and sines of absolute angles, reduced in float64."""
    turns = position.to(tl.float64)[:, None] * tl.load(turns_ptr + tl.arange(0, PAIRS))[None, :]
    angle = (turns - tl.floor(turns + 0.5)).to(tl.float32) * 6.283185307179586
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def decay_exponent(position, decay_ptr, CHUNK: tl.constexpr, PAIRS: tl.constexpr):
    """(tokens, PAIRS) base-2 logarithm of a query's decay relative to its anchor; a key's is the opposite."""
    offset = (position % CHUNK - CHUNK // 2).to(tl.float32)
    return tl.load(decay_ptr + tl.arange(0, PAIRS))[None, :] * offset[:, None]


@triton.jit
def _rotate_kernel(
    x_ptr, out_ptr, turns_ptr, decay_ptr,
    x_b, x_t, x_h, out_b, out_t, out_h,
    tokens, first_position, heads, rotated, scale, sign,
    ADJOINT: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens, all heads; the first `rotated` are rotated, all are scaled."""
    batch = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = (t < tokens)[:, None]
    cos, sin = turn(first_position + t, turns_ptr, HALF)
    decay = tl.exp2(sign * decay_exponent(first_position + t, decay_ptr, CHUNK, HALF))
    cos, sin = cos * decay, sin * decay
    if ADJOINT:
        sin = -sin
    p = tl.arange(0, HALF)[None, :]
    source = x_ptr + batch * x_b + t.to(tl.int64)[:, None] * x_t + p
    target = out_ptr + batch * out_b + t.to(tl.int64)[:, None] * out_t + p
    for h in range(heads):
        x1 = tl.load(source + h * x_h, mask=inside).to(tl.float32) * scale
        x2 = tl.load(source + h * x_h + HALF, mask=inside).to(tl.float32) * scale
        y1, y2 = x1, x2
        if h < rotated:
            y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        tl.store(target + h * out_h, y1.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(target + h * out_h + HALF, y2.to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("andromeda::rotate", mutates_args=())
def _rotate(
    x: Tensor, rotated: int, base: float, interpolation: float, xpos_scale: float, first_position: int, scale: float,
    sign: int, adjoint: bool,
) -> Tensor:  # fmt: skip
    """(B, T, heads, D) times `scale`; the first `rotated` heads turned and decayed by zeta^(sign * (i - anchor))."""
    batch, tokens, heads, dim_head = x.shape
    rotary = Rotary(rotated, dim_head // 2, base, interpolation, xpos_scale or None)
    turns, decay = rotation_constants(rotary, x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on_device_of(x):
        _rotate_kernel[(triton.cdiv(tokens, TOKENS), batch)](
            x, out, turns, decay, *x.stride()[:3], *out.stride()[:3],
            tokens, first_position, heads, rotated, scale, sign,
            ADJOINT=adjoint, CHUNK=xpos_chunk(rotary), HALF=rotary.pairs, TOKENS=TOKENS,
        )  # fmt: skip
    return out


@_rotate.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - called by name
    ctx.constants = inputs[1:]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *constants, adjoint = ctx.constants
    return _rotate(unit_stride(grad), *constants, not adjoint), *[None] * 8


_rotate.register_autograd(_gradient, setup_context=_save)


def rotate_queries(q: Tensor, rotary: Rotary | None, first_position: int, scale: float) -> Tensor:
    """(B, T, heads, D), scaled; the first rotary.heads heads rotated and decayed relative to their anchors."""
    if rotary is None:
        return q * scale
    out: Tensor = _rotate(unit_stride(q), rotary.heads, *plain_constants(rotary), first_position, scale, 1, False)
    return out


def stack_keys(k: Tensor, rotary: Rotary | None) -> Tensor:
    """(B, S, kv_heads, D) -> (1 or 2, B, kv_heads, S, D): as they are, and rotated if any query head is."""
    if rotary is None:
        return k.transpose(1, 2)[None]
    rotated = _rotate(unit_stride(k), k.shape[2], *plain_constants(rotary), 0, 1.0, -1, False)
    return torch.stack([k, rotated]).transpose(2, 3)


def unit_stride(x: Tensor) -> Tensor:
    """x, its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def plain_constants(rotary: Rotary) -> tuple[float, float, float]:
    """Base, interpolation and xPos scale (0: none), as custom operators take them."""
    return rotary.base, rotary.interpolation, rotary.xpos_scale or 0.0
