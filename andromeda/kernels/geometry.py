"""Everything about attention that is not q, k or v: how positions enter, and what a query may see."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotary positions, with xPos decay when `xpos_scale` is given, on the first `heads` query heads.

    Channels p and p + pairs form pair p. For a query at distance delta behind which a key lies, pair p is rotated by
    rates[p] * delta and multiplied by exp(log_decay[p] * delta). Plain numbers, so that tables can be cached by it.
    """

    heads: int
    pairs: int
    base: float = 10000.0
    interpolation: float = 1.0
    xpos_scale: float | None = None

    def rates(self) -> Tensor:
        """(pairs,) float64, radians a token."""
        p = torch.arange(self.pairs, dtype=torch.float64)
        return self.base ** (-p / self.pairs) / self.interpolation

    def log_decay(self) -> Tensor:
        """(pairs,) float64, <= 0, a token."""
        if self.xpos_scale is None:
            return torch.zeros(self.pairs, dtype=torch.float64)
        p = torch.arange(self.pairs, dtype=torch.float64)
        return torch.log((p / self.pairs + 0.4) / 1.4) / (self.xpos_scale * self.interpolation)

    @property
    def steepest_decay(self) -> float:
        """The largest |log_decay|, a token: pair 0's."""
        return 0.0 if self.xpos_scale is None else -math.log(0.4 / 1.4) / (self.xpos_scale * self.interpolation)


@dataclass(frozen=True)
class Geometry:
    """Positions and visibility. Query i sees key j if j <= i, i - j < windows[h] and j >= starts[i].

    Attributes:
        slopes: (heads,) ALiBi slopes, or None.
        windows: (heads,) integers, tokens a head sees, itself included; None: no limit.
        bounds: (heads,) upper bounds on |q.k|, or None; kernels may use them to leave out the running maximum.
        starts: (batch, keys) integers, the position at which each token's document begins; None: one document.
        rotary: rotation of the first rotary.heads heads, or None.
        local_heads: heads beyond the first so many have no slope and no window, which spares asking; None: unknown.
    """

    slopes: Tensor | None = None
    windows: Tensor | None = None
    bounds: Tensor | None = None
    starts: Tensor | None = None
    rotary: Rotary | None = None
    local_heads: int | None = None

    def of_heads(self, first: int, end: int) -> Geometry:
        """That of heads first..end - 1 alone."""
        slopes, windows, bounds = (
            None if x is None else x[first:end] for x in (self.slopes, self.windows, self.bounds)
        )
        local = None if self.local_heads is None else min(max(self.local_heads - first, 0), end - first)
        if local == 0:
            slopes = windows = None
        rotated = 0 if self.rotary is None else min(max(self.rotary.heads - first, 0), end - first)
        rotary = replace(self.rotary, heads=rotated) if self.rotary is not None and rotated else None
        return replace(self, slopes=slopes, windows=windows, bounds=bounds, rotary=rotary, local_heads=local)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> None:
    """Raises ValueError where attention's inputs do not fit together."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"attention: q, k, v must be (B, T, heads, dim_head), k like v; got {_shapes(q, k, v)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: batch and dim_head must agree, kv heads divide heads; got {_shapes(q, k, v)}")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} queries are the last of the keys, but there are {k.shape[1]} keys")
    heads = q.shape[2]
    for name in ("slopes", "windows", "bounds"):
        value = getattr(geometry, name)
        if value is not None and value.shape != (heads,):
            raise ValueError(f"attention: {name} must be ({heads},), one a query head; got {tuple(value.shape)}")
    if geometry.starts is not None and geometry.starts.shape != k.shape[:2]:
        raise ValueError(f"attention: starts must be {tuple(k.shape[:2])}; got {tuple(geometry.starts.shape)}")
    if geometry.rotary is not None and (geometry.rotary.pairs * 2 != q.shape[3] or geometry.rotary.heads > heads):
        raise ValueError(f"attention: {geometry.rotary} does not fit {heads} heads of {q.shape[3]} channels")


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
