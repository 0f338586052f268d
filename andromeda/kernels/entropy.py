"""How widely heads look: the entropy of attention's probabilities, in tiles."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from andromeda.kernels.geometry import Geometry, check_shapes
from andromeda.kernels.tiled import Walk


@torch.no_grad()
def attention_entropy(q: Tensor, k: Tensor, geometry: Geometry) -> Tensor:
    """-sum_j p_ij ln p_ij over the probabilities of `attention`, for the last T positions of the S keys. No gradient.

    Memory grows with T, not with T * S.

    Args:
        q: (B, T, heads, dim_head), as `attention` takes it. k: (B, S, kv_heads, dim_head).

    Returns:
        (B, T, heads) nats, in float32 (float64 of float64); e to the power of it is how many keys a query looks at.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_shapes(q, k, k, geometry)
    with torch.autocast(q.device.type, enabled=False):  # the types inside are chosen by hand
        walk = Walk(q, k, k, geometry)
        entropy = torch.empty(q.shape[:3], dtype=walk.dtype, device=q.device)
        for tile in walk.tiles():
            for band in walk.bands:
                logits = (chunk for _, chunk in walk.logits(tile, band))
                entropy[:, tile.rows].index_copy_(2, band.heads, _entropy(logits).transpose(1, 2))
    return entropy


def _entropy(chunks: Iterable[Tensor]) -> Tensor:
    """(..., S) logits, chunk by chunk over S -> (...) entropies.

    With weights w_j = e^(l_j - top) and top the largest logit so far: ln(sum w) - sum w (l - top) / sum w.
    """
    top: Tensor | None = None
    total = weighted = torch.zeros(())
    for logits in chunks:
        lowest = torch.finfo(logits.dtype).min  # a chunk may be all unseen
        new_top = logits.amax(-1).clamp(min=lowest)
        if top is not None:
            new_top = torch.maximum(new_top, top)
            scale = torch.exp(top - new_top)
            weighted = scale * (weighted + total * (top - new_top).clamp(min=lowest))
            total = scale * total
        below = logits.sub_(new_top[..., None]).clamp_(min=lowest)
        weights = below.exp()
        total = total + weights.sum(-1)
        weighted = weighted + weights.mul_(below).sum(-1)
        top = new_top
    return total.log() - weighted / total
