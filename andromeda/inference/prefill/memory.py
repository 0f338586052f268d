"""The memory of a prefill, which all blocks share; it is laid out once for a prompt's shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from andromeda.config import AndromedaConfig
from andromeda.inference.prefill.weights import E4M3, Layer, columns, norm_scale


@dataclass(frozen=True)
class Space:
    """See `andromeda.inference.prefill` for the letters."""

    x: Tensor  # (B, R, dim) residual, in delayed rows
    h: Tensor | None  # the same, normalised, where that is not the residual
    h8: Tensor | None  # the same in e4m3
    h_scales: list[Tensor]  # (B * R, 1) a block: of h8, one number
    fused: Tensor  # (B, R, columns): queries, then attention's output | feed-forward (unless in act8) | keys | values
    keys: Tensor  # (1 or 2, B, kv_heads, S, D)
    q8: Tensor | None  # (B, T, global heads, D) in e4m3
    keys8: Tensor | None  # (1, B, kv_heads, S, D) in e4m3
    out: Tensor  # (B, R, dim)
    act8: Tensor | None  # (B, R, H * D + ff) attention's output and the activation in e4m3
    act_scales: Tensor | None  # (B * R, 1)


def allocate(
    config: AndromedaConfig, layers: Sequence[Layer], dtype: torch.dtype, batch: int, tokens: int, held: int
) -> Space:
    """For `tokens` new tokens a sequence behind `held` old ones."""
    first = layers[0]
    fp8, heads8, device = first.inward.scale is not None, first.heads8, first.norm.device
    rows, sorts = tokens + config.shift_tokens, 2 if config.num_rotated_heads else 1
    _, inner, all_columns = columns(config)

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    residual = batch, rows, config.dim
    return Space(
        x=new(*residual).zero_(),
        h=None if config.deepnorm else new(*residual).zero_(),
        h8=new(*residual, dtype=torch.uint8).zero_().view(E4M3) if fp8 else None,
        h_scales=_scales(config, layers, batch * rows) if fp8 else [],
        fused=new(batch, rows, all_columns),
        keys=new(sorts, batch, config.kv_heads, held + tokens, config.dim_head),
        q8=new(batch, tokens, heads8, config.dim_head, dtype=E4M3) if heads8 else None,
        keys8=new(1, batch, config.kv_heads, held + tokens, config.dim_head, dtype=E4M3) if heads8 else None,
        out=new(*residual),
        act8=new(batch, rows, inner, dtype=E4M3) if fp8 else None,
        act_scales=new(batch * rows, 1, dtype=torch.float32) if fp8 else None,
    )


def _scales(config: AndromedaConfig, layers: Sequence[Layer], rows: int) -> list[Tensor]:
    """Of what each block reads: LayerNorm's output, sqrt(dim) at most without its weight, or, behind no LayerNorm, what
    will be measured.
    """
    norm = layers[0].norm.new_full((rows, 1), norm_scale(config))
    return [torch.ones_like(norm) if layer.reads is None else norm for layer in layers]
