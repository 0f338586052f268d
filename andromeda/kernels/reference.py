"""The truth: attention as the formulas have it, dense and differentiable. Every other path is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from andromeda.kernels.geometry import Geometry, Rotary


def reference_attention(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
    """softmax_j(logit_ij - slope_h * (i - j)) v_j over the visible keys, in the dtype of q.

    The queries are the last T positions of the S keys. Memory grows with T * S.

    Args:
        q: (B, T, heads, dim_head), already scaled. k, v: (B, S, kv_heads, dim_head).

    Returns:
        (B, T, heads, dim_head).
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
    logits = _logits(q, k, geometry.rotary)
    distance = distances(q.shape[1], k.shape[1], q.device)
    if geometry.slopes is not None:
        logits = logits - geometry.slopes.to(logits.dtype)[:, None, None] * distance
    logits = logits.masked_fill(~visible(distance, geometry), -torch.inf)
    return torch.einsum("bhts,bshd->bthd", logits.softmax(-1), v)


def distances(queries: int, keys: int, device: torch.device) -> Tensor:
    """(T, S) integers i - j."""
    j = torch.arange(keys, device=device)
    return j[keys - queries :, None] - j


def visible(distance: Tensor, geometry: Geometry) -> Tensor:
    """(B or 1, heads or 1, T, S) booleans: which keys a query sees, given distances (T, S)."""
    queries, keys = distance.shape
    seen = (distance >= 0)[None, None]
    if geometry.windows is not None:
        seen = seen & (distance < geometry.windows[:, None, None])
    if geometry.starts is not None:
        j = torch.arange(keys, device=distance.device)
        seen = seen & (j >= geometry.starts[:, keys - queries :, None])[:, None]
    return seen


def _logits(q: Tensor, k: Tensor, rotary: Rotary | None) -> Tensor:
    """(B, heads, T, S): q.k, in the first rotary.heads heads rotated and decayed by distance."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if rotary is None:
        return q @ k.transpose(2, 3)
    rotated = rotated_logits(q[:, : rotary.heads], k[:, : rotary.heads], rotary)
    return torch.cat([rotated, q[:, rotary.heads :] @ k[:, rotary.heads :].transpose(2, 3)], dim=1)


def rotated_logits(q: Tensor, k: Tensor, rotary: Rotary, distance: Tensor | None = None) -> Tensor:
    """sum_p zeta_p^delta <rot(q_p, theta_p * delta), k_p>, pair by pair, in relative form: right at any distance.

    Args:
        q: (B, heads, T, dim_head). k: (B, heads, S, dim_head).
        distance: (T, S) integers delta = i - j; None: the queries are the last T of the S positions.
    """
    if distance is None:
        distance = distances(q.shape[2], k.shape[2], q.device)
    delta = distance.double().clamp(min=0)  # keys ahead of the query are never seen; their decay would overflow
    rates, log_decay = rotary.rates().to(q.device), rotary.log_decay().to(q.device)
    logits = torch.zeros((), dtype=q.dtype, device=q.device)
    for p in range(rotary.pairs):
        q1, q2, k1, k2 = (x[..., c : c + 1] for x in (q, k) for c in (p, p + rotary.pairs))
        decay = torch.exp(log_decay[p] * delta)
        cos, sin = ((decay * f(rates[p] * delta)).to(q.dtype) for f in (torch.cos, torch.sin))
        aligned = q1 @ k1.transpose(2, 3) + q2 @ k2.transpose(2, 3)
        crossed = q1 @ k2.transpose(2, 3) - q2 @ k1.transpose(2, 3)
        logits = logits + aligned * cos + crossed * sin
    return logits
