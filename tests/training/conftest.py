"""A model and a recipe small enough that a step takes milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from andromeda.config import AndromedaConfig
from andromeda.model import Andromeda
from andromeda.training.recipe import DataRecipe, Recipe
from tests.ranks import Ranks

TINY = AndromedaConfig(
    num_tokens=64, max_seq_len=16, dim=32, depth=2, dim_head=8, heads=4, alibi_num_heads=2, window_epsilon=1e-2
)


@pytest.fixture
def model() -> Andromeda:
    torch.manual_seed(0)
    return Andromeda(TINY)


@pytest.fixture
def recipe() -> Any:
    def make(**keys: Any) -> Recipe:
        return Recipe(**{"data": DataRecipe(train="a.txt"), "model": {"preset": "nano"}, "steps": 6, **keys})

    return make


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes that are joined."""
    pool = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
