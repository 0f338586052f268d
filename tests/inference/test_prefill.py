"""The fast prefill is the model: the same logits, the same cache. Without a GPU its kernels are interpreted."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from andromeda.cache import Cache
from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError
from andromeda.inference.prefill import Prefill, weights
from andromeda.kernels import rotation
from andromeda.model import Andromeda
from tests.quick import quick

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are defined, which the first prompt does

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
EXACT = "bf16" if CUDA else "fp32"
TOLERANCE = 0.04 if CUDA else 1e-4  # of the largest logit
NO_NORM = {"qk_norm": False, "attn_qk_norm": False, "attn_qk_norm_dim_scale": False}

triton = pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 tokens where the kernels are interpreted, of 128 on a GPU."""
    if not CUDA:
        monkeypatch.setattr(rotation, "MIN_CHUNK", 32)


def build(**overrides: Any) -> Andromeda:
    """A short trained length and steep decay, so that few tokens suffice."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "num_tokens": 48, "max_seq_len": 16, "dim": 64, "depth": 2, "dim_head": 32, "heads": 2, "alibi_num_heads": 1,
        "xpos_scale_base": 30.0 if CUDA else 7.0,
    }  # fmt: skip
    model = Andromeda(AndromedaConfig(**values | overrides)).to(DEVICE).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "gain" in name or "norm" in name:
            parameter.uniform_(0.6, 1.4)
    return model


def some_ids(tokens: int, batch: int = 1) -> Tensor:
    return torch.randint(48, (batch, tokens), device=DEVICE)


def assert_near(got: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "default, three chunks": (290 if CUDA else 75, {}),
    "three blocks, four heads": (33, {"depth": 3, "heads": 4, "alibi_num_heads": 2}),
    "no shift": (23, {"shift_tokens": 0}),
    "shift by two": (23, {"shift_tokens": 2}),
    "rotary on all heads": (140 if CUDA else 40, {"rotary_heads": "all"}),
    "no rotary": (23, {"rotary_heads": "none", "rotary_xpos": False}),
    "no xPos": (23, {"rotary_xpos": False}),
    "no log-n": (23, {"log_n_temperature": False}),
    "many key heads": (23, {"attn_one_kv_head": False}),
    "no ALiBi": (23, {"alibi_pos_bias": False}),
    "no QK norm": (23, NO_NORM),
    "temperature 10, no gains": (23, {"attn_qk_norm": False, "attn_qk_norm_dim_scale": False}),
    "pre-norm": (23, {"deepnorm": False}),
    "GELU": (17, {"ff_activation": "gelu"}),
    "SiLU, one block": (17, {"ff_activation": "silu", "depth": 1}),
    "tied": (17, {"tie_embeddings": True}),
    "one token": (1, {}),
}
AGAIN = {"three blocks, four heads", "shift by two"}


@pytest.mark.parametrize("name", CASES)
def test_last_logits_are_those_of_the_model(name: str) -> None:
    tokens, overrides = CASES[name]
    model, ids = build(**overrides), some_ids(tokens, batch=2 if name in AGAIN else 1)
    runner = Prefill(model, EXACT)
    assert runner.reason is None
    wanted = model(ids, last_only=True)
    assert_near(runner(ids), wanted)
    if name in AGAIN:
        assert_near(runner(ids), wanted)  # in memory that was used before


@pytest.mark.parametrize("overrides", [{}, {"deepnorm": False, "shift_tokens": 2}])
def test_hidden_is_that_of_the_model_for_every_token(overrides: dict[str, Any]) -> None:
    model, ids = build(**overrides), some_ids(23)
    assert_near(Prefill(model, EXACT).hidden(ids), model.hidden(ids))


SHIFTED = {"shift_tokens": 2, "attn_one_kv_head": False}


@pytest.mark.parametrize(
    "case",
    quick(
        [(overrides, parts) for overrides in ({}, SHIFTED, {"deepnorm": False}) for parts in ([24], [1, 18, 5])],
        [({}, [24]), (SHIFTED, [1, 18, 5]), ({"deepnorm": False}, [1, 18, 5])],
    ),
    ids=str,
)
def test_the_cache_goes_on_where_the_prompt_ended(case: tuple[dict[str, Any], list[int]]) -> None:
    overrides, parts = case
    model, ids, after = build(**overrides), some_ids(24, batch=2), some_ids(3, batch=2)
    runner, cache = Prefill(model, EXACT), Cache()
    for part in ids.split(parts, dim=1):
        logits = runner(part, cache)
    assert cache.length == 24
    assert_near(logits, model(ids, last_only=True))
    if CUDA:
        cache = Cache()
        runner(ids, cache)
        model = model.bfloat16()  # the cache is
    assert_near(model(after, cache=cache).float(), model(torch.cat([ids, after], dim=1))[:, -3:].float())


FOUR_HEADS = {"heads": 4, "alibi_num_heads": 2}


def assert_near_in_fp8(model: Andromeda, runner: Prefill) -> None:
    """All hidden states, the last logits, and these of a prompt in two parts."""
    ids = some_ids(24)
    wanted, logits, deepnorm = model.hidden(ids), model(ids, last_only=True), model.config.deepnorm
    assert runner.reason is None
    error = float((runner.hidden(ids) - wanted).norm() / wanted.norm())
    # two roundings to three bits in each of five products; DeepNorm keeps a block's share of the residual small
    assert 1e-4 < error < (0.02 if deepnorm else 0.12)
    assert_near(runner(ids), logits, 0.1 if deepnorm else 0.2)
    cache = Cache()
    runner(ids[:, :9], cache)
    assert_near(runner(ids[:, 9:], cache), logits, 0.1 if deepnorm else 0.2)


@pytest.mark.parametrize(
    ("overrides", "heads8"),
    [
        ({"depth": 3}, 1),
        pytest.param({"deepnorm": False}, 1, marks=pytest.mark.slow),
        ({"depth": 3, "shift_tokens": 2, "deepnorm": False}, 1),
        ({"deepnorm": False, "ff_activation": "gelu"}, 1),
        (FOUR_HEADS | {"depth": 3, "attn_one_kv_head": False}, 2),
        pytest.param(FOUR_HEADS | {"attn_qk_norm_dim_scale": False}, 2, marks=pytest.mark.slow),
        ({"alibi_pos_bias": False, "rotary_heads": "none", "rotary_xpos": False, "alibi_num_heads": 2}, 2),
        ({"rotary_heads": "all"}, 0),
        (NO_NORM, 0),
    ],
)
def test_fp8_is_near(overrides: dict[str, Any], heads8: int) -> None:
    model = build(**overrides)
    runner = Prefill(model, "fp8")
    assert runner.heads8 == heads8
    assert_near_in_fp8(model, runner)


def test_fp8_on_other_gpus_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for which the feed-forward's way in is no kernel of its own: its output is measured, a row at a time."""
    monkeypatch.setattr(weights, "_has_squared_relu_product", lambda device: False)
    model = build(deepnorm=False)
    assert_near_in_fp8(model, Prefill(model, "fp8"))


def test_a_norm_that_leaves_channels_out_in_fp8() -> None:
    """Its weight, in fp8 a part of the matrices, is divided out of what a cache holds."""
    model = build(depth=3)
    for block in model.blocks:
        block.norm.weight[::3] = 0.0
    assert_near_in_fp8(model, Prefill(model, "fp8"))


def test_no_value_overflows_where_none_is_measured() -> None:
    """The largest that a row of weights can give, given an input along it, comes near e4m3's end and not beyond."""
    model = build(depth=3, shift_tokens=0)
    layer = Prefill(model, "fp8")._layers[1]
    assert layer.up is not None
    up = layer.up.float()
    given = (up[:8] * (math.sqrt(model.config.dim) / up[:8].norm(dim=1, keepdim=True))) * (448 / 8)  # as LayerNorm's
    out = (given.to(torch.float8_e4m3fn).float() @ up.t()).clamp(min=0) ** 2 * weights.up_scale(model.config)
    assert float(out.diagonal().min()) > 330
    assert float(out.max()) < 448 * 1.1  # rounding may lengthen a row; a number above the end becomes the end


def test_outliers_among_tokens_do_not_spoil_the_others_in_fp8() -> None:
    model, ids = build(), some_ids(23)
    model.get_parameter("embedding.weight")[7] *= 100.0
    ids[:, ::5] = 7
    wanted = model.hidden(ids)
    assert float((Prefill(model, "fp8").hidden(ids) - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"parallel_blocks": False}, "parallel_blocks"),
        ({"use_abs_pos_emb": True}, "use_abs_pos_emb"),
        ({"attn_flash": False}, "attn_flash"),
        ({"dim_head": 16}, "dim_head=16"),
        ({"dim": 72, "ff_mult": 3}, "dim=72"),
    ],
)
def test_what_is_not_covered_is_left_to_the_model(overrides: dict[str, Any], reason: str) -> None:
    model, ids = build(**overrides), some_ids(15)
    runner, cache = Prefill(model, EXACT), Cache()
    assert reason in str(runner.reason)
    assert torch.equal(runner(ids, cache), model(ids, last_only=True))
    assert cache.length == 15


def test_without_kernels_the_model_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = build().cpu()
    runner, ids = Prefill(model), some_ids(30).cpu()
    assert "the model is on cpu" in str(runner.reason)
    assert torch.equal(runner(ids), model(ids, last_only=True))


def test_the_model_stays_as_it_was() -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Prefill(model, "fp8")(some_ids(20))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_broken_prompt_leaves_the_cache_as_it_was() -> None:
    model, ids, cache = build(), some_ids(20), Cache()
    runner = Prefill(model, EXACT)
    runner(ids, cache)
    with pytest.raises(AndromedaError):
        runner(ids[0], cache)
    assert cache.length == 20


def test_an_unknown_precision_is_an_error() -> None:
    with pytest.raises(AndromedaError, match="precision='fp4' is not one of fp32, bf16, fp8"):
        Prefill(build(), "fp4")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_recorded_graph_computes_the_same(precision: str) -> None:
    model = build(dim=256, dim_head=64, depth=3).bfloat16()
    plain, recorded = Prefill(model, precision), Prefill(model, precision, graph=True)
    for tokens in (500, 500, 77, 500):
        ids = some_ids(tokens, batch=1)
        assert torch.equal(recorded(ids), plain(ids))


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.02), ("fp8", 0.1)])
def test_long_prompts_are_near_the_plain_model(precision: str, bound: float) -> None:
    model = build(dim=256, dim_head=128, depth=4, max_seq_len=1024, xpos_scale_base=None)
    ids = some_ids(5000, batch=1)
    wanted = model.hidden(ids)
    got = Prefill(model, precision).hidden(ids)
    assert float((got - wanted).norm() / wanted.norm()) < bound
