"""Attention over few keys: one fused call of PyTorch's with ALiBi, windows and borders in a dense bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.kernels.geometry import Geometry, Rotary
from andromeda.kernels.reference import distances, visible
from andromeda.kernels.rotation import longest_span, relative_table, rotate

MAX_KEYS = 256  # beyond, the tiled path leaves out more than the fused call gains (benchmarked on CPU)


def is_short(keys: int, geometry: Geometry) -> bool:
    return keys <= min(MAX_KEYS, longest_span(geometry.rotary))


def short_attention(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
    """The function of `reference_attention` for at most MAX_KEYS keys; shapes as there.

    Raises:
        ValueError: too many keys.
    """
    if not is_short(k.shape[1], geometry):
        raise ValueError(f"attention: {k.shape[1]} keys are too many for the short path; see kernels.short.is_short")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, D), (B, kv_heads, S, D)
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) if group > 1 else x for x in (k, v))
    if geometry.rotary is not None:
        q, k = _rotate_heads(q, k, geometry.rotary)
    distance = distances(q.shape[2], k.shape[2], q.device)
    bias = torch.zeros((), dtype=q.dtype, device=q.device)
    if geometry.slopes is not None:
        bias = (-geometry.slopes[:, None, None] * distance).to(q.dtype)
    bias = bias.masked_fill(~visible(distance, geometry), -torch.inf).expand(-1, heads, -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0).transpose(1, 2)


def _rotate_heads(q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Rotates the first heads, relative to the first key."""
    keys, queries = k.shape[2], q.shape[2]
    ahead = int(min(MAX_KEYS, longest_span(rotary)))
    cos, sin = relative_table(rotary, 0, ahead, True, q.device, q.dtype)
    turned_q = rotate(q[:, : rotary.heads], cos[keys - queries : keys], sin[keys - queries : keys])
    cos, sin = relative_table(rotary, 0, ahead, False, q.device, q.dtype)
    turned_k = rotate(k[:, : rotary.heads], cos[:keys], sin[:keys])
    return torch.cat([turned_q, q[:, rotary.heads :]], dim=1), torch.cat([turned_k, k[:, rotary.heads :]], dim=1)
