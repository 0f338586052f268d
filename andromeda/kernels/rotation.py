"""Rotary positions relative to an anchor: tables for the paths in plain PyTorch, constants for the kernels."""

from __future__ import annotations

import functools
import math

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


MIN_CHUNK = 128  # tokens; tiles of the Triton kernels divide it


def xpos_chunk(rotary: Rotary) -> int:
    """Tokens that share an anchor in the Triton kernels: a power of two, about 8 times xPos's scale.

    Position i of chunk c = i // chunk belongs to the anchor c * chunk + chunk / 2. Stored queries carry
    zeta^(i - anchor), stored keys zeta^(anchor - j), so no exponent leaves chunk / 2 whatever the position; between
    chunks a constant factor per channel, at most 1, is left.
    """
    if rotary.xpos_scale is None:
        return MIN_CHUNK
    return max(MIN_CHUNK, 1 << (int(8 * rotary.xpos_scale * rotary.interpolation).bit_length() - 1))


@functools.cache  # never dropped: a CUDA graph remembers where they lie
def rotation_constants(rotary: Rotary, device: torch.device) -> tuple[Tensor, Tensor]:
    """(pairs,) float64 turns a token, and (pairs,) float32 base-2 logarithm of the decay a token."""
    with torch.inference_mode(False):
        turns = rotary.rates() / (2 * math.pi)
        return turns.to(device), (rotary.log_decay() / math.log(2)).to(device, torch.float32)
