"""Rotary positions relative to an anchor, for the paths in plain PyTorch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from andromeda.kernels.geometry import Rotary

MAX_DECAY_EXPONENT = 8.0  # e^8 times a logit leaves room in float16


def longest_span(rotary: Rotary | None) -> float:
    """How many tokens ahead of its anchor a key may lie before its decay, which grows there, is too large."""
    if rotary is None or rotary.steepest_decay == 0:
        return torch.inf
    return max(1.0, MAX_DECAY_EXPONENT / rotary.steepest_decay)


@functools.lru_cache(maxsize=8)
def relative_table(
    rotary: Rotary, back: int, ahead: int, queries: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(back + ahead, pairs) cosines and sines, times the decay, for offsets -back..ahead - 1; angles in float64.

    A query's factor decays with its offset, a key's with the offset's opposite: together, with their distance.
    """
    with torch.inference_mode(False):  # a table made while generating serves training too
        offset = torch.arange(-back, ahead, dtype=torch.float64)[:, None]
        decay = torch.exp(rotary.log_decay() * (offset if queries else -offset))
        angle = rotary.rates() * offset
        return (decay * angle.cos()).to(device, dtype), (decay * angle.sin()).to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, adjoint: bool = False) -> Tensor:
    """(..., S, D) with tables (S, D/2); channels p and p + D/2 are a pair."""
    if adjoint:
        sin = -sin
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
