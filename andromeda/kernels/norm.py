"""What becomes of queries and keys before they are rotated: QK norm, temperature and learned gains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class QKNorm:
    """q -> scale * q_gain * q / |q| and k -> k_gain * k / |k|, by head.

    Attributes:
        scale: the temperature.
        unit: False leaves the lengths as they are.
        q_gain, k_gain: (heads, dim_head), (kv_heads, dim_head), both or none.
    """

    scale: float
    unit: bool = True
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, heads, dim_head) and (B, S, kv_heads, dim_head), in float32 or better, then back."""
        dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide), k.to(wide)
        if self.unit:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        q = q * self.scale
        if self.q_gain is not None and self.k_gain is not None:
            q, k = q * self.q_gain, k * self.k_gain
        return q.to(dtype), k.to(dtype)
