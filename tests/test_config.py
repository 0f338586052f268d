"""The parameter table as the specification has it, what it refuses, and the figures that follow from it."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda import positions
from andromeda.config import PRESETS, AndromedaConfig, Flops, preset
from andromeda.errors import AndromedaError

TABLE = {
    "num_tokens": 50432, "max_seq_len": 8192, "dim": 2560, "depth": 32, "dim_head": 128, "heads": 24,
    "use_abs_pos_emb": False, "alibi_pos_bias": True, "alibi_num_heads": 12, "rotary_xpos": True, "attn_flash": True,
    "shift_tokens": 1, "attn_one_kv_head": True, "qk_norm": True, "attn_qk_norm": True,
    "attn_qk_norm_dim_scale": True, "embedding_provider": "AndromedaEmbedding",
}  # fmt: skip
KNOBS = {
    "deepnorm": True, "parallel_blocks": True, "ff_mult": 4, "ff_activation": "relu2", "tie_embeddings": False,
    "xpos_scale_base": None, "rotary_base": 10000, "position_interpolation": 1.0, "window_epsilon": 1e-4,
    "rotary_heads": "alibi", "log_n_temperature": True,
}  # fmt: skip


def test_names_and_defaults_are_the_specifications() -> None:
    assert AndromedaConfig().to_dict() == {**TABLE, **KNOBS}


class TestPresets:
    @pytest.mark.parametrize(
        ("name", "dim", "depth", "heads", "alibi"),
        [
            ("150m", 768, 12, 8, 4),
            ("400m", 1024, 24, 8, 4),
            ("700m", 2048, 16, 8, 6),
            ("2b", 2560, 32, 24, 12),
            ("7b", 4096, 32, 32, 16),
        ],
    )
    def test_shapes(self, name: str, dim: int, depth: int, heads: int, alibi: int) -> None:
        expected = {**TABLE, **KNOBS, "dim": dim, "depth": depth, "heads": heads, "alibi_num_heads": alibi}
        assert PRESETS[name].to_dict() == expected

    def test_there_are_six_and_the_small_one_is_small(self) -> None:
        assert list(PRESETS) == ["nano", "150m", "400m", "700m", "2b", "7b"]
        assert PRESETS["nano"].num_parameters() < 3e6

    def test_overrides_replace_only_themselves(self) -> None:
        assert preset("2b") == AndromedaConfig()
        assert preset("nano", depth=1) == dataclasses.replace(PRESETS["nano"], depth=1)

    def test_an_unknown_preset_or_key_is_named(self) -> None:
        with pytest.raises(AndromedaError, match=r"'70b'.*nano, 150m, 400m, 700m, 2b, 7b"):
            preset("70b")
        with pytest.raises(AndromedaError, match=r"'num_heads'.*known keys.*heads"):
            preset("nano", num_heads=3)


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *[(key, 0) for key in ("num_tokens", "dim", "depth", "dim_head", "heads", "ff_mult")],
            ("max_seq_len", 1), ("max_seq_len", -8), ("depth", 2.0), ("heads", True), ("dim", "2560"), ("dim", None),
            ("alibi_num_heads", 25), ("alibi_num_heads", -1), ("shift_tokens", -1), ("shift_tokens", 2560),
            ("use_abs_pos_emb", 1), ("attn_flash", "no"), ("embedding_provider", None),
            ("window_epsilon", 1.0), ("window_epsilon", -1e-9), ("window_epsilon", math.nan),
            ("rotary_base", 0.0), ("rotary_base", math.inf), ("position_interpolation", -1.0),
            ("position_interpolation", math.nan), ("position_interpolation", "2"), ("xpos_scale_base", 0.0),
            ("xpos_scale_base", -512), ("xpos_scale_base", math.nan), ("ff_activation", "swish"),
            ("rotary_heads", "global"), ("log_n_temperature", 0.5),
        ],
    )  # fmt: skip
    def test_a_value_out_of_range_is_named(self, key: str, value: object) -> None:
        with pytest.raises(AndromedaError) as caught:
            AndromedaConfig(**{key: value})  # type: ignore[arg-type]
        message = str(caught.value)
        assert message.startswith(f"config: {key}={value!r}")
        assert "\n" not in message

    @pytest.mark.parametrize(
        ("key", "values"),
        [
            ("alibi_num_heads", {"alibi_num_heads": 0}),
            ("attn_qk_norm_dim_scale", {"qk_norm": False, "attn_qk_norm": False}),
            ("rotary_xpos", {"rotary_heads": "none"}),
            ("rotary_xpos", {"alibi_pos_bias": False, "alibi_num_heads": 0}),
            ("dim_head", {"dim_head": 127}),
        ],
    )
    def test_a_combination_that_makes_no_sense_is_named(self, key: str, values: dict[str, Any]) -> None:
        with pytest.raises(AndromedaError, match=f"^config: {key}="):
            AndromedaConfig(**values)

    def test_the_same_values_stand_where_they_make_sense(self) -> None:
        AndromedaConfig(alibi_pos_bias=False, alibi_num_heads=0, rotary_heads="all")
        AndromedaConfig(qk_norm=False, attn_qk_norm=False, attn_qk_norm_dim_scale=False)
        AndromedaConfig(rotary_heads="none", rotary_xpos=False, dim_head=127)
        AndromedaConfig(alibi_num_heads=24, xpos_scale_base=512, window_epsilon=0, shift_tokens=0)

    def test_it_cannot_be_changed_once_built(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            AndromedaConfig().depth = 3  # type: ignore[misc]


class TestJson:
    @pytest.mark.parametrize("name", PRESETS)
    def test_round_trip(self, name: str) -> None:
        config = preset(name, xpos_scale_base=100.5, ff_activation="silu", window_epsilon=3e-7)
        assert AndromedaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_missing_keys_take_the_defaults(self) -> None:
        assert AndromedaConfig.from_dict({}) == AndromedaConfig()

    def test_an_unknown_key_is_named(self) -> None:
        with pytest.raises(AndromedaError, match=r"'n_layer'.*known keys: alibi_num_heads"):
            AndromedaConfig.from_dict({"dim": 64, "n_layer": 3})


class TestTemperature:
    @pytest.mark.parametrize(
        ("qk_norm", "attn_qk_norm", "tau"),
        [
            (False, False, 128**-0.5),
            (True, False, 10.0),
            (False, True, 128**0.5),
            (True, True, 128**0.5),
        ],
    )
    def test_three_settings(self, qk_norm: bool, attn_qk_norm: bool, tau: float) -> None:
        config = AndromedaConfig(qk_norm=qk_norm, attn_qk_norm=attn_qk_norm, attn_qk_norm_dim_scale=False)
        assert config.qk_temperature == pytest.approx(tau)
        assert config.normalises_qk == (qk_norm or attn_qk_norm)


class TestDerivedFigures:
    def test_parameters_of_the_default_model(self) -> None:
        """DESIGN: 2.20 B outside the embedding, 2.33 B tied."""
        assert round(AndromedaConfig().num_parameters(embedding=False) / 1e9, 2) == 2.20
        assert round(AndromedaConfig(tie_embeddings=True).num_parameters() / 1e9, 2) == 2.33

    def test_700m_has_what_it_is_said_to(self) -> None:
        assert round(PRESETS["700m"].num_parameters(embedding=False) / 1e9, 2) == 0.61

    def test_kv_bytes_a_token(self) -> None:
        """16 KiB in bfloat16; as much again in float32; 24 times as much with a key/value head for each query head."""
        assert AndromedaConfig().kv_bytes_per_token() == 16 * 1024
        assert AndromedaConfig().kv_bytes_per_token(bytes_per_element=4) == 32 * 1024
        assert AndromedaConfig(attn_one_kv_head=False).kv_bytes_per_token() == 24 * 16 * 1024

    def test_prefill_of_32768_tokens(self) -> None:
        """0.144 PFLOP of matrix products and 0.211 PFLOP of causal attention."""
        flops = AndromedaConfig().flops_per_token(32_768, logits=False)
        assert round(flops.products * 32_768 / 1e15, 3) == 0.144
        assert round(flops.attention * 32_768 / 1e15, 3) == 0.211
        assert flops.total == flops.products + flops.attention

    def test_logits_cost_one_product_more(self) -> None:
        config = AndromedaConfig()
        extra = config.flops_per_token(1000).products - config.flops_per_token(1000, logits=False).products
        assert extra == 2 * config.dim * config.num_tokens

    def test_products_are_two_operations_a_weight(self) -> None:
        config = preset("nano", attn_qk_norm_dim_scale=False)
        norms = config.depth * config.dim
        weights = config.num_parameters(embedding=False) - norms
        assert config.flops_per_token(1, logits=False).products == 2 * weights

    @given(st.integers(1, 200), st.lists(st.integers(1, 300) | st.just(math.inf), min_size=6, max_size=6))
    def test_attention_counts_the_keys_in_sight(self, context: int, windows: list[float]) -> None:
        config = PRESETS["nano"]
        keys = sum(min(i + 1, window) for window in windows for i in range(context)) / context
        attention = config.flops_per_token(context, windows).attention
        assert attention == pytest.approx(4 * config.depth * config.dim_head * keys)

    def test_certified_windows_save_attention_alone(self) -> None:
        config = AndromedaConfig()
        windowed = config.flops_per_token(131_072, positions.initial_windows(config))
        dense = config.flops_per_token(131_072)
        assert windowed.products == dense.products
        assert 0.5 * dense.attention < windowed.attention < 0.52 * dense.attention

    def test_flops_add_up(self) -> None:
        assert Flops(3.0, 4.0).total == 7.0

    def test_deepnorm_constants(self) -> None:
        """Wang et al. 2022, table 1, decoder only: alpha = (2M)^(1/4), beta = (8M)^(-1/4)."""
        assert AndromedaConfig(depth=32).deepnorm_alpha == pytest.approx(64**0.25)
        assert AndromedaConfig(depth=32).deepnorm_beta == pytest.approx(256**-0.25)
