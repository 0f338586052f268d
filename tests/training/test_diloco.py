"""The step that groups take together, by its formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from andromeda.model import Andromeda
from andromeda.training.diloco import Replica
from andromeda.training.engines import Engine
from andromeda.training.processes import Processes
from andromeda.training.recipe import DataRecipe, DiLoCoRecipe, Method, Recipe
from andromeda.training.state import TrainingState

Weights = dict[str, Tensor]


class AnotherGroup:
    """torchft's manager, where there is one other group.

    Args:
        moves: of the other, in each exchange, in the order of the parameters.
    """

    def __init__(self, moves: Iterator[Tensor]) -> None:
        self.moves, self.exchanges = moves, 0

    def start_quorum(self) -> None:
        self.exchanges += 1

    def allreduce(self, move: Tensor) -> Any:
        move.add_(next(self.moves)).div_(2)
        return self

    def wait(self) -> None: ...

    def should_commit(self) -> bool:
        return True

    def current_step(self) -> int:
        return self.exchanges

    def num_participants(self) -> int:
        return 2


def weights(model: Andromeda) -> Weights:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def drift(model: Andromeda) -> None:
    """Some steps of one's own."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


def outer_step(shared: Tensor, moves: list[Tensor]) -> Tensor:
    """By DiLoCo's paper, from the weights that were shared, and both groups' mean move at each exchange so far."""
    momentum = torch.zeros_like(shared)
    for move in moves:
        momentum = 0.9 * momentum + move
    return shared - 0.7 * (moves[-1] + 0.9 * momentum)


@pytest.mark.parametrize("method", get_args(Method))
def test_what_all_go_on_from(method: Method, model: Andromeda) -> None:
    diloco = DiLoCoRecipe("http://nowhere", method=method)
    recipe = Recipe(data=DataRecipe("a.txt"), model={}, diloco=diloco)
    engine = Engine(recipe, model, Processes(0, 1, torch.device("cpu")))
    group = Replica(recipe, diloco, engine, TrainingState(), None, print)
    moves: dict[str, list[Tensor]] = {name: [] for name in weights(model)}
    for _ in range(3):
        shared = weights(model)
        other = Andromeda(model.config)
        other.load_state_dict(model.state_dict())
        drift(model)
        drift(other)
        group._manager = AnotherGroup(shared[name] - weight for name, weight in weights(other).items())
        mine, theirs = weights(model), weights(other)
        assert group.exchange() == {"step": 0, "groups": 2}
        for name, weight in weights(model).items():
            mean = (mine[name] + theirs[name]) / 2
            moves[name].append(shared[name] - mean)
            expected = mean if method == "local_sgd" else outer_step(shared[name], moves[name])
            torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
