"""Learning rates as functions of the step; what decays and what does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from andromeda.model import Andromeda
from andromeda.training.optimizer import build_optimizer, learning_rate
from andromeda.training.recipe import DataRecipe, Recipe

MakeRecipe = Callable[..., Recipe]


def test_cosine_by_hand(recipe: MakeRecipe) -> None:
    plan = recipe(steps=110, learning_rate=2.0, warmup_steps=10, final_ratio=0.1)
    assert [learning_rate(plan, step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert learning_rate(plan, 10) == 2.0
    assert learning_rate(plan, 60) == pytest.approx(1.1)  # half way between 2 and 0.2
    assert learning_rate(plan, 35) == pytest.approx(0.2 + 1.8 * (0.5 + 0.5 * 2**-0.5))
    assert learning_rate(plan, 110) == pytest.approx(0.2)


def test_wsd_by_hand(recipe: MakeRecipe) -> None:
    plan = recipe(steps=100, schedule="wsd", learning_rate=1.0, warmup_steps=10, decay_fraction=0.2, final_ratio=0.0)
    assert [learning_rate(plan, step) for step in (9, 10, 50, 80)] == [1.0] * 4
    assert learning_rate(plan, 90) == pytest.approx(0.5)
    assert learning_rate(plan, 99) == pytest.approx(0.05)


def test_constant(recipe: MakeRecipe) -> None:
    plan = recipe(steps=100, schedule="constant", learning_rate=3.0, warmup_steps=2)
    assert [learning_rate(plan, step) for step in (0, 1, 2, 99)] == [1.5, 3.0, 3.0, 3.0]


@given(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    steps=st.integers(1, 60),
    warmup_steps=st.integers(0, 80),
    decay_fraction=st.floats(0.01, 1.0),
    final_ratio=st.floats(0.0, 1.0),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_schedule_rises_then_falls_within_its_limits(
    schedule: str, steps: int, warmup_steps: int, decay_fraction: float, final_ratio: float
) -> None:
    plan = Recipe(
        data=DataRecipe(train="a.txt"), model={}, steps=steps, schedule=schedule, learning_rate=1.0,  # type: ignore[arg-type]
        warmup_steps=warmup_steps, decay_fraction=decay_fraction, final_ratio=final_ratio,
    )  # fmt: skip
    rates = [learning_rate(plan, step) for step in range(steps)]
    rising, falling = rates[:warmup_steps], rates[warmup_steps:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 < rate <= 1 for rate in rising)
    assert all(final_ratio - 1e-12 <= rate <= 1 for rate in falling)


def test_only_matrices_decay(model: Andromeda, recipe: MakeRecipe) -> None:
    optimizer = build_optimizer(model, recipe(weight_decay=0.5, learning_rate=0.1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decays = name.endswith(("to_qkv.weight", "to_out.weight", "up.weight", "down.weight", "to_logits.weight"))
        expected = before[name] * (1 - 0.1 * 0.5) if decays else before[name]
        torch.testing.assert_close(parameter.detach(), expected)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


def test_the_untied_projection_decays(recipe: MakeRecipe) -> None:
    from dataclasses import replace

    from andromeda.config import preset

    config = replace(preset("nano"), depth=1, tie_embeddings=False)
    model = Andromeda(config)
    decaying, others = build_optimizer(model, recipe()).param_groups
    assert any(parameter is model.to_logits.weight for parameter in decaying["params"])
    assert any(parameter is model.embedding.weight for parameter in others["params"])
