"""Slopes, rates, decays, temperatures and bounds against their papers' formulas; logits a million tokens out."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from andromeda import positions
from andromeda.cache import Cache
from andromeda.config import AndromedaConfig, preset
from andromeda.kernels import Geometry, Rotary, attention
from andromeda.model import Andromeda
from tests.quick import quick

MILLION = 1_000_000


class TestAlibiSlopes:
    def test_eight_and_sixteen_are_the_papers(self) -> None:
        """Press et al. 2022, section 3: 1/2, 1/4 ... 1/256; for 16 heads the geometric means are put between."""
        assert positions.alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
        assert positions.alibi_slopes(16) == pytest.approx([2.0 ** (-n / 2) for n in range(1, 17)], rel=1e-15)

    def test_twelve_heads_are_eight_and_every_other_one_of_sixteen(self) -> None:
        expected = [2.0**-n for n in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
        assert positions.alibi_slopes(12) == pytest.approx(expected, rel=1e-15)

    def test_the_few(self) -> None:
        assert positions.alibi_slopes(0) == []
        assert positions.alibi_slopes(1) == [2.0**-8]
        assert positions.alibi_slopes(2) == [2.0**-4, 2.0**-8]
        assert positions.alibi_slopes(3) == [2.0**-4, 2.0**-8, 2.0**-2]

    @given(st.integers(1, 300))
    def test_any_number_of_heads_has_slopes_of_its_own(self, heads: int) -> None:
        slopes = positions.alibi_slopes(heads)
        assert len(set(slopes)) == heads
        assert all(2.0**-8 <= slope < 1.0 for slope in slopes)

    def test_a_head_without_alibi_has_none(self) -> None:
        config = preset("nano")
        assert positions.head_slopes(config) == [2.0**-4, 2.0**-8, 2.0**-2, 0.0, 0.0, 0.0]
        assert positions.head_slopes(preset("nano", alibi_pos_bias=False)) == [0.0] * 6


class TestRotary:
    def test_rates_and_decays_are_the_papers(self) -> None:
        """RoFormer's theta_p = base^(-2p/D), xPos's zeta_p = (p/(D/2) + 0.4)/1.4, over S * interpolation tokens."""
        table = Rotary(heads=1, pairs=4, base=500.0, interpolation=2.0, xpos_scale=512.0)
        for p in range(4):
            assert table.rates()[p].item() == pytest.approx(500.0 ** (-2 * p / 8) / 2, rel=1e-14)
            assert table.log_decay()[p].item() == pytest.approx(math.log((p / 4 + 0.4) / 1.4) / 1024, rel=1e-14)
        assert table.steepest_decay == pytest.approx(table.log_decay().abs().max().item())
        plain = Rotary(heads=1, pairs=4)
        assert plain.steepest_decay == 0.0
        assert not plain.log_decay().any()

    @pytest.mark.parametrize(
        ("overrides", "heads"), [({}, 3), ({"rotary_heads": "all"}, 6), ({"alibi_pos_bias": False}, 3)]
    )
    def test_which_heads_are_rotated(self, overrides: dict[str, Any], heads: int) -> None:
        table = positions.rotary(preset("nano", **overrides))
        assert table is not None
        assert (table.heads, table.pairs, table.xpos_scale) == (heads, 16, 512.0)

    def test_no_heads_and_no_decay(self) -> None:
        assert positions.rotary(preset("nano", rotary_heads="none", rotary_xpos=False)) is None
        plain = positions.rotary(preset("nano", rotary_xpos=False, rotary_base=100.0, position_interpolation=4.0))
        assert plain == Rotary(heads=3, pairs=16, base=100.0, interpolation=4.0, xpos_scale=None)

    def test_the_default_scale_follows_the_trained_length(self) -> None:
        assert AndromedaConfig().xpos_scale == 512.0
        assert AndromedaConfig(max_seq_len=131_072).xpos_scale == 8192.0
        assert AndromedaConfig(xpos_scale_base=100).xpos_scale == 100.0


class TestLogNTemperature:
    def test_one_up_to_the_trained_length_then_a_ratio_of_logarithms(self) -> None:
        factor = positions.log_n_temperature(torch.arange(300), 256)
        assert (factor[:256] == 1.0).all()
        assert factor[256:].tolist() == pytest.approx([math.log(i + 1) / math.log(256) for i in range(256, 300)])
        assert positions.log_n_temperature(torch.tensor([256**2 - 1]), 256).item() == pytest.approx(2.0)


@st.composite
def gains(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Gains of queries (4, D) and keys (1, 2 or 4, D), of any sign and size."""
    pairs, kv_heads = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    spread = draw(st.sampled_from([0.0, 0.3, 2.0]))
    return tuple(1 + spread * torch.randn(heads, 2 * pairs, dtype=torch.float64) for heads in (4, kv_heads))  # type: ignore[return-value]


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Pairs (p, p + D/2) of (..., D) turned by angles (..., D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


class TestLogitBounds:
    @settings(max_examples=60)
    @given(gains())
    def test_no_vector_and_no_rotation_exceeds_them(self, drawn: tuple[Tensor, Tensor]) -> None:
        q_gain, k_gain = drawn
        bounds = positions.logit_bounds(q_gain, k_gain, 3.0)
        shared = k_gain.repeat_interleave(4 // k_gain.shape[0], 0)
        for aligned in (False, True):
            q = torch.nn.functional.normalize(torch.randn(500, *q_gain.shape, dtype=torch.float64), dim=-1)
            k = q * q_gain * shared if aligned else torch.randn_like(q)  # steepest ascent of an unrotated logit
            k = torch.nn.functional.normalize(k, dim=-1)
            angle = torch.rand(500, 4, q_gain.shape[1] // 2, dtype=torch.float64) * (0 if aligned else 2 * math.pi)
            logits = 3.0 * (rotate(q * q_gain, angle) * k * shared).sum(-1)
            assert (logits.abs() <= bounds * (1 + 1e-12)).all()

    @settings(max_examples=60)
    @given(gains())
    def test_some_vector_and_rotation_reach_them(self, drawn: tuple[Tensor, Tensor]) -> None:
        q_gain, k_gain = drawn
        bounds = positions.logit_bounds(q_gain, k_gain, 3.0)
        pairs = q_gain.shape[1] // 2
        for head in range(4):
            key_gain = k_gain[head * k_gain.shape[0] // 4]
            best = 0.0
            for p in range(pairs):  # unit vectors along the pair's larger channels, one turned onto the other
                q_channel, k_channel = (
                    p + pairs * int(g[p + pairs].abs() > g[p].abs()) for g in (q_gain[head], key_gain)
                )
                q, k = torch.zeros(2, 2 * pairs, dtype=torch.float64)
                q[q_channel], k[k_channel] = q_gain[head, q_channel], key_gain[k_channel]
                quarter = torch.full((pairs,), 0.5 * math.pi * (q_channel != k_channel), dtype=torch.float64)
                best = max(best, 3.0 * (rotate(q, quarter) @ k).abs().item())
            assert best == pytest.approx(bounds[head].item(), rel=1e-12)

    def test_odd_heads_are_never_rotated(self) -> None:
        q_gain, k_gain = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5.0, 1.0, 1.0]])
        assert positions.logit_bounds(q_gain, k_gain, 2.0).item() == 10.0


class TestInitialWindows:
    def test_infinite_where_a_head_reaches_everywhere(self) -> None:
        windows = positions.initial_windows(preset("nano"))
        assert all(math.isfinite(window) for window in windows[:3])
        assert list(windows[3:]) == [math.inf] * 3

    @pytest.mark.parametrize(
        "overrides",
        [
            {"window_epsilon": 0.0},
            {"alibi_pos_bias": False},
            {"qk_norm": False, "attn_qk_norm": False, "attn_qk_norm_dim_scale": False},
        ],
    )
    def test_no_certificate_no_windows(self, overrides: dict[str, Any]) -> None:
        assert list(positions.initial_windows(preset("nano", **overrides))) == [math.inf] * 6

    def test_they_are_the_models_own(self) -> None:
        config = preset("nano", num_tokens=8, depth=1)
        attention: Any = Andromeda(config).blocks[0].attention
        own = [math.inf if window == positions.NO_WINDOW else window for window in attention.windows().tolist()]
        assert own == pytest.approx(list(positions.initial_windows(config)), abs=1)


def exact_logit(q: Tensor, k: Tensor, distance: int, rotary: Rotary) -> float:
    """The relative form of rotary and xPos in 40 digits."""
    with mpmath.workdps(40):
        delta, total = mpmath.mpf(distance) / mpmath.mpf(rotary.interpolation), mpmath.mpf(0)
        for p in range(rotary.pairs):
            a, b = (mpmath.mpc(float(x[p]), float(x[p + rotary.pairs])) for x in (q, k))
            turn = mpmath.expj(mpmath.mpf(rotary.base) ** (-mpmath.mpf(p) / rotary.pairs) * delta)
            zeta = (mpmath.mpf(p) / rotary.pairs + mpmath.mpf("0.4")) / mpmath.mpf("1.4")
            decay = 1 if rotary.xpos_scale is None else zeta ** (delta / mpmath.mpf(rotary.xpos_scale))
            total += decay * mpmath.re(a * turn * mpmath.conj(b))
        return float(total)


FAR_ROTARIES = {
    "rotary": Rotary(heads=1, pairs=4),
    "xpos512": Rotary(heads=1, pairs=4, xpos_scale=512.0),  # of the default model: zero, not infinite, by 200,000
    "xpos65536": Rotary(heads=1, pairs=4, xpos_scale=65_536.0),
    "interpolated": Rotary(heads=1, pairs=4, interpolation=16.0, xpos_scale=8192.0),
}
FAR_CASES = [(name, path) for name in FAR_ROTARIES for path in ("tiled", "reference")]
QUICK = [("xpos512", "tiled"), ("interpolated", "tiled"), ("xpos512", "reference")]


class TestFarPositions:
    """Where q zeta^i and k zeta^-j overflow float32 past some 72,000 tokens."""

    DISTANCES = (0, 1, 1000, 72_500, 100_000, 199_999, 200_000)

    @pytest.mark.parametrize("case", quick(FAR_CASES, QUICK), ids="-".join)
    def test_logits_at_a_million(self, case: tuple[str, str]) -> None:
        """Logits read off the output of three queries at the end of a million keys.

        Value channel c is 1 at the key DISTANCES[c] behind the last query and 0 elsewhere, so the output there is
        exp(logit) / sum; the last channel marks a zero key, whose logit is 0.
        """
        rotary, flash = FAR_ROTARIES[case[0]], case[1] == "tiled"
        torch.manual_seed(0)
        q, k, v = torch.randn(1, 3, 1, 8) * 3, torch.zeros(1, MILLION, 1, 8), torch.zeros(1, MILLION, 1, 8)
        for channel, distance in enumerate(self.DISTANCES):
            k[0, MILLION - 1 - distance] = torch.randn(8)
            v[0, MILLION - 1 - distance, 0, channel] = 1.0
        v[0, 123, 0, 7] = 1.0
        out = attention(q, k, v, Geometry(rotary=rotary), flash=flash)
        assert out.isfinite().all()
        logits = (out[0, -1, 0, :7] / out[0, -1, 0, 7]).log().tolist()
        expected = [exact_logit(q[0, -1, 0], k[0, MILLION - 1 - d, 0], d, rotary) for d in self.DISTANCES]
        assert max(map(abs, expected)) > 5
        assert logits == pytest.approx(expected, abs=1e-4)

    def test_gradients_at_a_million_are_finite(self) -> None:
        torch.manual_seed(0)
        q = torch.randn(1, 3, 2, 4, requires_grad=True)
        k, v = (torch.randn(1, MILLION, 1, 4).requires_grad_() for _ in range(2))
        rotary = Rotary(heads=1, pairs=2, xpos_scale=512.0)
        attention(q, k, v, Geometry(rotary=rotary)).square().sum().backward()
        for x in (q, k, v):
            assert x.grad is not None
            assert x.grad.isfinite().all()
            assert x.grad.abs().max() > 0

    @pytest.mark.parametrize("rotary_heads", ["alibi", pytest.param("all", marks=pytest.mark.slow)])
    def test_cached_decode_near_a_million(self, rotary_heads: str) -> None:
        """float32 tiles against the dense path in float64, each over the same cache filled by hand."""
        config = AndromedaConfig(
            num_tokens=11, max_seq_len=1024, dim=16, depth=1, dim_head=8, heads=2, alibi_num_heads=1,
            rotary_heads=rotary_heads, xpos_scale_base=65_536, window_epsilon=0.0,
        )  # fmt: skip
        torch.manual_seed(0)
        held = MILLION - 2
        keys = torch.nn.functional.normalize(torch.randn(1, held, 1, 8), dim=-1)
        values, before = 1000 * torch.randn(1, held, 1, 8), torch.randn(1, 1, 16)  # their mean must not drown in x
        model = Andromeda(config)
        hidden = {}
        for dtype, flash in ((torch.float32, True), (torch.float64, False)):
            twin = Andromeda(AndromedaConfig(**{**config.to_dict(), "attn_flash": flash}))
            twin.load_state_dict(model.state_dict())
            twin.to(dtype)
            cache = Cache()
            cache.append(0, keys.to(dtype), values.to(dtype))
            cache.set_shift_state(0, 0, before.to(dtype))
            cache.advance(held)
            with torch.no_grad():
                steps = [twin.hidden(torch.tensor([[token]]), cache=cache) for token in (3, 1)]
            assert cache.length == MILLION
            hidden[dtype] = torch.cat(steps, 1)
        torch.testing.assert_close(hidden[torch.float32].double(), hidden[torch.float64], rtol=1e-3, atol=1e-3)
