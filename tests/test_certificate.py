"""The certificate: outside a head's window lies at most epsilon of its softmax mass, whatever the vectors.

The worst case is built on purpose: keys inside the window anti-aligned with the query, keys outside aligned with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from andromeda import model as model_module
from andromeda import positions
from andromeda.cache import Cache
from andromeda.config import AndromedaConfig, preset
from andromeda.kernels import Geometry, Rotary
from andromeda.kernels.reference import reference_attention, rotated_logits
from andromeda.kernels.tiled import tiled_attention
from andromeda.model import Andromeda

PAIRS = 3


def window_of(bound: float, slope: float, epsilon: float) -> int:
    one = torch.ones(1, dtype=torch.float64)
    return int(positions.certified_windows(bound * one, slope * one, epsilon).item())


def worst_mass(bound: float, slope: float, window: int) -> float:
    """Mass outside the window when every logit is as bad as it can be and the sequence never ends.

    Inside: e^-B * sum_{d < w} e^(-m d). Outside: e^B * sum_{d >= w} e^(-m d). Both sums are geometric.
    """
    near = -math.expm1(-slope * window)
    far = math.exp(2 * bound - slope * window)
    return far / (near + far)


@dataclass(frozen=True)
class Head:
    """One head's last query, its keys and values, and what certifies its window."""

    q: Tensor  # (1, 1, 1, D), temperature and gain included
    k: Tensor  # (1, S, 1, D), gain included
    v: Tensor
    geometry: Geometry  # with slope and bound, without window
    window: int
    epsilon: float


@st.composite
def heads(draw: st.DrawFn) -> Head:
    """A head with random gains, slope and epsilon; vectors random or adversarial; a few thousand keys at most."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    temperature = draw(st.floats(0.1, 6.0))
    spread = draw(st.sampled_from([0.0, 0.3, 1.0]))
    q_gain, k_gain = 1 + spread * torch.randn(2, 1, 2 * PAIRS, dtype=torch.float64)
    q_gain, k_gain = q_gain.clamp(-1.5, 1.5), k_gain.clamp(-1.5, 1.5)
    slope = draw(st.sampled_from([2.0**-n for n in (0.5, 1, 2, 3.5, 5, 6, 8)]) | st.floats(0.02, 2.0))
    epsilon = draw(st.sampled_from([0.5, 0.1, 1e-4, 1e-8]) | st.floats(1e-9, 0.9))
    rotary = draw(st.sampled_from([None, Rotary(1, PAIRS), Rotary(1, PAIRS, 100.0, 2.0, xpos_scale=900.0)]))
    bound = positions.logit_bounds(q_gain, k_gain, temperature)
    window = window_of(bound.item(), slope, epsilon)
    keys = draw(st.integers(1, 3000)) + draw(st.sampled_from([0, window]))
    q, k = vectors(draw(st.sampled_from(["random", "adversarial"])), keys, window, q_gain, k_gain, rotary)
    v = torch.randn(1, keys, 1, 2 * PAIRS, dtype=torch.float64)
    if draw(st.booleans()):  # values as far apart as they can be, inside and outside
        v = torch.ones_like(v)
        v[:, : max(0, keys - window)] = -1.0
    geometry = Geometry(slopes=torch.tensor([slope], dtype=torch.float64), bounds=bound, rotary=rotary)
    return Head(temperature * q * q_gain, k * k_gain, v, geometry, window, epsilon)


def vectors(
    kind: str, keys: int, window: int, q_gain: Tensor, k_gain: Tensor, rotary: Rotary | None
) -> tuple[Tensor, Tensor]:
    """Unit q (1, 1, 1, D) and k (1, keys, 1, D): random, or all in the pair that sets the bound, counter-rotated."""
    if kind == "random":
        q, k = torch.randn(1, 1, 1, 2 * PAIRS).double(), torch.randn(1, keys, 1, 2 * PAIRS).double()
        return torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    q_channel, k_channel = int((q_gain * k_gain).abs().argmax()), int((q_gain * k_gain).abs().argmax())
    q = torch.zeros(1, 1, 1, 2 * PAIRS, dtype=torch.float64)
    q[..., q_channel] = 1.0
    distance = torch.arange(keys - 1, -1, -1)
    sign = torch.where(distance < window, -1.0, 1.0).double() * torch.sign(q_gain * k_gain)[0, k_channel]
    k = torch.zeros(1, keys, 1, 2 * PAIRS, dtype=torch.float64)
    if rotary is None:
        k[0, :, 0, k_channel] = sign
        return q, k
    p, second = q_channel % PAIRS, q_channel >= PAIRS  # the query, turned by theta * distance, as it meets each key
    angle = rotary.rates()[p] * distance
    k[0, :, 0, p] = sign * (-angle.sin() if second else angle.cos())
    k[0, :, 0, p + PAIRS] = sign * (angle.cos() if second else angle.sin())
    return q, k


def mass_outside(head: Head) -> float:
    """Softmax mass, dense and in float64, of the keys that the window leaves out."""
    q, k = head.q.transpose(1, 2), head.k.transpose(1, 2)
    dot = q @ k.transpose(2, 3) if head.geometry.rotary is None else rotated_logits(q, k, head.geometry.rotary)
    assert head.geometry.slopes is not None
    distance = torch.arange(k.shape[2] - 1, -1, -1)
    mass = (dot[0, 0, 0] - head.geometry.slopes * distance).softmax(-1)
    return mass[distance >= head.window].sum().item()


class TestItIsTrue:
    @settings(max_examples=150)
    @given(heads())
    def test_mass_outside_the_window(self, head: Head) -> None:
        assert mass_outside(head) <= head.epsilon * (1 + 1e-9)

    @settings(max_examples=100)
    @given(heads())
    def test_output_moves_by_at_most_two_epsilon(self, head: Head) -> None:
        """|windowed - dense| <= 2 * epsilon * max|v|, dense without a window, in both paths."""
        windowed = Geometry(
            slopes=head.geometry.slopes,
            bounds=head.geometry.bounds,
            rotary=head.geometry.rotary,
            windows=torch.tensor([head.window]),
        )
        dense = reference_attention(head.q, head.k, head.v, head.geometry)
        limit = 2 * head.epsilon * head.v.abs().max().item() + 1e-12
        for path in (reference_attention, tiled_attention):
            moved = (path(head.q, head.k, head.v, windowed) - dense).abs().max().item()
            assert moved <= limit

    @pytest.mark.parametrize(("slope", "epsilon"), [(0.5, 1e-4), (2.0**-5, 1e-2), (2.0**-8, 0.3)])
    def test_the_worst_case_does_move_the_output(self, slope: float, epsilon: float) -> None:
        """That the tests above can fail: nothing is left of the promise at a window a little shorter than the least."""
        bound = 2.0
        short = math.floor(least_window(bound, slope, epsilon)) - math.ceil(1 / slope)
        keys = short + math.ceil(30 / slope)
        distance = torch.arange(keys - 1, -1, -1)
        k = torch.where(distance < short, -1.0, 1.0).double()[None, :, None, None] * torch.eye(2)[0]
        q = bound * torch.eye(2).double()[None, None, :1]
        head = Head(q, k.double(), torch.ones_like(k), Geometry(slopes=torch.tensor([slope]).double()), short, epsilon)
        assert mass_outside(head) == pytest.approx(worst_mass(bound, slope, short), rel=1e-6)
        assert mass_outside(head) > 1.5 * epsilon

    def test_packed_documents_keep_it(self) -> None:
        """A document's own keys stand in for the sequence: what a query sees is still every key up to a distance."""
        bound, slope, epsilon = 3.0, 0.25, 0.01
        window = window_of(bound, slope, epsilon)
        torch.manual_seed(0)
        q = bound * torch.nn.functional.normalize(torch.randn(1, 300, 1, 4, dtype=torch.float64), dim=-1)
        k = torch.nn.functional.normalize(torch.randn(1, 300, 1, 4, dtype=torch.float64), dim=-1)
        v = torch.randn(1, 300, 1, 4, dtype=torch.float64)
        starts = torch.where(torch.arange(300) < 170, 0, 170)[None]
        slopes = torch.tensor([slope], dtype=torch.float64)
        dense = reference_attention(q, k, v, Geometry(slopes=slopes, starts=starts))
        windowed = tiled_attention(q, k, v, Geometry(slopes=slopes, starts=starts, windows=torch.tensor([window])))
        assert 0 < (windowed - dense).abs().max() <= 2 * epsilon * v.abs().max()


def least_window(bound: float, slope: float, epsilon: float) -> float:
    """The shortest window, not rounded, at which `worst_mass` is epsilon: no sound certificate can be shorter.

    e^(2B - m w) / (1 - e^(-m w) + e^(2B - m w)) = epsilon, solved for w.
    """
    return (2 * bound + math.log1p(-epsilon * -math.expm1(-2 * bound)) - math.log(epsilon)) / slope


class TestItIsTight:
    @settings(max_examples=300)
    @given(st.floats(0.0, 40.0), st.floats(2.0**-8, 2.0), st.floats(1e-9, 0.9))
    def test_no_longer_than_it_says(self, bound: float, slope: float, epsilon: float) -> None:
        """Its only slack: keys outside are compared with those inside, not with all; -ln(1 - epsilon) / m tokens."""
        window, least = window_of(bound, slope, epsilon), least_window(bound, slope, epsilon)
        assert worst_mass(bound, slope, window) <= epsilon * (1 + 1e-9)
        slack = -math.log1p(-epsilon * -math.expm1(-2 * bound)) / slope
        assert max(1, least) <= window + 1e-6
        assert window <= max(1, least + slack + 1 + 1e-6)

    @pytest.mark.parametrize("slope", [2.0**-8, 2.0**-4, 2.0**-0.5])
    def test_the_adversary_comes_within_a_small_factor_of_epsilon(self, slope: float) -> None:
        """Up to rounding a window to whole tokens, the worst case leaves epsilon outside."""
        bound, epsilon = 10.0, 1e-4
        mass = worst_mass(bound, slope, window_of(bound, slope, epsilon))
        assert epsilon * math.exp(-slope) * (1 - epsilon) <= mass <= epsilon

    def test_a_steeper_slope_a_larger_epsilon_or_a_smaller_bound_never_widen_it(self) -> None:
        for slope, epsilon, bound in [(0.1, 1e-4, 5.0), (0.004, 0.3, 0.0), (1.5, 1e-8, 20.0)]:
            window = window_of(bound, slope, epsilon)
            assert window_of(bound, 1.1 * slope, epsilon) <= window
            assert window_of(bound, slope, 1.1 * epsilon) <= window
            assert window_of(0.9 * bound, slope, epsilon) <= window


class TestWindowsOfTheDefaultModel:
    def test_from_42_to_7478_tokens(self) -> None:
        """B = 10 and 12 ALiBi heads."""
        slopes = torch.tensor(positions.alibi_slopes(12), dtype=torch.float64)
        windows = positions.certified_windows(torch.full_like(slopes, 10.0), slopes, 1e-4).tolist()
        assert (min(windows), max(windows)) == (42, 7478)
        assert sorted(windows) == [windows[i] for i in slopes.argsort(descending=True).tolist()]

    def test_edges(self) -> None:
        slopes, bounds = torch.tensor([0.0, 1.0, 1e-12, 0.5]), torch.tensor([1.0, math.inf, 1.0, 0.0])
        windows = positions.certified_windows(bounds, slopes, 1e-4)
        assert windows.dtype == torch.int64
        assert windows[:3].tolist() == [positions.NO_WINDOW] * 3
        assert 1 <= windows[3] < 30
        assert window_of(0.0, 50.0, 0.9) == 1  # a head always sees its own token

    @pytest.mark.parametrize(
        ("context", "most"), [(8_192, 0.65), (32_768, 0.56), (131_072, 0.52)], ids=["8192", "32768", "131072"]
    )
    def test_kept_tiles(self, context: int, most: float, record_property: Callable[[str, object], None]) -> None:
        """Of the default model's 24 heads 12 are global, so one half of the tiles is the least that can be kept."""
        kept, total = kept_tiles(AndromedaConfig(), context)
        record_property("kept_tiles", f"{kept}/{total} = {kept / total:.3f} at {context} tokens")
        assert 0.5 < kept / total < most

    @pytest.mark.parametrize("context", [64, 1000])
    def test_kept_tiles_are_those_in_sight(self, context: int) -> None:
        """The count against the mask itself, tile by tile."""
        config = preset("nano")
        kept = 0
        index = torch.arange(context)
        distance = index[:, None] - index
        for window in positions.initial_windows(config):
            seen = (distance >= 0) & (distance < window)
            padded = torch.nn.functional.pad(seen, (0, -context % 64, 0, -context % 128))
            kept += int(padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 64)).any(3).any(1).sum())
        assert kept_tiles(config, context)[0] == kept


def kept_tiles(config: AndromedaConfig, context: int, queries: int = 128, keys: int = 64) -> tuple[int, int]:
    """Tiles of queries x keys that a causal pass over `context` tokens computes, and those it would without windows."""
    kept = total = 0
    for window in positions.initial_windows(config):
        for first in range(0, context, queries):
            end = math.ceil(min(first + queries, context) / keys)
            kept += end - math.floor(max(0, first - window + 1) / keys)
            total += end
    return kept, total


class TestTheModelsOwn:
    def config(self, **overrides: Any) -> AndromedaConfig:
        values: dict[str, Any] = {"num_tokens": 13, "max_seq_len": 64, "dim": 24, "depth": 1, "dim_head": 6, "heads": 4}
        return AndromedaConfig(**{**values, "alibi_num_heads": 3, "window_epsilon": 0.05, **overrides})

    def attention(self, **overrides: Any) -> Any:
        return Andromeda(self.config(**overrides)).blocks[0].attention

    def test_windows_follow_the_gains(self) -> None:
        """Training changes the gains; the windows are those of the weights as they are now."""
        attention = self.attention()
        before = attention.windows()
        with torch.no_grad():
            attention.q_gain[1, 2] = -3.0
            attention.k_gain[0, 5] = 2.0  # of the same pair as channel 2
        bounds, windows = attention.bounds(), attention.windows()
        assert bounds.tolist() == pytest.approx([math.sqrt(6) * g for g in (2.0, 6.0, 2.0, 2.0)], rel=1e-12)
        assert (windows[:3] > before[:3]).all()
        assert windows[3] == positions.NO_WINDOW
        assert windows[1] == window_of(bounds[1].item(), attention.slopes[1].item(), 0.05)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("scaled", [True, False], ids=["gains", "no_gains"])
    def test_logits_stay_within_the_bounds_in_any_precision(self, dtype: torch.dtype, scaled: bool) -> None:
        """q and k as the model rounds them, however long the sequence."""
        torch.manual_seed(0)
        attention = self.attention(attn_qk_norm_dim_scale=scaled)
        if scaled:
            attention.q_gain.data.normal_(1, 0.5)
            attention.k_gain.data.normal_(1, 0.5)
        attention.to(dtype)
        for like in ("random", "one channel"):
            q, k = torch.randn(1, 1500, 4, 6), torch.randn(1, 1500, 1, 6)
            if like == "one channel":
                q, k = (q.abs() > 1.5).float() + 1e-3 * q, (k.abs() > 1.5).float() + 1e-3 * k
            q, k = attention.qk_norm(q.to(dtype), k.to(dtype))
            logits = torch.einsum("bthd,bsd->bhts", q.double(), k[:, :, 0].double())
            assert (logits.abs().amax((0, 2, 3)) <= attention.bounds(dtype)).all()

    def test_output_of_the_model_moves_by_at_most_two_epsilon(self) -> None:
        """What the attention of a model returns with windows and without, beyond the trained length."""
        torch.manual_seed(0)
        attention, dense = (self.attention(window_epsilon=epsilon).double() for epsilon in (0.05, 0.0))
        attention.q_gain.data.normal_(1, 0.2)
        dense.load_state_dict(attention.state_dict())
        attention.to_out = dense.to_out = torch.nn.Identity()
        x = torch.randn(1, 300, 24, dtype=torch.float64)
        step = Andromeda(self.config())._pass(300, 0, None, None, x.device)
        moved = (attention(x, step) - dense(x, step)).abs().unflatten(-1, (4, 6)).amax((0, 1, 3))
        assert (attention.windows() < 300).tolist() == [True, False, True, False]
        assert (moved > 0).tolist() == [True, False, True, False]
        assert moved.max() <= 2 * 0.05 * attention.to_qkv(x)[..., -6:].abs().max()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_bounds_given_to_the_kernels_count_the_log_n_temperature(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A token that meets itself, all in one channel, reaches them, also beyond the trained length."""
        attention = self.attention(max_seq_len=4).to(dtype)
        picks = torch.eye(6, 24, dtype=dtype)
        attention.to_qkv.weight.data = torch.cat([picks] * 6)
        seen: list[Any] = []

        def spy(*args: Any, **_: Any) -> Any:
            seen.extend(args)
            return args[0]

        monkeypatch.setattr(model_module, "attention", spy)
        step = Andromeda(self.config(max_seq_len=4))._pass(90, 0, None, None, torch.device("cpu"))
        attention(torch.eye(24, dtype=dtype)[torch.arange(90) % 6][None], step)
        q, k, _, geometry = seen
        reached = torch.einsum("bthd,btd->bth", q.double(), k[:, :, 0].double()).amax((0, 1))
        assert (reached <= geometry.bounds).all()
        assert (reached > 0.97 * geometry.bounds).all()
        assert geometry.bounds[3] > 3 * geometry.bounds[2]  # ln(90) / ln(4)

    def test_epsilon_zero_means_no_windows(self) -> None:
        assert self.attention(window_epsilon=0.0).windows() is None
        model = Andromeda(self.config(window_epsilon=0.0))
        ids = torch.randint(13, (1, 40))
        cache = Cache()
        with torch.no_grad():
            torch.testing.assert_close(model(ids, cache=cache), model(ids))
        assert cache.certificates[0][1] is None

    def test_a_cache_keeps_the_windows_of_the_precision_at_work(self) -> None:
        """Under autocast q and k are bfloat16 though the residual is float32: the windows leave room for the former."""
        model = Andromeda(self.config())
        cache = Cache()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(torch.zeros(1, 4, dtype=torch.long), cache=cache)
        windows = cache.certificates[0][1]
        assert windows is not None
        assert windows.tolist() == self.attention().windows(torch.bfloat16).tolist()
