"""The dense reference against its formulas written out one number at a time, and its gradients against differences."""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Iterator
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from andromeda.kernels import Geometry, Rotary, attention, attention_backend
from andromeda.kernels.reference import reference_attention, rotated_logits

HEADS, DIM_HEAD, KEYS = 4, 4, 6
STARTS = torch.tensor([[0, 0, 0, 3, 3, 3], [0, 1, 1, 1, 4, 4]])  # of two packed rows

ROTARY = {
    "no_rotary": None,
    "rotary": Rotary(heads=2, pairs=2),
    "rotary_all": Rotary(heads=HEADS, pairs=2, interpolation=2.5),
    "xpos": Rotary(heads=2, pairs=2, xpos_scale=3.0),
    "xpos_all": Rotary(heads=HEADS, pairs=2, base=100.0, interpolation=2.5, xpos_scale=3.0),
}


def geometries() -> Iterator[tuple[str, Geometry]]:
    """Every combination of rotation, ALiBi, windows and packed documents."""
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64)
    windows = torch.tensor([1, 2, 4, 2**31 - 1])
    both = (False, True)
    for rotary, sloped, windowed, packed in itertools.product(ROTARY, both, both, both):
        name = rotary + "-alibi" * sloped + "-windows" * windowed + "-packed" * packed
        yield (
            name,
            Geometry(
                slopes=slopes if sloped else None,
                windows=windows if windowed else None,
                starts=STARTS if packed else None,
                rotary=ROTARY[rotary],
            ),
        )


GEOMETRIES = dict(geometries())
KV_HEADS = pytest.mark.parametrize("kv_heads", [1, 2, HEADS], ids=["multi_query", "grouped", "multi_head"])


def inputs(queries: int, kv_heads: int) -> list[Tensor]:
    """q, k, v of two rows, float64."""
    torch.manual_seed(0)
    shapes = [(queries, HEADS), (KEYS, kv_heads), (KEYS, kv_heads)]
    return [torch.randn(2, tokens, heads, DIM_HEAD, dtype=torch.float64) for tokens, heads in shapes]


def naive_logit(q: list[float], k: list[float], distance: int, rotary: Rotary | None) -> float:
    """q.k, or the real part of a sum over pairs seen as complex numbers: zeta^delta * q e^(i theta delta) * conj(k)."""
    if rotary is None:
        return sum(a * b for a, b in zip(q, k, strict=True))
    total, delta = 0.0, distance / rotary.interpolation
    for p in range(rotary.pairs):
        theta = rotary.base ** (-p / rotary.pairs)
        zeta = (p / rotary.pairs + 0.4) / 1.4
        decay = 1.0 if rotary.xpos_scale is None else zeta ** (delta / rotary.xpos_scale)
        a, b = (complex(x[p], x[p + rotary.pairs]) for x in (q, k))
        total += decay * (a * cmath.exp(1j * theta * delta) * b.conjugate()).real
    return total


def naive_attention(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
    """Attention in Python's own numbers, a key at a time."""
    (batch, queries, heads, _), (keys, kv_heads) = q.shape, k.shape[1:3]
    slopes = [0.0] * heads if geometry.slopes is None else geometry.slopes.tolist()
    windows = [keys] * heads if geometry.windows is None else geometry.windows.tolist()
    out = torch.full_like(q, math.nan)
    for b, t, h in itertools.product(range(batch), range(queries), range(heads)):
        i, group = keys - queries + t, h // (heads // kv_heads)
        start = 0 if geometry.starts is None else int(geometry.starts[b, i])
        rotary = geometry.rotary if geometry.rotary is not None and h < geometry.rotary.heads else None
        weights = {
            j: math.exp(naive_logit(q[b, t, h].tolist(), k[b, j, group].tolist(), i - j, rotary) - slopes[h] * (i - j))
            for j in range(i + 1)
            if j >= start and i - j < windows[h]
        }
        total = sum(weights.values())
        out[b, t, h] = sum(weight / total * v[b, j, group] for j, weight in weights.items())
    return out


@KV_HEADS
@pytest.mark.parametrize("name", GEOMETRIES)
def test_reference_is_the_formula(name: str, kv_heads: int) -> None:
    q, k, v = inputs(4, kv_heads)
    out = reference_attention(q, k, v, GEOMETRIES[name])
    torch.testing.assert_close(out, naive_attention(q, k, v, GEOMETRIES[name]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "kv_heads"), list(zip(GEOMETRIES, itertools.cycle([1, 2, HEADS]))))
def test_gradcheck(name: str, kv_heads: int) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, kv_heads))
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference_attention(q, k, v, GEOMETRIES[name]), (q, k, v), fast_mode=True
    )


def test_gradcheck_of_every_entry() -> None:
    geometry = GEOMETRIES["xpos-alibi-windows-packed"]
    q, k, v = (x.requires_grad_() for x in inputs(2, kv_heads=1))
    assert torch.autograd.gradcheck(lambda q, k, v: reference_attention(q, k, v, geometry), (q, k, v))


@pytest.mark.parametrize("distance", [0, 1, 777, 72_500, 200_000, 999_999])
def test_rotated_logit_to_fifty_digits(distance: int) -> None:
    rotary = Rotary(heads=1, pairs=4, interpolation=2.0, xpos_scale=65_536.0)
    torch.manual_seed(1)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    with mpmath.workdps(50):
        delta = mpmath.mpf(distance) / 2
        expected = mpmath.mpf(0)
        for p in range(4):
            zeta = (mpmath.mpf(p) / 4 + mpmath.mpf("0.4")) / mpmath.mpf("1.4")
            turn = mpmath.expj(mpmath.mpf(10000) ** (-mpmath.mpf(p) / 4) * delta)
            a, b = (mpmath.mpc(float(x[p]), float(x[p + 4])) for x in (q, k))
            expected += zeta ** (delta / 65_536) * mpmath.re(a * turn * mpmath.conj(b))
    logit = rotated_logits(q[None, None, None], k[None, None, None], rotary, torch.tensor([[distance]]))
    assert logit.item() == pytest.approx(float(expected), abs=1e-10)


def test_keys_ahead_neither_count_nor_overflow() -> None:
    """zeta^delta of a key ahead of the query would be infinite; it must not turn into NaN behind the mask."""
    rotary = Rotary(heads=HEADS, pairs=2, xpos_scale=1e-3)
    q, k, v = (x.requires_grad_() for x in inputs(KEYS, kv_heads=1))
    out = reference_attention(q, k, v, Geometry(rotary=rotary))
    out.sum().backward()
    for x in (out, q.grad, k.grad, v.grad):
        assert x is not None
        assert x.isfinite().all()


class TestDispatch:
    def test_flash_off_is_the_reference_itself(self) -> None:
        q, k, v = inputs(KEYS, kv_heads=1)
        geometry = GEOMETRIES["xpos-alibi"]
        assert torch.equal(attention(q, k, v, geometry, flash=False), reference_attention(q, k, v, geometry))
        with attention_backend("reference"):
            assert torch.equal(attention(q, k, v, geometry), reference_attention(q, k, v, geometry))

    def test_an_unknown_backend_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"'cudnn'.*reference.*tiled"), attention_backend("cudnn"):
            pass

    def test_a_forced_backend_ends_with_its_block(self) -> None:
        q, k, v = inputs(KEYS, kv_heads=1)
        plain = attention(q, k, v, Geometry())
        with pytest.raises(RuntimeError, match="broken off"), attention_backend("reference"):
            raise RuntimeError("broken off")
        assert torch.equal(attention(q, k, v, Geometry()), plain)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"q": torch.zeros(2, 8, HEADS, DIM_HEAD)}, "8 queries .* 6 keys"),
            ({"q": torch.zeros(2, 6, 5, DIM_HEAD), "kv_heads": 2}, "divide heads"),
            ({"q": torch.zeros(3, 6, HEADS, DIM_HEAD)}, "batch"),
            ({"q": torch.zeros(2, 6, HEADS, 6)}, "dim_head"),
            ({"q": torch.zeros(6, HEADS, DIM_HEAD)}, "must be"),
            ({"geometry": Geometry(slopes=torch.zeros(5))}, "slopes"),
            ({"geometry": Geometry(windows=torch.ones(1, HEADS))}, "windows"),
            ({"geometry": Geometry(bounds=torch.zeros(7))}, "bounds"),
            ({"geometry": Geometry(starts=torch.zeros(2, 5))}, "starts"),
            ({"geometry": Geometry(rotary=Rotary(heads=2, pairs=4))}, "does not fit"),
            ({"geometry": Geometry(rotary=Rotary(heads=5, pairs=2))}, "does not fit"),
        ],
    )
    def test_shapes_that_do_not_fit_are_refused(self, change: dict[str, Any], message: str) -> None:
        q, k, v = inputs(KEYS, change.get("kv_heads", 1))
        with pytest.raises(ValueError, match=message):
            attention(change.get("q", q), k, v, change.get("geometry", Geometry()))
