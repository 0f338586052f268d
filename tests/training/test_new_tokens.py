"""Rows for tokens that are new to a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.training.new_tokens import with_new_tokens, with_room
from tests.training.conftest import TINY


def test_there_is_room_for_all_tokens() -> None:
    assert with_room(TINY, None) == with_room(TINY, 64) == with_room(TINY, 3) == TINY
    assert with_room(TINY, 65) == replace(TINY, num_tokens=128)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_begin_as_the_mean_and_the_rest_stays(tied: bool) -> None:
    old = Andromeda(replace(TINY, tie_embeddings=tied))
    config = with_room(old.config, 66)
    model = Andromeda(config)
    model.load_state_dict(with_new_tokens(old.state_dict(), 60, 66, config.num_tokens))
    ids = torch.arange(16)[None]
    logits, before = model(ids), old(ids)
    assert torch.equal(logits[..., :60], before[..., :60])
    mean = before[..., :60].mean(-1, keepdim=True)
    torch.testing.assert_close(logits[..., 60:66], mean.expand(-1, -1, 6), rtol=1e-4, atol=1e-5)


def test_spare_rows_that_stay_spare_are_left(model: Andromeda) -> None:
    weights = model.state_dict()
    grown = with_new_tokens(weights, 50, 52, 64)
    for name, tensor in weights.items():
        same = slice(None) if tensor.shape[0] != 64 else torch.tensor([*range(50), *range(52, 64)])
        assert torch.equal(grown[name][same], tensor[same]), name
    assert not torch.equal(grown["to_logits.weight"][50:52], weights["to_logits.weight"][50:52])


def test_without_new_tokens_nothing_changes(model: Andromeda) -> None:
    weights = model.state_dict()
    assert all(tensor is weights[name] for name, tensor in with_new_tokens(weights, 50, 50, 64).items())


def test_an_embedding_that_is_no_table_takes_none() -> None:
    with pytest.raises(AndromedaError, match="an embedding of its own, which takes no new tokens"):
        with_new_tokens({"embedding.net": torch.zeros(3)}, 50, 51, 64)
