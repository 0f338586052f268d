"""The model's blocks in few and large operations, for `model.hidden(ids, ragged=batch, blocks=...)`.

A parallel block is two matrix products, as in `inference.prefill`: feed-forward, queries, keys and values as one; both
ways out as another. Weights are packed block by block, and the model's own become views of what is packed: the model
goes on working, and nothing is held twice. Queries and keys are normalised together; gains and temperature are one
factor. Blocks that are sequential, or whose weights are quantised, are left to the model.

Shapes: T tokens, H query heads, K key/value heads, D dim_head, F channels of the feed-forward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.kernels import Geometry
from andromeda.model import Andromeda, Block, Pass


def pack(model: Andromeda, compiled: bool = False) -> list[PackedBlock] | None:
    """The blocks, packed, for `model.hidden`; None where the model's own are to be taken.

    The model must not be moved to another device or type from now on.

    Args:
        compiled: whether what lies between products and attention goes through torch.compile.
    """
    return [PackedBlock(block, compiled) for block in model.blocks] if can_pack(model) else None


def can_pack(model: Andromeda) -> bool:
    """Whether blocks are parallel and their weights plain."""
    linears = [part for block in model.blocks for part in block.modules() if isinstance(part, nn.Linear)]
    plain = all(type(part) is nn.Linear and type(part.weight.data) is Tensor for part in linears)
    return model.config.parallel_blocks and plain


class PackedBlock:
    """A parallel block: (1, T, dim) -> (1, T, dim)."""

    def __init__(self, block: Block, compiled: bool = False) -> None:
        config, attention, feed_forward = block.config, block.attention, block.feed_forward
        self.config, self.attention, self.norm, self.index = config, attention, block.norm, block.index
        with torch.no_grad():
            self.way_in = _pack([feed_forward.up, attention.to_qkv], 0)  # (F + (H + 2 K) D, dim)
            self.way_out = _pack([feed_forward.down, attention.to_out], 1)  # (dim, F + H D)
            norm, dtype = attention.qk_norm, torch.promote_types(self.way_in.dtype, torch.float32)
            factor = torch.ones(config.heads + config.kv_heads, config.dim_head, dtype=dtype, device=self.way_in.device)
            factor[: config.heads] *= norm.scale
            if norm.q_gain is not None and norm.k_gain is not None:
                factor *= torch.cat([norm.q_gain, norm.k_gain])
        self.factor = factor  # (H + K, D)
        self.inner = feed_forward.up.out_features
        through = _compiled if compiled else _as_it_is
        self.normalise = through(normalise if config.normalises_qk else scale)
        self.activate, self.close = through(ACTIVATIONS[config.ff_activation]), through(close)
        self._geometries: dict[int | None, Geometry] = {}

    def __call__(self, x: Tensor, step: Pass) -> Tensor:
        if self.config.deepnorm:
            return self.close(self._sublayers(x, step), x, self.config.deepnorm_alpha, self.norm.weight, self.norm.eps)
        return x + self._sublayers(self.norm(x), step)

    def _sublayers(self, x: Tensor, step: Pass) -> Tensor:
        """Token shift, then attention and feed-forward, added up."""
        config, inner, batch = self.config, self.inner, step.ragged
        assert batch is not None
        heads, both, outer = config.heads, config.heads + config.kv_heads, inner + config.heads * config.dim_head
        if config.shift_tokens:
            x = batch.shift(self.index, 0, x)
        mixed = F.linear(x, self.way_in)  # (1, T, F, then q, k, v)
        q_k_v = mixed[..., inner:].view(1, x.shape[1], both + config.kv_heads, config.dim_head)
        q_k, v = self.normalise(q_k_v[:, :, :both], self.factor), q_k_v[:, :, both:]
        q, k = q_k[:, :, :heads], q_k[:, :, heads:]
        if step.q_scale is not None:
            q = q * step.q_scale.to(q.dtype)
        attended = batch.attention(self.index, q, k, v, self._geometry(step, x.dtype))
        mixed[..., inner:outer] = attended.flatten(2)  # where the queries were
        self.activate(mixed[..., :inner])
        return F.linear(mixed[..., :outer], self.way_out)

    def _geometry(self, step: Pass, dtype: torch.dtype) -> Geometry:
        """This block's, made once, and once more for each doubling of the longest text beyond the trained length."""
        assert step.ragged is not None
        size = None if step.q_scale is None else step.ragged.longest.bit_length()
        if size not in self._geometries:
            bounds, windows = self.attention.bounds(dtype), self.attention.windows(dtype)
            if bounds is not None and size is not None:
                local = self.config.alibi_num_heads
                bounds[local:] *= math.log(1 << size) / math.log(self.config.max_seq_len)
            slopes = self.attention.slopes
            self._geometries[size] = replace(step.geometry, slopes=slopes, bounds=bounds, windows=windows)
        return self._geometries[size]


def normalise(q_k: Tensor, factor: Tensor) -> Tensor:
    """As `kernels.norm`, in the factor's type, then back: (1, T, H + K, D)."""
    wide = q_k.to(factor.dtype)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min_(1e-12)
    return (wide / length).mul_(factor).to(q_k.dtype)


def scale(q_k: Tensor, factor: Tensor) -> Tensor:
    """Without QK norm."""
    return (q_k.to(factor.dtype) * factor).to(q_k.dtype)


def close(added: Tensor, x: Tensor, alpha: float, weight: Tensor, eps: float) -> Tensor:
    """DeepNorm's residual."""
    return F.layer_norm(torch.add(added, x, alpha=alpha), weight.shape, weight, eps=eps)


def _squared_relu(x: Tensor) -> None:
    x.relu_().mul_(x)


def _in_place(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def apply(x: Tensor) -> None:
        x.copy_(function(x))

    return apply


ACTIVATIONS: dict[str, Callable[[Tensor], None]] = {
    "relu2": _squared_relu,
    "gelu": _in_place(F.gelu),
    "silu": _in_place(F.silu),
}


def _as_it_is(function: Callable[..., Any]) -> Any:
    return function


@functools.cache  # for all blocks and models
def _compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function, dynamic=True)


def _pack(linears: list[nn.Linear], dim: int) -> Tensor:
    """Their weights as one, of which each becomes a view."""
    packed = torch.cat([linear.weight for linear in linears], dim)
    parts = packed.split([linear.weight.shape[dim] for linear in linears], dim)
    for linear, part in zip(linears, parts, strict=True):
        linear.weight.data = part
    return packed
