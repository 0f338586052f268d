"""The feed-forward's way in, in e4m3: the plain product, squared and rounded; without a GPU it is interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

feed_forward = pytest.importorskip("andromeda.kernels.feed_forward", reason="needs triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
E4M3 = torch.float8_e4m3fn

pytestmark = pytest.mark.skipif(
    not feed_forward.has_squared_relu_product(DEVICE), reason="a GPU whose products the kernel is not for"
)


def e4m3(*shape: int, spread: float = 4.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * spread).to(E4M3)


def assert_rounded(got: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Half a step of e4m3 (3 bits, or 2^-9) from what the sums may be: a GPU keeps 13 bits of their largest term."""
    a, b = a.double(), b.double()
    off = (2**-11 if DEVICE.type == "cuda" else 2**-20) * (a.abs() @ b.abs().t())
    low, high = (((a @ b.t() + change).clamp(min=0.0) ** 2 * scale).clamp(max=448.0) for change in (-off, off))
    assert bool((got.double() >= low * (1 - 2**-4) - 2**-10).all())
    assert bool((got.double() <= high * (1 + 2**-4) + 2**-10).all())


@settings(max_examples=12)
@given(st.integers(1, 40), st.sampled_from([16, 48, 64, 80]), st.sampled_from([16, 32, 80]), st.integers(0, 2**31))
def test_it_is_the_plain_product(rows: int, columns: int, depth: int, seed: int) -> None:
    torch.manual_seed(seed)
    a, b = e4m3(rows, depth), e4m3(columns, depth)
    out = torch.full((rows, columns), float("nan"), device=DEVICE).to(E4M3)
    scale = 1.0 / (16.0 * depth)
    feed_forward.squared_relu_product(a, b, out, scale)
    assert_rounded(out, a, b, scale)


def test_several_bands_beside_what_is_not_its_own() -> None:
    """More tiles of rows than a band has; the columns in front, and the rows behind, stay as they are."""
    torch.manual_seed(0)
    rows, columns, depth = feed_forward.ROWS * (feed_forward.BAND + 2) + 5, feed_forward.COLUMNS + 16, 48
    a, b = e4m3(rows, depth), e4m3(columns, depth)
    whole = torch.full((rows + 3, columns + 16), 7.0, device=DEVICE).to(E4M3)
    feed_forward.squared_relu_product(a, b, whole[:rows, 16:], 1.0 / 800)
    assert_rounded(whole[:rows, 16:], a, b, 1.0 / 800)
    assert bool((whole[:, :16].float() == 7).all())
    assert bool((whole[rows:].float() == 7).all())


def test_what_is_above_the_range_is_its_largest_number() -> None:
    a, out = (torch.full((8, n), 448.0, device=DEVICE).to(E4M3) for n in (32, 16))
    feed_forward.squared_relu_product(a, torch.cat([a.float(), -a.float()]).to(E4M3), out, 1.0)
    assert out.float().tolist() == [[448.0] * 8 + [0.0] * 8] * 8


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, "INTERPRETED", False)
    feed_forward.has_squared_relu_product.cache_clear()
    assert not feed_forward.has_squared_relu_product(torch.device("cpu"))
    for capability, runs in (((8, 9), False), ((9, 0), True), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, given=capability: given)
        feed_forward.has_squared_relu_product.cache_clear()
        assert feed_forward.has_squared_relu_product(torch.device("cuda")) == runs
    feed_forward.has_squared_relu_product.cache_clear()
