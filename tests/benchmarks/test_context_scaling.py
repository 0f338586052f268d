"""The simulation of a prompt over many GPUs: what it must give whatever is assumed."""

from __future__ import annotations

import importlib.util
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scaling() -> Any:
    spec = importlib.util.spec_from_file_location("context_scaling", ROOT / "benchmarks" / "context_scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["context_scaling"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(scaling: Any) -> Any:
    return scaling.simulate()


def test_one_gpu_takes_what_was_measured(scaling: Any, found: Any) -> None:
    for row in found:
        if row.ranks == 1:
            assert row.total == pytest.approx(scaling.measured(row.precision).whole[row.tokens])
            assert row.exchanges == 0


def test_more_gpus_are_faster_and_never_more_than_their_number(found: Any) -> None:
    for before, after in pairwise(found):
        if after.ranks > before.ranks:
            assert 0.48 * before.total < after.total < before.total


def test_tiles_by_hand(scaling: Any) -> None:
    assert scaling.tiles_of(0, 200, math.inf) == [1, 2, 3, 4]
    assert scaling.tiles_of(128, 100, math.inf) == [3, 4]
    assert scaling.tiles_of(128, 64, 65) == [2]
    assert scaling.tiles_of(128, 64, 66) == [3]
    assert scaling.makespan([5, 4, 3, 3, 3], places=2) == 10
    assert scaling.makespan([5, 4], places=3) == 5


def test_chunks_of_a_rank_are_an_early_and_a_late_one(scaling: Any) -> None:
    windows = [math.inf] * 300  # more programs than places, so that work counts and not the longest
    even = scaling.attention_tiles(8192, 4, windows)
    assert even == pytest.approx(scaling.attention_tiles(8192, 1, windows) / 4, rel=0.05)
