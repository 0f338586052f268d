"""What of a training run lies beside the weights: it comes back exactly, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.tensorfile import load_tensors, save_tensors
from andromeda.training.optimizer import build_optimizer
from andromeda.training.recipe import Recipe
from andromeda.training.state import TrainingState, load_state, restore, save_state

STATE = TrainingState(
    step=3, sequence=96, tokens=1500, seconds=0.25, loss_sum=1 / 3, loss_tokens=7, loss_seconds=0.1, data_key="abc"
)


def stepped(model: Andromeda, optimizer: torch.optim.Optimizer, times: int) -> list[torch.Tensor]:
    for _ in range(times):
        model.token_losses(torch.randint(64, (2, 8)), torch.randint(64, (2, 8))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_optimizer_and_random_numbers_go_on_exactly(
    model: Andromeda, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    optimizer = build_optimizer(model, recipe())
    stepped(model, optimizer, 2)
    save_state(tmp_path, STATE, model, optimizer)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = stepped(model, optimizer, 2)

    torch.manual_seed(5)
    other = Andromeda(model.config)
    other.load_state_dict(weights)
    fresh = build_optimizer(other, recipe())
    state, tensors = load_state(tmp_path)
    restore(tensors, other, fresh)
    assert state == STATE
    for ours, theirs in zip(stepped(other, fresh, 2), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def saved(model: Andromeda, recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    optimizer = build_optimizer(model, recipe())
    stepped(model, optimizer, 1)
    save_state(tmp_path, STATE, model, optimizer)
    return tmp_path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not the state of a training run"),
        ("[]", "is not the state of a training run"),
        ('{"epoch": 3}', "is not the state of a training run .*epoch"),
        ('{"step": "3"}', "step='3' is not of type int"),
        ('{"seconds": 3}', "seconds=3 is not of type float"),
    ],
)
def test_damaged_counts(saved: Path, content: str, message: str) -> None:
    (saved / "training" / "state.json").write_text(content)
    with pytest.raises(AndromedaError, match=rf"state\.json: {message}"):
        load_state(saved)


def test_a_checkpoint_without_training(tmp_path: Path) -> None:
    with pytest.raises(AndromedaError, match=r"state\.json: no such file; training cannot go on"):
        load_state(tmp_path)


def test_a_bit_that_fell_over(saved: Path) -> None:
    path = saved / "training" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(AndromedaError, match=r"optimizer\.safetensors: corrupt"):
        load_state(saved)
    path.unlink()
    with pytest.raises(AndromedaError, match=r"optimizer\.safetensors: no such file"):
        load_state(saved)


def test_the_state_of_another_model(saved: Path, model: Andromeda, recipe: Callable[..., Recipe]) -> None:
    _, tensors = load_state(saved)
    deeper = Andromeda(replace(model.config, depth=3))
    with pytest.raises(AndromedaError, match=r"lacks the parameter 'blocks\.2"):
        restore(tensors, deeper, build_optimizer(deeper, recipe()))
    shallower = Andromeda(replace(model.config, depth=1))
    with pytest.raises(AndromedaError, match=r"has, beyond the model's, the parameter 'blocks\.1"):
        restore(tensors, shallower, build_optimizer(shallower, recipe()))


def test_nothing_is_pickled(saved: Path) -> None:
    files = {path.name for path in (saved / "training").iterdir()}
    assert files == {"state.json", "optimizer.safetensors"}
    tensors, _ = load_tensors(saved / "training" / "optimizer.safetensors")
    assert tensors["random/cpu"].dtype == torch.uint8
    assert tensors["embedding.weight/exp_avg"].shape == (64, 32)
    save_tensors(saved / "again", tensors)
    assert json.loads((saved / "training" / "state.json").read_text())["loss_sum"] == 1 / 3
