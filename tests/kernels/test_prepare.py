"""Gradients of the fused preparation against autograd through the formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.kernels.geometry import Rotary
from andromeda.kernels.rotation import xpos_chunk

pytest.importorskip("triton")
from andromeda.kernels.prepare import prepare

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRAINED, LOCAL, SCALE = 50, 2, 3.0


def plain(
    q: Tensor, k: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, rotary: Rotary | None, normalise: bool
) -> tuple[Tensor, Tensor]:
    """The formulas, in the dtype of q."""
    if normalise:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if q_gain is not None and k_gain is not None:
        q, k = q * q_gain, k * k_gain
    position = torch.arange(q.shape[1], dtype=torch.float64)
    sharpened = (torch.log(position + 1) / math.log(TRAINED)).clamp(min=1.0)[:, None, None]
    q = SCALE * torch.cat([q[:, :, :LOCAL], q[:, :, LOCAL:] * sharpened], dim=2)
    if rotary is None:
        return q, k.transpose(1, 2)[None]
    chunk = xpos_chunk(rotary)
    decay = (position % chunk - chunk // 2)[:, None] * rotary.log_decay()
    angle = position[:, None] * rotary.rates()

    def turn(x: Tensor, sign: int) -> Tensor:
        cos, sin = ((f(angle) * (sign * decay).exp())[:, None] for f in (torch.cos, torch.sin))
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)

    q = torch.cat([turn(q[:, :, : rotary.heads], 1), q[:, :, rotary.heads :]], dim=2)
    return q, torch.stack([k.transpose(1, 2), turn(k, -1).transpose(1, 2)])


@pytest.mark.parametrize(
    ("rotary", "kv_heads", "normalise", "gains"),
    [
        (Rotary(heads=2, pairs=16, xpos_scale=20.0), 1, True, True),
        (Rotary(heads=4, pairs=16), 4, True, False),
        (None, 1, True, True),
        (Rotary(heads=2, pairs=16, xpos_scale=20.0), 1, False, False),
    ],
)
def test_gradients_are_those_of_the_formulas(
    rotary: Rotary | None, kv_heads: int, normalise: bool, gains: bool
) -> None:
    batch, tokens, heads, dim_head = 2, 140, 4, 32
    wide = torch.randn(batch, tokens, (heads + kv_heads) * dim_head, device=DEVICE, requires_grad=True)
    gain = [torch.randn(n, dim_head, device=DEVICE, requires_grad=True) for n in (heads, kv_heads)] if gains else []
    q, k = wide.unflatten(-1, (-1, dim_head)).split([heads, kv_heads], dim=2)
    got = prepare(
        q, k, rotary, scale=SCALE, q_gain=gain[0] if gains else None, k_gain=gain[1] if gains else None,
        normalise=normalise, local_heads=LOCAL, trained_length=TRAINED,
    )  # fmt: skip
    upstream = [torch.randn_like(x) for x in got]
    grads = torch.autograd.grad(got, [wide, *gain], upstream)

    doubles = [x.detach().cpu().double().requires_grad_() for x in (wide, *gain)]
    q, k = doubles[0].unflatten(-1, (-1, dim_head)).split([heads, kv_heads], dim=2)
    wanted = plain(q, k, doubles[1] if gains else None, doubles[2] if gains else None, rotary, normalise)
    wanted_grads = torch.autograd.grad(wanted, doubles, [x.cpu().double() for x in upstream])
    for a, b in zip((*got, *grads), (*wanted, *wanted_grads), strict=True):
        error = (a.cpu().double() - b).detach().abs().max()
        assert float(error) <= 1e-5 * float(b.detach().abs().max())


def test_gradients_are_repeatable_to_the_bit() -> None:
    q, k = (torch.randn(1, 200, n, 32, device=DEVICE, requires_grad=True) for n in (4, 1))
    gains = [torch.ones(n, 32, device=DEVICE, requires_grad=True) for n in (4, 1)]

    def once() -> tuple[Tensor, ...]:
        out, keys = prepare(q, k, Rotary(heads=2, pairs=16), scale=1.0, q_gain=gains[0], k_gain=gains[1])
        return torch.autograd.grad(out.square().sum() + keys.sum(), [q, k, *gains])

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
