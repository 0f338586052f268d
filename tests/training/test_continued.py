"""Going on at another length: what changes of a model, and what does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.positions import rotary
from andromeda.training.continued import KEYS, continued
from tests.training.conftest import TINY

LONGER: dict[str, Any] = {"max_seq_len": 16384, "position_interpolation": 4.0, "rotary_base": 40000.0}


def test_the_three_keys_change_and_nothing_else() -> None:
    assert set(LONGER) == set(KEYS)
    before, after = AndromedaConfig().to_dict(), continued(AndromedaConfig(), LONGER).to_dict()
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {*KEYS, "xpos_scale_base"}
    assert continued(AndromedaConfig(), {}) == AndromedaConfig()


def test_xpos_decays_as_it_was_trained_to() -> None:
    longer = continued(AndromedaConfig(), LONGER)
    assert replace(AndromedaConfig(), max_seq_len=16384).xpos_scale != longer.xpos_scale == AndromedaConfig().xpos_scale
    plain = AndromedaConfig(rotary_xpos=False)
    assert continued(plain, LONGER).xpos_scale_base is None


@torch.no_grad()
def test_a_greater_length_alone_changes_nothing_within_the_old_one(model: Andromeda) -> None:
    """Windows, bounds, rotation and decay stay; beyond, global heads are not sharpened any more."""
    longer = Andromeda(continued(TINY, {"max_seq_len": 64})).eval()
    longer.load_state_dict(model.state_dict())
    ids = torch.randint(TINY.num_tokens, (2, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(longer(ids[:, :16]), model(ids[:, :16]))
    assert not torch.allclose(longer(ids)[:, 40:], model(ids)[:, 40:], atol=1e-4)
    for ours, theirs in zip(longer.blocks, model.blocks, strict=True):
        assert torch.equal(ours.attention.windows(), theirs.attention.windows())  # type: ignore[arg-type]


def test_interpolated_positions_are_the_trained_ones_between_each_other() -> None:
    """Tokens four places apart are one place apart for the heads that are rotated."""
    short, long = rotary(TINY), rotary(continued(TINY, {"max_seq_len": 64, "position_interpolation": 4.0}))
    assert short is not None and long is not None
    assert long == replace(short, interpolation=4.0)


def test_learned_positions_cannot_be_longer() -> None:
    config = AndromedaConfig(use_abs_pos_emb=True)
    with pytest.raises(AndromedaError, match=r"model\.max_seq_len=16384 needs a weight for each position"):
        continued(config, LONGER)
    assert continued(config, {"rotary_base": 5e4}).rotary_base == 5e4


def test_a_value_out_of_range_is_refused() -> None:
    with pytest.raises(AndromedaError, match=r"position_interpolation=0\.0 must be positive"):
        continued(TINY, {"position_interpolation": 0.0})
