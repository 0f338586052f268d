"""Learning rates as functions of the step; what each optimizer moves, and what decays."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from andromeda.config import preset
from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.training.adamw8bit import to_plain
from andromeda.training.optimizer import build_optimizer, check_optimizer, learning_rate, set_learning_rate
from andromeda.training.recipe import DataRecipe, OptimizerName, Recipe

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


def gradients(model: Andromeda) -> dict[str, Tensor]:
    """Random ones, of the size that training has."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def weights(model: Andromeda) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def is_matrix(name: str) -> bool:
    return name.endswith(("to_qkv.weight", "to_out.weight", "up.weight", "down.weight", "to_logits.weight"))


def adamw_by_hand(weight: Tensor, gradient: Tensor, rate: float, decay: float) -> Tensor:
    """Its first step, in which both moments, corrected for their bias, are those of the one gradient."""
    return weight * (1 - rate * decay) - rate * gradient / (gradient.abs() + 1e-8)


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_only_matrices_decay(model: Andromeda, recipe: MakeRecipe, name: str) -> None:
    optimizer = build_optimizer(model, recipe(optimizer=name, weight_decay=0.5, learning_rate=0.1))
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, weight in weights(model).items():
        torch.testing.assert_close(weight, before[key] * (1 - 0.1 * 0.5) if is_matrix(key) else before[key])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_first_step_by_hand(model: Andromeda, recipe: MakeRecipe, name: str) -> None:
    before, moved_by = weights(model), gradients(model)
    build_optimizer(model, recipe(optimizer=name, weight_decay=0.5, learning_rate=0.01)).step()
    for key, weight in weights(model).items():
        decay = 0.5 if is_matrix(key) else 0.0
        torch.testing.assert_close(weight, adamw_by_hand(before[key], moved_by[key], 0.01, decay))


def test_muon_s_first_step_by_hand(model: Andromeda, recipe: MakeRecipe) -> None:
    before, moved_by = weights(model), gradients(model)
    build_optimizer(model, recipe(optimizer="muon", weight_decay=0.5, learning_rate=0.01)).step()
    for key, weight in weights(model).items():
        if not (key.startswith("blocks.") and is_matrix(key)):
            decay = 0.5 if is_matrix(key) else 0.0
            torch.testing.assert_close(weight, adamw_by_hand(before[key], moved_by[key], 0.01, decay))
            continue
        # In each direction of the gradient as far as five Newton-Schulz steps take its share of the whole.
        moved = (before[key] * (1 - 0.01 * 0.5) - weight) / (0.01 * 0.2 * max(weight.shape) ** 0.5)
        left, expected, right = torch.linalg.svd(moved_by[key] / moved_by[key].norm(), full_matrices=False)
        for _ in range(5):
            expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
        torch.testing.assert_close(
            left.T @ moved @ right.T, torch.diag(expected), rtol=0, atol=1e-3
        )  # bfloat16 is off by 1e-2


def test_muon_has_the_matrices_within_blocks_alone(model: Andromeda, recipe: MakeRecipe) -> None:
    optimizer = build_optimizer(model, recipe(optimizer="muon"))
    gradients(model)
    optimizer.step()
    for key, parameter in model.named_parameters():
        by_muon = key.startswith("blocks.") and is_matrix(key)
        assert set(optimizer.state[parameter]) == (
            {"momentum_buffer"} if by_muon else {"step", "exp_avg", "exp_avg_sq"}
        )


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_the_learning_rate_is_that_of_all_groups(model: Andromeda, recipe: MakeRecipe, name: str) -> None:
    optimizer = build_optimizer(model, recipe(optimizer=name))
    before = weights(model)
    for rate in (0.0, 0.25):
        gradients(model)
        set_learning_rate(optimizer, rate)
        assert [float(group["lr"]) for group in optimizer.param_groups] == [rate] * len(optimizer.param_groups)
        optimizer.step()
        for key, weight in weights(model).items():
            assert torch.equal(weight, before[key]) == (rate == 0.0)


def test_the_untied_projection_decays(recipe: MakeRecipe) -> None:
    model = Andromeda(replace(preset("nano"), depth=1, tie_embeddings=False))
    decaying, others = build_optimizer(model, recipe()).param_groups
    assert any(parameter is model.to_logits.weight for parameter in decaying["params"])
    assert any(parameter is model.embedding.weight for parameter in others["params"])


def test_moments_in_8_bits_take_2_1_bytes_a_parameter(recipe: MakeRecipe) -> None:
    model = Andromeda(replace(preset("nano"), depth=1))
    optimizer = build_optimizer(model, recipe(optimizer="adamw8bit"))
    gradients(model)
    optimizer.step()
    held = [t for state in optimizer.state.values() for key in state for t in to_plain(key, state[key]).values()]
    assert sum(tensor.nbytes for tensor in held) / model.config.num_parameters() <= 2.1


def test_torchao_is_missing(model: Andromeda, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("andromeda.training.adamw8bit.find_spec", lambda name: None)
    plan = recipe(optimizer="adamw8bit")
    for refuse in (lambda: check_optimizer(plan), lambda: build_optimizer(model, plan)):
        with pytest.raises(
            AndromedaError, match=r"optimizer='adamw8bit' needs torchao.*pip install .*\[train\]"
        ) as raised:
            refuse()
        assert "\n" not in str(raised.value)
    for name in ("adamw", "muon"):
        check_optimizer(recipe(optimizer=name))
        build_optimizer(model, recipe(optimizer=name))


def test_torchao_is_imported_only_when_used() -> None:
    code = "import sys, andromeda.training.optimizer, andromeda.training.state; sys.exit('torchao' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
