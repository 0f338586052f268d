"""The pointwise kernels against the formulas in float64. Without a GPU they run in Triton's interpreter, in float32."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from andromeda.cache import shift_tokens
from andromeda.kernels.geometry import Geometry, Rotary
from andromeda.kernels.reference import reference_attention
from andromeda.kernels.rotation import xpos_chunk

pytest.importorskip("triton")
from andromeda.kernels import pointwise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SUBNORMAL = 2.0**-10  # half the distance of the smallest numbers in e4m3
LOG2_E = math.log2(math.e)
XPOS = Rotary(heads=2, pairs=16, xpos_scale=20.0)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def prepared(
    q: Tensor, k: Tensor, rotary: Rotary | None, offset: int, slots: int, **options: object
) -> tuple[Tensor, Tensor]:
    """q and k of the new tokens lie in one wide buffer, as they do in the runner."""
    heads, kv_heads, dim_head = q.shape[2], k.shape[2], q.shape[3]
    wide = torch.cat([q.flatten(2), rand(*q.shape[:2], 48), k.flatten(2)], dim=-1)
    at_q = wide[..., : heads * dim_head].unflatten(-1, (heads, dim_head))
    at_k = wide[..., -kv_heads * dim_head :].unflatten(-1, (kv_heads, dim_head))
    keys = torch.full((1 if rotary is None else 2, q.shape[0], kv_heads, slots, dim_head), torch.nan, device=DEVICE)
    pointwise.prepare_queries_and_keys(at_q, at_k, keys, rotary=rotary, offset=offset, **options)  # type: ignore[arg-type]
    assert torch.equal(at_k, k)
    return at_q, keys


def angle_and_decay(rotary: Rotary, position: Tensor) -> tuple[Tensor, Tensor]:
    """(T, pairs) in float64: absolute angles, and log of zeta^((i - anchor)/S)."""
    chunk = xpos_chunk(rotary)
    ahead = (position % chunk - chunk // 2).double()
    return position.double()[:, None] * rotary.rates(), ahead[:, None] * rotary.log_decay()


def turned(x: Tensor, angle: Tensor, decay: Tensor) -> Tensor:
    """x (B, T, heads, D) in float64."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = ((f(angle) * decay.exp())[:, None] for f in (torch.cos, torch.sin))
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


@pytest.mark.parametrize("offset", [0, 37, 999_990])
@pytest.mark.parametrize("rotary", [None, XPOS, Rotary(heads=4, pairs=16)])
def test_queries_and_keys_are_those_of_the_formulas(rotary: Rotary | None, offset: int) -> None:
    batch, tokens, heads, dim_head, trained = 2 if offset < 1000 else 1, 70, 4, 32, 50
    q, k = rand(batch, tokens, heads, dim_head), rand(batch, tokens, 1, dim_head)
    q_gain, k_gain = rand(heads, dim_head), rand(1, dim_head)
    slots = offset + tokens
    got_q, keys = prepared(
        q, k, rotary, offset, slots, scale=3.0, q_gain=q_gain, k_gain=k_gain, local_heads=2, trained_length=trained
    )
    position = torch.arange(offset, slots)
    sharpened = (torch.log(position.double() + 1) / math.log(trained)).clamp(min=1.0)[:, None, None]
    want_q = F.normalize(q.cpu().double(), dim=-1) * q_gain.cpu() * 3.0
    want_q = torch.cat([want_q[:, :, :2], want_q[:, :, 2:] * sharpened], dim=2)
    want_k = F.normalize(k.cpu().double(), dim=-1) * k_gain.cpu()
    assert_rounded(keys[0, :, 0, offset:], want_k[:, :, 0])
    assert keys[:, :, :, :offset].isnan().all()
    if rotary is not None:
        angle, decay = angle_and_decay(rotary, position)
        want_q = torch.cat([turned(want_q[:, :, : rotary.heads], angle, decay), want_q[:, :, rotary.heads :]], dim=2)
        want = turned(want_k, angle, -decay)
        assert_rounded(keys[1, :, 0, offset:], want[:, :, 0])
    assert_rounded(got_q, want_q)


def assert_rounded(x: Tensor, wanted: Tensor) -> None:
    """To float32's rounding of the largest: a rotated channel may be a small difference of large products."""
    torch.testing.assert_close(x.cpu().double(), wanted, atol=1e-6 * float(wanted.abs().max()), rtol=4e-6)


@pytest.mark.parametrize(("kv_heads", "normalise"), [(1, True), (4, True), (1, False)])
def test_attention_over_them_is_the_reference(kv_heads: int, normalise: bool) -> None:
    tokens, heads, dim_head = 300, 4, 32  # three chunks of 128
    q, k, v = (rand(1, tokens, n, dim_head) for n in (heads, kv_heads, kv_heads))
    slopes = torch.tensor([0.1, 0.01, 0.0, 0.0], device=DEVICE)
    got_q, keys = prepared(q, k, XPOS, 0, tokens, scale=2.0 * LOG2_E, normalise=normalise)
    plain_q, plain_k = (F.normalize(x.cpu().double(), dim=-1) if normalise else x.cpu().double() for x in (q, k))
    geometry = Geometry(slopes=slopes.cpu(), rotary=XPOS)
    wanted = reference_attention(2.0 * plain_q, plain_k, v.cpu().double(), geometry)
    position = torch.arange(tokens)
    anchor = position // xpos_chunk(XPOS)
    between = torch.exp(XPOS.log_decay() * xpos_chunk(XPOS) * (anchor[:, None] - anchor)[..., None].clamp(min=0))
    between = torch.cat([between, between], dim=-1)  # (T, S, D)
    for h in range(heads):
        x, sort = got_q[0, :, h].cpu().double(), int(h < XPOS.heads)
        y = keys[sort, 0, h % kv_heads].cpu().double()
        logits = torch.einsum("td,tsd,sd->ts", x, between if sort else torch.ones_like(between), y) / LOG2_E
        logits -= slopes[h].cpu() * (position[:, None] - position)
        logits = logits.masked_fill(position > position[:, None], -torch.inf)
        got = logits.softmax(-1) @ v[0, :, h % kv_heads].cpu().double()
        torch.testing.assert_close(got, wanted[0, :, h], atol=1e-5, rtol=1e-5)


def test_queries_and_keys_go_alone_too() -> None:
    q, k = rand(1, 40, 4, 32), rand(1, 40, 1, 32)
    both_q, both_keys = prepared(q, k, XPOS, 5, 45, scale=1.0)
    alone, keys = q.clone(), torch.full_like(both_keys, torch.nan)
    pointwise.prepare_queries_and_keys(alone, None, None, rotary=XPOS, offset=5, scale=1.0)
    pointwise.prepare_queries_and_keys(None, k, keys, rotary=XPOS, offset=5, scale=1.0)
    assert torch.equal(alone, both_q)
    assert torch.equal(keys.nan_to_num(), both_keys.nan_to_num())


ACTIVATIONS = {"relu2": lambda x: F.relu(x) ** 2, "gelu": F.gelu, "silu": F.silu}


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("width", [16, 100, 2500])
def test_activation_stays_within_its_columns(kind: str, width: int) -> None:
    whole = 3 * rand(7, width + 64)
    before = whole.clone()
    pointwise.activate(whole[:, 32 : 32 + width], kind)
    torch.testing.assert_close(whole[:, 32 : 32 + width], ACTIVATIONS[kind](before[:, 32 : 32 + width]))
    assert torch.equal(whole[:, :32], before[:, :32])
    assert torch.equal(whole[:, 32 + width :], before[:, 32 + width :])


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_in_e4m3_is_off_by_a_rounding(kind: str) -> None:
    plain, width = 48, 208
    x = rand(5, plain + width + 32)
    x[3] = 0.0
    out = torch.empty(5, plain + width, dtype=torch.float8_e4m3fn, device=DEVICE)
    scale = torch.full((5,), torch.nan, device=DEVICE)
    pointwise.activate_to_fp8(x[:, : plain + width], plain, kind, out, scale)
    wanted = torch.cat([x[:, :plain], ACTIVATIONS[kind](x[:, plain : plain + width])], dim=1)
    got = out.float() * scale[:, None]
    assert got[3].count_nonzero() == 0
    assert ((got - wanted).abs() <= wanted.abs() / 16 + SUBNORMAL * scale[:, None]).all()
    torch.testing.assert_close(out[4].float().abs().max(), torch.tensor(448.0, device=DEVICE))


@settings(max_examples=25)
@given(
    shift=st.integers(0, 3),
    dim=st.integers(16, 70),
    tokens=st.integers(1, 9),
    post=st.booleans(),
    batch=st.integers(1, 2),
)
def test_add_norm_shift_is_the_plain_block(shift: int, dim: int, tokens: int, post: bool, batch: int) -> None:
    torch.manual_seed(dim * tokens)
    x, o, weight = rand(batch, tokens, dim), rand(batch, tokens, dim), rand(dim)
    rows, separate = (torch.zeros(batch, tokens + shift, dim, device=DEVICE) for _ in range(2))
    pointwise.to_delayed_rows(x, shift, rows)
    assert torch.equal(rows[:, :tokens], shift_tokens(x, shift))
    padded = F.pad(o, (0, 0, 0, shift), value=torch.nan)
    pointwise.add_norm_shift(rows, padded, weight, shift=shift, alpha=1.7, eps=1e-5, post=post, h=separate)
    total = 1.7 * x + o
    normalised = F.layer_norm(total, (dim,), weight, eps=1e-5)
    assert_near(separate[:, :tokens], shift_tokens(normalised, shift))
    assert_near(pointwise.from_delayed_rows(rows, shift, 0, tokens), normalised if post else total)
    assert_near(rows[:, :tokens], shift_tokens(normalised if post else total, shift))


def assert_near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_what_is_normalised_fits_e4m3_whatever_comes() -> None:
    dim, unit = 64, 448 / 8
    x, o = (torch.zeros(1, 2, dim, device=DEVICE) for _ in range(2))
    o[0, 0, 5] = 1e6  # a LayerNorm's largest output
    o[0, 1] = rand(dim)
    h = torch.zeros(1, 2, dim, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    weight = 100 * rand(dim)  # is not in it
    pointwise.add_norm_shift(x, o, weight, shift=0, alpha=1.0, eps=1e-5, post=True, h=h, h_factor=unit)
    assert h.float().isfinite().all()
    wanted = F.layer_norm(o, (dim,), eps=1e-5)
    torch.testing.assert_close(x, wanted * weight, atol=1e-3, rtol=1e-5)
    assert ((h.float() / unit - wanted).abs() <= wanted.abs() / 16 + SUBNORMAL / unit).all()


def test_unnormalised_zero_stays_zero() -> None:
    q, k = torch.zeros(1, 3, 2, 32, device=DEVICE), torch.zeros(1, 3, 1, 32, device=DEVICE)
    got, keys = prepared(q, k, XPOS, 0, 3, scale=1.0)
    assert got.count_nonzero() == 0
    assert keys.count_nonzero() == 0
