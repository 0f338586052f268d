"""What of a training run lies beside the weights: it comes back exactly, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.tensorfile import load_tensors, save_tensors
from andromeda.training.adamw8bit import PARTS, to_plain
from andromeda.training.optimizer import build_optimizer
from andromeda.training.recipe import OptimizerName, Recipe
from andromeda.training.state import TrainingState, load_counts, load_state, optimizer_tensors, restore, save_state

STATE = TrainingState(
    step=3, sequence=96, tokens=1500, seconds=0.25, loss_sum=1 / 3, loss_tokens=7, loss_seconds=0.1, data_key="abc"
)


def stepped(model: Andromeda, optimizer: torch.optim.Optimizer, times: int) -> list[torch.Tensor]:
    for _ in range(times):
        model.token_losses(torch.randint(64, (2, 8)), torch.randint(64, (2, 8))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def held(model: Andromeda, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All tensors of the optimizer's state."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found |= to_plain(f"{name}/{key}", value)
    return found


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_optimizer_and_random_numbers_go_on_exactly(
    model: Andromeda, recipe: Callable[..., Recipe], tmp_path: Path, name: str
) -> None:
    optimizer = build_optimizer(model, recipe(optimizer=name))
    stepped(model, optimizer, 2)
    save_state(tmp_path, STATE, optimizer_tensors(model, optimizer))
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    saved = {key: tensor.clone() for key, tensor in held(model, optimizer).items()}
    expected = stepped(model, optimizer, 2)

    torch.manual_seed(5)
    other = Andromeda(model.config)
    other.load_state_dict(weights)
    fresh = build_optimizer(other, recipe(optimizer=name))
    state, tensors = load_state(tmp_path)
    restore(tensors, other, fresh)
    assert state == STATE
    restored = held(other, fresh)
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[key], saved[key]) and restored[key].dtype == saved[key].dtype for key in saved)
    for ours, theirs in zip(stepped(other, fresh, 2), expected, strict=True):
        assert torch.equal(ours, theirs)
    changed = held(other, fresh)
    after = held(model, optimizer)
    assert all(torch.equal(changed[key], after[key]) for key in after)
    assert not all(torch.equal(changed[key], saved[key]) for key in saved)


def test_moments_in_8_bits_are_stored_as_they_are_held(
    model: Andromeda, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    optimizer = build_optimizer(model, recipe(optimizer="adamw8bit"))
    stepped(model, optimizer, 1)
    save_state(tmp_path, STATE, optimizer_tensors(model, optimizer))
    _, tensors = load_state(tmp_path)
    moment = "blocks.0.feed_forward.up.weight/exp_avg"
    assert {key for key in tensors if key.startswith(moment + ".")} == {f"{moment}.{part}" for part in PARTS}
    assert tensors[f"{moment}.codes"].dtype == torch.uint8 and tensors[f"{moment}.codes"].shape == (128, 32)
    assert tensors[f"{moment}.scale"].shape == (128 * 32 // 256,)
    assert tensors["blocks.0.norm.weight/exp_avg"].dtype == torch.float32  # small
    del tensors[f"{moment}.scale"]
    with pytest.raises(AndromedaError, match=r"'exp_avg' in 8 bits has \['codes', 'qmap'\], and needs"):
        restore(tensors, model, build_optimizer(model, recipe(optimizer="adamw8bit")))


@pytest.fixture
def saved(model: Andromeda, recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    optimizer = build_optimizer(model, recipe())
    stepped(model, optimizer, 1)
    save_state(tmp_path, STATE, optimizer_tensors(model, optimizer))
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


def test_no_bit_of_the_counts_falls_over_unseen(saved: Path) -> None:
    path = saved / "training" / "state.json"
    whole = path.read_bytes()
    for place in range(0, 8 * len(whole), 11):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(AndromedaError, match=r"state\.json: ") as raised:
            load_counts(saved)
        assert "\n" not in str(raised.value)
    path.write_bytes(whole)
    assert load_counts(saved) == STATE


def test_counts_without_a_checksum_are_older(saved: Path) -> None:
    path = saved / "training" / "state.json"
    values = json.loads(path.read_text())
    assert len(values.pop("sha256")) == 64
    path.write_text(json.dumps(values, indent=2) + "\n")
    assert load_counts(saved) == STATE


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
