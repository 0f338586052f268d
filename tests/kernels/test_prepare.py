"""The fused preparation and its gradients against autograd through the formulas, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from andromeda.kernels import QKNorm, Rotary
from andromeda.kernels.rotation import xpos_chunk

pytest.importorskip("triton")
from andromeda.kernels import prepare as module
from andromeda.kernels.prepare import prepare

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, SCALE = 4, 3.0
XPOS = Rotary(heads=2, pairs=16, xpos_scale=20.0)
Way = Callable[[Tensor, Tensor, Rotary | None, QKNorm], tuple[Tensor, Tensor]]


def plain(q: Tensor, k: Tensor, rotary: Rotary | None, norm: QKNorm) -> tuple[Tensor, Tensor]:
    """The formulas, rounded to the dtype of q before the rotation and after it."""
    q, k = norm(q, k)
    if rotary is None:
        return q, k.transpose(1, 2)[None]
    position = torch.arange(q.shape[1], dtype=torch.float64)
    chunk = xpos_chunk(rotary)
    decay = (position % chunk - chunk // 2)[:, None] * rotary.log_decay()
    angle = position[:, None] * rotary.rates()

    def turn(x: Tensor, sign: int) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = ((f(angle) * (sign * decay).exp())[:, None].to(x.device, wide) for f in (torch.cos, torch.sin))
        x1, x2 = x.to(wide).chunk(2, dim=-1)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)

    q = torch.cat([turn(q[:, :, : rotary.heads], 1), q[:, :, rotary.heads :]], dim=2)
    return q, torch.stack([k.transpose(1, 2), turn(k, -1).transpose(1, 2)])


def inputs(batch: int, tokens: int, kv_heads: int, dim_head: int, gains: bool = True) -> list[Tensor]:
    """(B, T, (heads + kv_heads) * D), as a projection gives it, and gains."""
    wide = torch.randn(batch, tokens, (HEADS + kv_heads) * dim_head, device=DEVICE)
    return [wide, *(torch.randn(n, dim_head, device=DEVICE) for n in (HEADS, kv_heads) if gains)]


def run(
    way: Way, xs: list[Tensor], dim_head: int, rotary: Rotary | None, dtype: torch.dtype, unit: bool = True
) -> list[Tensor]:
    """Queries, keys and the gradients of all inputs, in `dtype`."""
    wide, *gains = given = [x.detach().to(dtype).requires_grad_() for x in xs]
    heads = wide.unflatten(-1, (-1, dim_head))
    q, k = heads.split([HEADS, heads.shape[2] - HEADS], dim=2)
    out = way(q, k, rotary, QKNorm(SCALE, unit, *gains))
    generator = torch.Generator(DEVICE).manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, device=DEVICE).to(xs[0].dtype).to(x.dtype) for x in out]
    return [*(x.detach() for x in out), *torch.autograd.grad(out, given, upstream)]


@pytest.mark.parametrize(
    ("rotary", "kv_heads", "unit", "gains"),
    [
        (XPOS, 1, True, True),
        (Rotary(heads=4, pairs=16), 4, True, False),
        (None, 1, True, True),
        (XPOS, 1, False, False),
    ],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_the_formulas(rotary: Rotary | None, kv_heads: int, unit: bool, gains: bool) -> None:
    xs = inputs(2, 140, kv_heads, 32, gains)
    truth = run(plain, xs, 32, rotary, torch.float64, unit)
    for a, b in zip(run(prepare, xs, 32, rotary, torch.float32, unit), truth, strict=True):
        assert float((a.double() - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("tokens", [1, 127, 1000, 4096])
def test_error_is_at_most_twice_plain_pytorchs(tokens: int, kv_heads: int, dtype: torch.dtype) -> None:
    rotary = Rotary(heads=2, pairs=64, xpos_scale=512.0)
    xs = [x.to(dtype) for x in inputs(1, tokens, kv_heads, 128)]
    truth, theirs, ours = (
        run(way, xs, 128, rotary, t) for way, t in ((plain, torch.float64), (plain, dtype), (prepare, dtype))
    )
    for what, x, p, t in zip(("q", "keys", "dqk", "dq_gain", "dk_gain"), ours, theirs, truth, strict=True):
        assert x.dtype == dtype, what
        assert relative_error(x, t) <= 2 * relative_error(p, t) + 1e-6, what


def relative_error(x: Tensor, truth: Tensor) -> float:
    assert x.isfinite().all()
    return float((x.double() - truth).norm() / truth.norm())


def test_gradients_are_repeatable_to_the_bit() -> None:
    xs = inputs(1, 200, 1, 32)
    once, again = (run(prepare, xs, 32, XPOS, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_any_strides_will_do() -> None:
    """Heads that do not lie side by side, channels that do not."""
    q, k = torch.randn(1, HEADS, 70, 32, device=DEVICE).transpose(1, 2), torch.randn(1, 70, 32, 1, device=DEVICE).mT
    for a, b in zip(
        prepare(q, k, XPOS, QKNorm(SCALE)), prepare(q.contiguous(), k.contiguous(), XPOS, QKNorm(SCALE)), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("rotary", "gains"), [((2, 100.0, 1.0, 20.0), True), ((0, 1.0, 1.0, 0.0), False)])
def test_operators_are_registered_well(rotary: tuple[int, float, float, float], gains: bool) -> None:
    wide, *gain = inputs(1, 20, 1, 32)
    q, k = wide.unflatten(-1, (-1, 32)).split([HEADS, 1], dim=2)
    q, k, *gain = (x.detach().requires_grad_() for x in (q, k, *gain))
    arguments = (q, k, *(gain if gains else (None, None)), SCALE, True, *rotary)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._prepare, arguments, test_utils=checks)
    upstream = [torch.randn_like(x) for x in module._prepare(*arguments)]
    torch.library.opcheck(module._backward, (*upstream, *arguments), test_utils=("test_schema", "test_faketensor"))
