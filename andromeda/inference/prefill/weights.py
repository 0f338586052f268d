"""A model's weights, packed for prefill: two matrices a block, in e4m3 if so wished."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from andromeda.config import AndromedaConfig
from andromeda.inference.prefill.coverage import heads_in_fp8
from andromeda.model import Andromeda

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Matrix:
    """(out, in) weights; in e4m3 to be multiplied by `scale` (1, out)."""

    value: Tensor
    scale: Tensor | None = None

    def product(self, a: Tensor, out: Tensor, a_scale: Tensor | None = None) -> None:
        """out = a @ value.T, with a (rows, in) in e4m3 if the weights are, to be multiplied by a_scale (rows, 1).

        A scale a row and a column costs no time: it takes another product, which is as fast as that with one for all.
        """
        if self.scale is None:
            torch.mm(a, self.value.t(), out=out)
            return
        assert a_scale is not None
        torch._scaled_mm(
            a, self.value.t(), scale_a=a_scale, scale_b=self.scale, out_dtype=out.dtype, use_fast_accum=True, out=out
        )


@dataclass(frozen=True)
class Layer:
    """A block's weights, and what follows from them."""

    inward: Matrix  # rows: queries, feed-forward, keys, values
    outward: Matrix  # columns: attention, feed-forward
    norm: Tensor  # (dim,) float32
    eps: float
    q_gain: Tensor | None  # (H, D) float32
    k_gain: Tensor | None  # (kv_heads, D)
    slopes: Tensor | None  # (H,)
    bounds: Tensor | None  # (H,) without log-n
    windows: Tensor | None
    heads8: int  # the last so many heads multiply q and k in e4m3


def columns(config: AndromedaConfig) -> tuple[int, int, int]:
    """Where queries, feed-forward, and keys and values end among the rows of `Layer.inward`."""
    queries = config.heads * config.dim_head
    inner = queries + config.ff_mult * config.dim
    return queries, inner, inner + 2 * config.kv_heads * config.dim_head


def pack(model: Andromeda, dtype: torch.dtype, in_fp8: bool) -> list[Layer]:
    """In `dtype` or e4m3. The last block stays in `dtype`: of its large product only keys and values are left."""
    last = model.config.depth - 1
    return [_pack(model, n, dtype, in_fp8 and n < last) for n in range(model.config.depth)]


def _pack(model: Andromeda, n: int, dtype: torch.dtype, in_fp8: bool) -> Layer:
    config, block = model.config, model.blocks[n]
    attention, ff, gained = block.attention, block.feed_forward, config.attn_qk_norm_dim_scale
    qkv, queries = attention.to_qkv.weight, config.heads * config.dim_head

    def matrix(weight: Tensor) -> Matrix:
        if not in_fp8:
            return Matrix(weight.to(dtype))
        scale = (weight.abs().amax(1, keepdim=True).float() / E4M3_MAX).clamp(min=1e-30)
        return Matrix((weight.float() / scale).to(E4M3), scale.t())

    return Layer(
        inward=matrix(torch.cat([qkv[:queries], ff.up.weight, qkv[queries:]])),
        outward=matrix(torch.cat([attention.to_out.weight, ff.down.weight], dim=1)),
        norm=block.norm.weight.detach().float(),
        eps=block.norm.eps,
        q_gain=attention.q_gain.detach().float() if gained else None,
        k_gain=attention.k_gain.detach().float() if gained else None,
        slopes=attention.slopes if config.alibi_pos_bias else None,
        bounds=attention.bounds(dtype),
        windows=attention.windows(dtype),
        heads8=heads_in_fp8(config) if in_fp8 else 0,
    )
