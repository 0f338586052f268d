"""A run directory: one training run, from its first start to its last resume.

recipe.yaml                  what is trained and how, every key
checkpoints/step-00000100/   model directories, with `training/` in each
data/                        token ids of the corpora
metrics.jsonl, heads.jsonl   what was measured, a line for each step that is logged
summary.md, *.png            what became of it, for a reader
tensorboard/                 the same, where the recipe asks for it
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from andromeda.atomic import locked, replace_file
from andromeda.checkpoint import RUN_CHECKPOINTS, run_checkpoints
from andromeda.errors import AndromedaError
from andromeda.training.lora_recipe import LoraRecipe
from andromeda.training.metrics import read_metrics
from andromeda.training.recipe import DataRecipe, DiLoCoRecipe, Recipe

RECIPE = "recipe.yaml"
# What may differ when a run goes on: how long it takes, where things lie, what is looked at meanwhile, and how much is
# read at once: the position in the data is a number of sequences. That a build is still the same, its manifest says.
# How processes share the work, too: a checkpoint has everything whole.
FREE_KEYS = (
    "output", "data.build", "steps", "batch_size", "accumulate", "engine", "offload", "nvme_path", "checkpointing",
    "context_parallel",
    "log_every", "validate_every", "save_every", "keep_last", "keep_best", "failed_save", "patience", "track",
    "diloco.lighthouse", "diloco.host",
)  # fmt: skip
# Sections, with their defaults
SECTIONS = {"data": asdict(DataRecipe()), "lora": asdict(LoraRecipe()), "diloco": asdict(DiLoCoRecipe(""))}
LEFTOVER = re.compile(r"\.step-\d+\.(tmp-.*|removed)")

T = TypeVar("T")


class RunDirectory:
    """Made by `open_run`, which makes sure that it is one's own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / "data"
        self.metrics = path / "metrics.jsonl"
        self.heads = path / "heads.jsonl"
        self.plot = path / "loss.png"
        self.summary = path / "summary.md"
        self._checkpoints = path / RUN_CHECKPOINTS

    def checkpoints(self) -> list[Path]:
        """The newest first."""
        return run_checkpoints(self.path)

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies, or will."""
        return self._checkpoints / f"step-{step:08d}"

    def load_newest(self, load: Callable[[Path], T], warn: Callable[[str], object]) -> T | None:
        """What `load` makes of the newest checkpoint that is whole; None where there is no checkpoint.

        A damaged one is set aside under a name that ends in `.damaged`, and the one before it taken.

        Args:
            load: raises AndromedaError for a damaged checkpoint.
            warn: is told, in one line, of each that is set aside.

        Raises:
            AndromedaError: all are damaged.
        """
        damaged: list[tuple[Path, AndromedaError]] = []
        for path in self.checkpoints():
            try:
                loaded = load(path)
            except AndromedaError as error:
                damaged.append((path, error))
                continue
            for bad, why in damaged:
                warn(f"{why}; set aside as {_set_aside(bad).name}, going on from {path.name}")
            return loaded
        if damaged:
            raise AndromedaError(
                f"{self._checkpoints}: no checkpoint is whole ({damaged[0][1]}); repair one, or choose another output"
            )
        return None

    def best(self) -> Path | None:
        """The checkpoint whose step had the lowest validation; None: none was validated."""
        lines = read_metrics(self.metrics)
        keys = ("validation_loss", "validation_bits_per_byte")  # of pairs that are held out; else of text
        key = next((key for key in keys if any(key in line for line in lines)), None)
        validated = {line["step"]: line[key] for line in lines if key in line}
        kept = [step for step in validated if self.checkpoint(step) in self.checkpoints()]
        return self.checkpoint(min(kept, key=validated.__getitem__)) if kept else None

    def keep(self, last: int, best: bool = False) -> None:
        """Removes all checkpoints but the newest; one that is being removed is no checkpoint any more.

        Args:
            last: how many of the newest stay.
            best: the `best` one stays too.
        """
        spared = self.best() if best else None
        for path in self.checkpoints()[last:]:
            if path == spared:
                continue
            removed = path.with_name(f".{path.name}.removed")
            os.rename(path, removed)
            shutil.rmtree(removed)

    def remove_leftovers(self) -> None:
        """What a killed process was writing or removing. Only for the process that holds the run."""
        for path in self.path.glob(".*.tmp-*"):
            path.unlink()
        if self._checkpoints.is_dir():
            for path in self._checkpoints.iterdir():
                if LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path)


@contextmanager
def open_run(recipe: Recipe) -> Iterator[RunDirectory]:
    """The recipe's run directory, made or taken up again, and closed to other processes.

    A recipe that has left no checkpoint yet may still be changed.

    Raises:
        AndromedaError: it belongs to another recipe or holds something else (it is then left as it is), another process
            trains in it, or it cannot be made.
    """
    path = Path(recipe.output)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise AndromedaError(f"{path}: is a file, and the run needs a directory; choose another output") from error
    except OSError as error:
        raise AndromedaError(f"{path}: cannot be made: {error.strerror}; choose another output") from error
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path, wait=False))
        except BlockingIOError as error:
            raise AndromedaError(
                f"{path}: another process trains in it; wait for it, or choose another output"
            ) from error
        run, stored = RunDirectory(path), path / RECIPE
        if not stored.exists() and any(not entry.name.startswith(f".{RECIPE}") for entry in path.iterdir()):
            raise AndromedaError(f"{path}: holds files of something else; choose another output")
        if run.checkpoints():
            _check_same(stored, recipe)
        try:
            replace_file(stored, recipe.to_yaml())
        except OSError as error:
            raise AndromedaError(f"{stored}: cannot be written: {error.strerror}; free space") from error
        run.remove_leftovers()
        yield run


def _check_same(path: Path, recipe: Recipe) -> None:
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise AndromedaError(f"{path}: cannot be read as a recipe; choose another output") from error
    if not isinstance(stored, dict):
        raise AndromedaError(f"{path}: is not a recipe; choose another output")
    # A key that the stored recipe lacks is younger than it: the run has had its default.
    old = {item.name: item.default for item in fields(Recipe) if item.default is not MISSING}
    old |= _flat({name: keys for name, keys in SECTIONS.items() if stored.get(name)}) | _flat(stored)
    new = _flat(recipe.to_dict())
    for key in {**new, **old}:
        if key not in FREE_KEYS and old.get(key) != new.get(key):
            raise AndromedaError(
                f"{path.parent}: this run has {key}={old.get(key)!r}, and the recipe now says {new.get(key)!r}; "
                "put it back, or choose another output"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}.damaged")).exists():
        number += 1
    os.rename(path, aside)
    return aside
