"""What training puts before attention: QK norm, gains, temperature and rotation, forward and backward, in three ways.

Fused in one kernel (`kernels.prepare`), as the model does it on a GPU; apart, in PyTorch and then the rotation kernel;
and the latter under torch.compile. The floor is that of a copy: queries and keys read and written, and for the gradient
read twice and written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from andromeda import positions
from andromeda.benchmarks import measure
from andromeda.benchmarks.measure import CUDA, DEVICE, DTYPE
from andromeda.config import AndromedaConfig
from andromeda.kernels import rotate
from andromeda.kernels.flash import LOG2_E
from andromeda.kernels.prepare import prepare
from andromeda.model import Attention

Prepare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of q and k


def measured(tokens: int, heads: int, local: int, dim_head: int, copy: float) -> list[dict[str, Any]]:
    """A row for each way: milliseconds, how many times the floor, and the largest error against apart."""
    config = AndromedaConfig(dim=dim_head, heads=heads, dim_head=dim_head, alibi_num_heads=local)
    attention, rotary = Attention(config, 0).to(DEVICE), positions.rotary(config)
    norm = attention.qk_norm

    def fused(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return prepare(q, k, rotary, replace(norm, scale=norm.scale * LOG2_E))

    def apart(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = norm(q, k)
        return rotate.rotate_queries(q, rotary, 0, LOG2_E), rotate.stack_keys(k, rotary)

    ways: dict[str, Prepare] = {"fused": fused, "apart": apart}
    if CUDA:
        ways["apart, compiled"] = torch.compile(apart, dynamic=False)
    numbers = (heads + 1) * dim_head * tokens
    floor = 1e3 * numbers * DTYPE.itemsize * (2 + 3) / copy
    q, k, *given = inputs(tokens, heads, dim_head)

    def gradients(way: Prepare) -> tuple[Tensor, ...]:
        return torch.autograd.grad(way(q, k), (q, k, attention.q_gain, attention.k_gain), given)

    truth = gradients(apart)
    rows = []
    for name, way in ways.items():
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(gradients(way), truth, strict=True))
        measure.require(f"preparation, {name}", error, 2e-2 if CUDA else 1e-4)
        ms = measure.milliseconds(partial(gradients, way))
        kernels = sum(measure.by_kernel(partial(gradients, way)).values()) if CUDA else None
        rows.append({"way": name, "ms": ms, "kernels_ms": kernels, "times_floor": ms / floor, "error": error})
        alone = "" if kernels is None else f" (kernels alone {kernels:.3f})"
        print(f"preparation, {name:16} {ms:8.3f} ms{alone} both ways, {ms / floor:.2f} x its floor", flush=True)
    return rows


def inputs(tokens: int, heads: int, dim_head: int) -> list[Tensor]:
    """q and k, which learn, then gradients of prepared queries and of both sorts of keys."""
    shapes = [(1, tokens, heads, dim_head), (1, tokens, 1, dim_head)]
    q, k, dq = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for shape in (*shapes, shapes[0]))
    dkeys = torch.randn(2, 1, 1, tokens, dim_head, device=DEVICE, dtype=DTYPE)
    return [q.requires_grad_(), k.requires_grad_(), dq, dkeys]
