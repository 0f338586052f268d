"""A model's weights, packed for prefill: two matrices a block, in e4m3 if so wished."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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

    inward: Matrix  # rows: queries, feed-forward (unless in `up`), keys, values
    up: Tensor | None  # (ff, dim) e4m3: the feed-forward's rows, by `kernels.feed_forward`, with `scale`
    outward: Matrix  # columns: attention, feed-forward
    reads: Tensor | None  # (dim,) float32: LayerNorm's weight, which in fp8 is part of the matrices
    norm: Tensor  # (dim,) float32
    eps: float
    q_gain: Tensor | None  # (H, D) float32
    k_gain: Tensor | None  # (kv_heads, D)
    slopes: Tensor | None  # (H,)
    bounds: Tensor | None  # (H,) without log-n
    windows: Tensor | None
    heads8: int  # the last so many heads multiply q and k in e4m3
    attention_scale: float = 1.0  # of attention's output, where it goes to e4m3 without being measured


def columns(config: AndromedaConfig, ff: bool = True) -> tuple[int, int, int]:
    """Where queries, feed-forward, and keys and values end among the rows of `Layer.inward`, with `ff` or without."""
    queries = config.heads * config.dim_head
    inner = queries + (config.ff_mult * config.dim if ff else 0)
    return queries, inner, inner + 2 * config.kv_heads * config.dim_head


def pack(model: Andromeda, dtype: torch.dtype, in_fp8: bool) -> list[Layer]:
    """In `dtype` or e4m3. The last block stays in `dtype`: of its large product only keys and values are left."""
    last = model.config.depth - 1
    return [(_pack_fp8 if in_fp8 and n < last else _pack)(model, n, dtype) for n in range(model.config.depth)]


def _pack(model: Andromeda, n: int, dtype: torch.dtype, matrices: torch.dtype | None = None) -> Layer:
    """For a pass in `dtype`; both matrices in that type or another."""
    config, block = model.config, model.blocks[n]
    attention, ff, gained = block.attention, block.feed_forward, config.attn_qk_norm_dim_scale
    qkv, queries = attention.to_qkv.weight, config.heads * config.dim_head
    return Layer(
        inward=Matrix(torch.cat([qkv[:queries], ff.up.weight, qkv[queries:]]).to(matrices or dtype)),
        up=None,
        outward=Matrix(torch.cat([attention.to_out.weight, ff.down.weight], dim=1).to(matrices or dtype)),
        reads=_norm_before(model, n),
        norm=block.norm.weight.detach().float(),
        eps=block.norm.eps,
        q_gain=attention.q_gain.detach().float() if gained else None,
        k_gain=attention.k_gain.detach().float() if gained else None,
        slopes=attention.slopes if config.alibi_pos_bias else None,
        bounds=attention.bounds(dtype),
        windows=attention.windows(dtype),
        heads8=0,
    )


def _norm_before(model: Andromeda, n: int) -> Tensor | None:
    """The weight of the LayerNorm whose output block n reads; None: the embedding comes as it is."""
    if not model.config.deepnorm:
        return model.blocks[n].norm.weight.detach().float()
    return None if n == 0 else model.blocks[n - 1].norm.weight.detach().float()


def _pack_fp8(model: Andromeda, n: int, dtype: torch.dtype) -> Layer:
    """The same in e4m3.

    Behind a LayerNorm a row has the length sqrt(dim) at most without its weight, which the matrices take over; token
    shift mixes the rows of shift_tokens + 1 tokens. So |w . h| <= |w| reach, with reach = sqrt(dim (shift_tokens + 1)),
    bounds what a column of weights can give: no value of a token's own and no squared ReLU, nor a mean of values, is
    larger, and each can be divided by its bound. The way out multiplies by it.
    """
    config, layer = model.config, _pack(model, n, dtype, torch.float32)
    weight, (queries, inner, _) = layer.inward.value, columns(config)
    if layer.reads is not None:
        weight = weight * layer.reads
    layer = replace(layer, heads8=heads_in_fp8(config))
    if layer.reads is None or config.ff_activation != "relu2" or not _has_squared_relu_product(weight.device):
        return replace(layer, inward=_e4m3(weight), outward=_e4m3(layer.outward.value))
    reach, lengths = math.sqrt(config.dim * (config.shift_tokens + 1)), weight.norm(dim=1).clamp(min=1e-30)
    values = float(lengths[-config.kv_heads * config.dim_head :].max())
    bounds = torch.cat([lengths.new_full((queries,), values * reach), (lengths[queries:inner] * reach) ** 2])
    return replace(
        layer,
        inward=_e4m3(torch.cat([weight[:queries], weight[inner:]])),
        up=(weight[queries:inner] * (E4M3_MAX / lengths[queries:inner, None])).to(E4M3),
        outward=_e4m3(layer.outward.value * (bounds / (E4M3_MAX * norm_scale(config)))),
        attention_scale=E4M3_MAX / (values * reach),
    )


def norm_scale(config: AndromedaConfig) -> float:
    """Of LayerNorm's output in e4m3, at most sqrt(dim) without its weight; of what the way out multiplies as well."""
    return math.sqrt(config.dim) / E4M3_MAX


def up_scale(config: AndromedaConfig) -> float:
    """What brings the largest (h8 . up)^2 to E4M3_MAX, h8 and rows of `up` having lengths up to E4M3_MAX * reach /
    sqrt(dim) and E4M3_MAX (see `_pack_fp8`).
    """
    return 1.0 / (E4M3_MAX**3 * (config.shift_tokens + 1))


def _e4m3(weight: Tensor) -> Matrix:
    scale = (weight.abs().amax(1, keepdim=True).float() / E4M3_MAX).clamp(min=1e-30)
    return Matrix((weight.float() / scale).to(E4M3), scale.t())


def _has_squared_relu_product(device: torch.device) -> bool:
    from andromeda.kernels.feed_forward import has_squared_relu_product  # needs triton

    return has_squared_relu_product(device)
