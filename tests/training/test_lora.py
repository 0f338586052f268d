"""An adapter: what is learned, what merging makes of it, and any number of processes."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.tensorfile import load_tensors, save_tensors
from andromeda.training.engines import build_engine
from andromeda.training.loop import Loop, Outside
from andromeda.training.lora import adapt, check_base, load_adapter, merged, save_adapter
from andromeda.training.lora_recipe import LoraRecipe
from andromeda.training.progress import Silent
from andromeda.training.recipe import DataRecipe, Recipe
from andromeda.training.state import TrainingState
from andromeda.training.steps import ENDLESS, Steps
from tests.ranks import Ranks
from tests.training.conftest import TINY
from tests.training.kept import processes_of
from tests.training.test_loop import METER, sequences

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="adapters need peft")
LORA = LoraRecipe(rank=3, alpha=5, targets=["to_qkv", "down"])


def adapted(weights: Any = None, lora: LoraRecipe = LORA) -> Andromeda:
    """The tiny model with an adapter that changes something."""
    torch.manual_seed(0)
    model = Andromeda(TINY)
    adapt(model, lora, weights)
    if weights is None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    return model


def test_a_new_adapter_changes_nothing_and_alone_is_learned(model: Andromeda) -> None:
    ids = torch.arange(16)[None]
    expected, names = model(ids), {name for name, _ in model.named_parameters()}
    adapt(model, LORA)
    assert torch.equal(model(ids), expected)
    learned = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    config = model.config
    qkv = (config.heads + 2 * config.kv_heads) * config.dim_head
    assert set(merged(model.state_dict(), LORA)) == names
    assert learned == {
        f"blocks.{block}.{module}.lora_{which}.default.weight": torch.Size(shape)
        for block in range(2)
        for module, rows, columns in (("attention.to_qkv", qkv, 32), ("feed_forward.down", 32, 128))
        for which, shape in (("A", (3, columns)), ("B", (rows, 3)))
    }


@torch.no_grad()
def test_merged_weights_compute_what_the_adapter_does() -> None:
    model, plain = adapted(), Andromeda(TINY)
    plain.load_state_dict(merged(model.state_dict(), LORA))
    ids = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain(ids), model(ids), rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    assert not torch.allclose(plain(ids), Andromeda(TINY)(ids), atol=1e-2)


def test_an_adapter_is_kept_bit_for_bit_and_the_same_gives_the_same_files(tmp_path: Path) -> None:
    model = adapted()
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        save_adapter(folder, model.state_dict(), LORA, "runs/base")
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "adapter").iterdir()} for name in ("one", "two")
    ]
    assert files[0] == files[1] and set(files[0]) == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(files[0]["adapter_config.json"])
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 5)
    assert config["base_model_name_or_path"] == "runs/base" and config["target_modules"] == ["down", "to_qkv"]
    again = adapted(load_adapter(tmp_path / "one"))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert load_adapter(tmp_path) is None


def test_an_adapter_of_another_recipe_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, adapted().state_dict(), LORA, "a")
    for lora in (LoraRecipe(rank=4, targets=LORA.targets), LoraRecipe(rank=3)):
        with pytest.raises(AndromedaError, match="is not of an adapter with the recipe's rank and targets"):
            adapted(load_adapter(tmp_path), lora)


def test_a_base_is_known_by_the_weights_that_no_adapter_changes(model: Andromeda) -> None:
    other = Andromeda(TINY)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.blocks[0].attention.to_qkv.weight.add_(1)
    check_base(model, other, "runs/base")
    with torch.no_grad():
        other.blocks[1].norm.weight[0] += 1e-6
    with pytest.raises(AndromedaError, match=r"model\.from='runs/base' is not .* \(see its blocks\.1\.norm\.weight\)"):
        check_base(model, other, "runs/base")


# ---- processes -----------------------------------------------------------------------------------


def run(group: Any, engine: str, folder: str) -> list[dict[str, Any]]:
    """Trains the adapter of the tiny model; its tensors are left in the folder."""
    processes = processes_of(group)
    keys: dict[str, Any] = {"steps": 4, "batch_size": 2, "accumulate": 3, "learning_rate": 0.01, "warmup_steps": 1}
    data = DataRecipe(train="a.txt")
    recipe = Recipe(data=data, model={"from": "a"}, lora=LORA, engine=engine, log_every=1, **keys)  # type: ignore[arg-type]
    built, lines = build_engine(recipe, adapted(), processes), list[dict[str, Any]]()

    def save(_: TrainingState) -> None:
        weights, tensors = built.weights(), built.optimizer_tensors()
        if processes.first:
            save_tensors(Path(folder) / "weights", merged(weights, LORA))
            save_tensors(Path(folder) / "optimizer", dict(tensors))

    outside = Outside(sequences, None, save, lines.append, lambda: False, lambda: False, lambda _: None)
    Loop(recipe, built, TrainingState(), Steps((ENDLESS,), (16,), 2, 3), METER, outside).run(Silent())
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero3"])
def test_two_processes_train_as_one_does(engine: str, ranks: Ranks, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    expected = run(None, engine, str(one))
    for lines in ranks(run, 2, engine, str(two)):
        for line, exact in zip(lines, expected, strict=True):
            for key in ("loss", "gradient_norm"):
                assert line[key] == pytest.approx(exact[key], rel=1e-5), key
    for name in ("weights", "optimizer"):
        ours, theirs = load_tensors(two / name)[0], load_tensors(one / name)[0]
        assert ours.keys() == theirs.keys() and len(ours) > 0
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-4)
    assert expected[-1]["loss"] < expected[0]["loss"]
