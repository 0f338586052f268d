"""What training puts before attention: QK norm, gains, temperature and rotation, forward and backward, in three ways.

Apart, as the model does it (PyTorch, then the rotation kernel); the same under torch.compile; and fused in one kernel
(`kernels.prepare`). The floor is that of a copy: queries and keys read and written, and for the gradient read twice and
written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.benchmarks import measure
from andromeda.benchmarks.measure import CUDA, DEVICE, DTYPE
from andromeda.kernels import Rotary, rotate
from andromeda.kernels.prepare import prepare

Prepare = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # q, k and their gains


def measured(tokens: int, heads: int, local: int, dim_head: int, copy: float) -> list[dict[str, Any]]:
    """A row for each way: milliseconds, how many times the floor, and the largest error against the first."""
    rotary, scale = Rotary(local, dim_head // 2, xpos_scale=512.0), dim_head**0.5 * 1.4426950408889634
    apart = separate(rotary, scale)
    ways: dict[str, Prepare] = {
        "apart": apart,
        "fused": lambda q, k, q_gain, k_gain: prepare(
            q, k, rotary, scale=scale, q_gain=q_gain, k_gain=k_gain, local_heads=local
        ),
    }
    if CUDA:
        ways["apart, compiled"] = torch.compile(apart, dynamic=False)
    numbers = (heads + 1) * dim_head * tokens
    floor = 1e3 * numbers * DTYPE.itemsize * (2 + 3) / copy
    given = inputs(tokens, heads, dim_head)
    truth = gradients(apart, given)
    rows = []
    for name, way in ways.items():
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(gradients(way, given), truth, strict=True))
        measure.require(f"preparation, {name}", error, 2e-2 if CUDA else 1e-4)
        ms = measure.milliseconds(lambda way=way: gradients(way, given))  # type: ignore[misc]
        rows.append({"way": name, "ms": ms, "times_floor": ms / floor, "error": error})
        print(f"preparation, {name:16} {ms:8.3f} ms forward and backward, {ms / floor:.2f} x its floor", flush=True)
    return rows


def separate(rotary: Rotary, scale: float) -> Prepare:
    """As `model.Attention` and `kernels.flash` do it."""

    def run(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor) -> tuple[Tensor, Tensor]:
        normal_q = F.normalize(q.float(), dim=-1) * scale * q_gain
        normal_k = F.normalize(k.float(), dim=-1) * k_gain
        prepared = rotate.rotate_queries(normal_q.to(q.dtype), rotary, 0, 1.0)
        return prepared, rotate.stack_keys(normal_k.to(k.dtype), rotary)

    return run


def inputs(tokens: int, heads: int, dim_head: int) -> list[Tensor]:
    """q, k and gains that learn, then gradients of queries and of both sorts of keys."""
    shapes = [(1, tokens, heads, dim_head), (1, tokens, 1, dim_head)]
    q, k, dq = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for shape in (*shapes, shapes[0]))
    dkeys = torch.randn(2, 1, 1, tokens, dim_head, device=DEVICE, dtype=DTYPE)
    gains = [torch.ones(n, dim_head, device=DEVICE) for n in (heads, 1)]
    return [x.requires_grad_() for x in (q, k, *gains)] + [dq, dkeys]


def gradients(way: Prepare, given: list[Tensor]) -> tuple[Tensor, ...]:
    """Of q, k and both gains."""
    *learned, dq, dkeys = given
    return torch.autograd.grad(way(*learned), learned, (dq, dkeys))
