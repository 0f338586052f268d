"""Sequences that several processes share: the loss curve, weights and entropies of one process, and exact resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.training import heads
from andromeda.training.objective import NextToken
from andromeda.training.processes import Processes, check_teams
from andromeda.training.recipe import DataRecipe, Recipe
from tests.ranks import Ranks
from tests.training.conftest import TINY
from tests.training.kept import CPU
from tests.training.test_engines import assert_close, folders, run, tensors
from tests.training.test_heads import text


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("engine", "together"),
    [
        ("ddp", 2), pytest.param("ddp", 4, marks=pytest.mark.slow), pytest.param("fsdp", 2, marks=pytest.mark.slow),
        ("fsdp", 4),
    ],
)  # fmt: skip
def test_the_loss_curve_is_that_of_one_process(engine: str, together: int, ranks: Ranks, tmp_path: Path) -> None:
    """Two teams of two, whose shares of a step's five sequences differ; one team of four."""
    one, four = folders(tmp_path, "one", "four")
    keys: dict[str, Any] = {"batch_size": 5, "accumulate": 1}
    expected, operations = run(None, keys, 4, str(one))
    found = ranks(run, 4, {**keys, "engine": engine, "context_parallel": together}, 4, str(four))
    for lines, reckoned in found:
        assert reckoned == pytest.approx(operations)
        for line, exact in zip(lines, expected, strict=True):
            for key in ("step", "tokens", "loss", "gradient_norm", "learning_rate"):
                assert line[key] == pytest.approx(exact[key], rel=1e-5), key
    assert_close(four, one, 1e-4)


def test_stopped_and_resumed_it_is_the_same_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    """With FSDP. DDP packs gradients otherwise in its first step, and more than two processes then sum otherwise."""
    whole, parts = folders(tmp_path, "whole", "parts")
    keys = {"context_parallel": 2, "engine": "fsdp"}
    ranks(run, 4, keys, 6, str(whole))
    ranks(run, 4, keys, 2, str(parts))
    ranks(run, 4, keys, 6, str(parts), True)
    ours, theirs = tensors(parts), tensors(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_number_goes_on_and_shares_them_otherwise(ranks: Ranks, tmp_path: Path) -> None:
    whole, parts = folders(tmp_path, "whole", "parts")
    run(None, {}, 6, str(whole))
    run(None, {}, 2, str(parts))
    ranks(run, 4, {"context_parallel": 4}, 4, str(parts), True)
    ranks(run, 4, {"context_parallel": 2}, 6, str(parts), True)
    assert_close(parts, whole, 1e-4)


def watched(group: Any, tokens: int, span: int) -> list[list[float]]:
    torch.manual_seed(0)
    objective = NextToken(Andromeda(TINY), CPU)
    objective.team = group
    heads.SPAN = span
    try:
        return heads.entropies(objective.model, objective, text(tokens))
    finally:
        heads.SPAN = 128


@pytest.mark.parametrize(("tokens", "span"), [(41, 128), (41, 5), (6, 1)])
def test_entropies_are_those_of_one_process(tokens: int, span: int, ranks: Ranks) -> None:
    expected = torch.tensor(watched(None, tokens, span))
    for found in ranks(watched, 4, tokens, span):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=2e-4)


def test_a_number_of_processes_that_makes_no_teams_is_told_before_any_work() -> None:
    check_teams(2, 4)
    for together, there, some in ((2, 1, "there is 1"), (4, 6, "there are 6")):
        what = f"context_parallel={together} needs a multiple of {together} processes, and {some}; start as many"
        with pytest.raises(AndromedaError, match=what):
            check_teams(together, there)


def test_who_is_in_which_team() -> None:
    six = [Processes(rank, 6, CPU, together=3) for rank in range(6)]
    assert [processes.team_number for processes in six] == [0, 0, 0, 1, 1, 1]
    assert [processes.leads for processes in six] == [True, False, False, True, False, False]
    assert six[0].teams == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"context_parallel": 0}, "context_parallel=0 must be at least 1"),
        ({"context_parallel": 2, "compile": True}, "context_parallel=2 does not go with compile yet"),
        ({"context_parallel": 2, "engine": "zero3"}, "context_parallel=2 does not go with engine='zero3' yet"),
    ],
)
def test_recipes_that_make_no_sense(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(AndromedaError, match=message):
        Recipe(data=DataRecipe(train="a.txt"), model={"preset": "nano"}, **keys)
