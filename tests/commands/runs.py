"""What tests of training runs share: how runs are disturbed, and how they are compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from andromeda.errors import AndromedaError
from andromeda.training.loop import Loop
from andromeda.training.metrics import TIMINGS, read_metrics
from tests.commands import kill_training
from tests.forks import forks

ROOT = Path(__file__).parents[2]
VERSE = (ROOT / "examples" / "verse" / "validation.txt").read_text(encoding="utf-8")
RECIPE = """
model: {preset: nano, dim: 32, depth: 2, heads: 4, alibi_num_heads: 2, dim_head: 8, max_seq_len: 16}
tokenizer: {vocab_size: 300}
data: {train: FOLDER/train.jsonl, validation: FOLDER/validation.txt}
output: FOLDER/run
steps: 12
batch_size: 2
accumulate: 2
learning_rate: 0.01
warmup_steps: 3
log_every: 2
validate_every: 5
save_every: 4
"""


def write_recipe(folder: Path) -> Path:
    """A recipe, and the text it trains on, small enough for a test; its run is FOLDER/run."""
    poems = VERSE.split("\n\n\n")[:12]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": poem}) + "\n" for poem in poems))
    (folder / "validation.txt").write_text(VERSE[-400:])
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("FOLDER", str(folder)))
    return path


def copied(run: Path, recipe: Path) -> Path:
    """A run of this recipe's that was made where other copies of its files are, as if it had been made here."""
    here = shutil.copytree(run, recipe.parent / "run")
    stored = here / "recipe.yaml"
    stored.write_text(stored.read_text().replace(str(run.parent), str(recipe.parent)))
    return here


def untimed(directory: Path) -> list[dict[str, Any]]:
    lines = read_metrics(directory / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def heads(directory: Path) -> list[dict[str, Any]]:
    return read_metrics(directory / "heads.jsonl")


def contents(directory: Path) -> dict[str, bytes]:
    """Of the checkpoints, without times."""
    files = {}
    for path in sorted((directory / "checkpoints").rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "state.json":
                values = json.loads(data)
                timed = "sha256", "seconds", "loss_seconds"
                data = json.dumps({key: values[key] for key in values if key not in timed}).encode()
            files[str(path.relative_to(directory))] = data
    return files


def assert_same_run(directory: Path, other: Path) -> None:
    """Weights, optimizer, random numbers, position, tokenizer, metrics and heads: bit for bit."""
    ours, theirs = contents(directory), contents(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name
    assert untimed(directory) == untimed(other)
    assert heads(directory) == heads(other)
    hidden = [path.name for path in (directory / "checkpoints").iterdir() if path.name.startswith(".")]
    assert hidden == []


def flip(path: Path) -> None:
    """One bit, in the middle of the file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Does something in the middle of a step."""
    original = Loop.step

    def stepping(loop: Loop) -> None:
        if loop.state.step == step - 1:
            action()
        original(loop)

    monkeypatch.setattr(Loop, "step", stepping)


def kill_and_compare(recipe: Path, kills: int, seed: int) -> None:
    folder = recipe.parent
    killing = forks().Process(target=kill_training.main, args=(str(recipe), folder, kills, seed))
    killing.start()
    killing.join(900)
    killing.kill()
    assert killing.exitcode == 0, "".join(log.read_text() for log in folder.glob("*.log"))
    assert "going on from step" in (folder / "killed.log").read_text()
    for directory in folder.glob("killed*"):
        if directory.is_dir():
            assert_same_run(directory, folder / "whole")


@contextmanager
def refused(folder: Path, message: str) -> Iterator[None]:
    """What is done within is refused in one line, and leaves nothing behind."""
    before = snapshot(folder)
    with pytest.raises(AndromedaError, match=message) as raised:
        yield
    assert "\n" not in str(raised.value)
    assert snapshot(folder) == before
