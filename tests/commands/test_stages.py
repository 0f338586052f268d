"""Stages of a model's life: one goes on from the other, and each goes on exactly after an interruption."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from andromeda.checkpoint import load_checkpoint
from andromeda.commands.train import train
from andromeda.errors import AndromedaError
from andromeda.tokenizer import Tokenizer
from andromeda.training.metrics import read_metrics
from tests.commands.runs import VERSE, assert_same_run, at_step, refused, write_recipe

pytestmark = pytest.mark.usefixtures("quick")
DPO = """
model: {from: FOLDER/base}
data: {pairs: FOLDER/pairs.jsonl, validation: FOLDER/validation.txt}
output: FOLDER/dpo
steps: 6
batch_size: 1
accumulate: 2
learning_rate: 0.003
warmup_steps: 1
log_every: 1
validate_every: 3
save_every: 2
"""
LINES = [line for line in VERSE.splitlines() if 8 < len(line) < 40][:24]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model, `base`, of 64 tokens, and pairs that prefer verse to the same backwards."""
    folder = tmp_path_factory.mktemp("base")
    recipe = write_recipe(folder)
    train(str(recipe), [f"output={folder / 'base'}", "model.max_seq_len=64", "validate_every=12", "save_every=12"])
    pairs = [{"prompt": line[:4], "chosen": line[4:], "rejected": line[:3:-1]} for line in LINES]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "stage.yaml"
    path.write_text(text.replace("FOLDER", str(folder)))
    return path


def interrupted(recipe: Path, monkeypatch: pytest.MonkeyPatch, step: int, *overrides: str) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            train(str(recipe), list(overrides))


# ---- preferences ---------------------------------------------------------------------------------


def test_preferences_are_learned_and_go_on_exactly_without_their_origin(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(folder, DPO)
    train(str(recipe), [f"output={folder / 'whole'}"])
    lines = [line for line in read_metrics(folder / "whole" / "metrics.jsonl") if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and lines[0]["reward_margin"] == 0.0
    assert lines[-1]["loss"] < 0.65 and lines[-1]["reward_margin"] > 0.05 and lines[-1]["reward_accuracy"] > 0.8
    assert lines[-1]["validation_bits_per_byte"] > 0 and "train_bits_per_byte" not in lines[-1]
    interrupted(recipe, monkeypatch, 3)
    shutil.rmtree(folder / "base")
    train(str(recipe), [])
    assert_same_run(folder / "dpo", folder / "whole")


def test_other_pairs_are_refused_once_the_reference_is_measured(folder: Path) -> None:
    recipe = write(folder, DPO)
    train(str(recipe), ["steps=2"])
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(pairs.read_text(encoding="utf-8").splitlines(keepends=True)[1:]))
    with pytest.raises(AndromedaError, match=r"data\.pairs=.* is not what this run began with"):
        train(str(recipe), ["steps=3"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model={preset: nano}"], r"data\.pairs=.* needs model\.from"),
        (["model={from: none}"], r"none: no such directory"),
        (["data.pairs=none.jsonl"], r"none\.jsonl: no such file"),
        (["data.pairs=FOLDER/train.jsonl"], r"train\.jsonl:1: has no `chosen` \(there are: text\), so it is no pair"),
        (["data.train=FOLDER/train.jsonl"], r"data\.train=.* cannot be read beside data\.pairs"),
        (["data.build=build"], r"data\.pairs"),
        (["data.packed_documents=false"], r"data\.packed_documents=False is for data\.train"),
        (["dpo_beta=0"], r"dpo_beta=0\.0 must be positive"),
        (["seq_len=65"], r"seq_len=65 is more than the model's max_seq_len=64"),
        (["data.pairs=[]", "data.train=FOLDER/train.jsonl", "dpo_beta=0.1"], r"dpo_beta=0\.1 is for data\.pairs"),
        (["model={from: FOLDER/base, dim: 8}"], r"model\.dim=8 cannot change the model of model\.from"),
        (["tokenizer.vocab_size=300"], r"tokenizer\.vocab_size=300 is for a new tokenizer"),
        (["tokenizer.path=FOLDER/other"], r"tokenizer\.path=.* is another tokenizer than that of model\.from"),
    ],
)
def test_mistakes_leave_nothing_behind(folder: Path, overrides: list[str], message: str) -> None:
    recipe = write(folder, DPO)
    Tokenizer.train([VERSE], 290).save(folder / "other")
    with refused(folder, message):
        train(str(recipe), [override.replace("FOLDER", str(folder)) for override in overrides])


# ---- a longer context ----------------------------------------------------------------------------


def test_a_model_goes_on_at_another_length(folder: Path) -> None:
    recipe = write(folder, DPO)
    longer = "{from: FOLDER/base, max_seq_len: 128, position_interpolation: 2.0, rotary_base: 20000.0}"
    model = f"model={longer.replace('FOLDER', str(folder))}"
    keys = [model, "data.pairs=[]", f"data.train={folder / 'train.jsonl'}", "steps=1"]
    train(str(recipe), keys)
    before, after = (load_checkpoint(next((folder / run / "checkpoints").iterdir())) for run in ("base", "dpo"))
    assert (after.config.max_seq_len, after.config.rotary_base) == (128, 20000.0)
    assert after.config.xpos_scale == before.config.xpos_scale
    assert not torch.equal(after.to_logits.weight, before.to_logits.weight)
    assert read_metrics(folder / "dpo" / "metrics.jsonl")[0]["tokens"] == 2 * 128
