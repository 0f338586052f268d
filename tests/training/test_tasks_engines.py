"""Tasks on several processes: the curves of one, and any of them goes on where another stopped."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from andromeda.model import Andromeda
from andromeda.tensorfile import load_tensors
from andromeda.training.engines import build_engine
from andromeda.training.loop import Outside
from andromeda.training.metrics import TIMINGS
from andromeda.training.nebula.keep import load_tasks, restore_tasks, save_tasks, split
from andromeda.training.nebula.loop import MultitaskLoop, Source
from andromeda.training.nebula.objective import attached
from andromeda.training.nebula.recipe import TaskRecipe
from andromeda.training.progress import Silent
from andromeda.training.recipe import DataRecipe, Recipe
from andromeda.training.state import TrainingState
from andromeda.training.steps import ENDLESS, Steps
from tests.quick import quick
from tests.ranks import Ranks
from tests.training.conftest import TINY
from tests.training.kept import keep, kept, processes_of
from tests.training.test_loop import METER, sequences
from tests.training.test_tasks import RECIPES, SIZES, examples, with_tasks

ALL = {**RECIPES, "told": TaskRecipe(teacher="t")}


def run(
    group: Any, engine_name: Any, balance: Any, until: int, folder: str, goes_on: bool, text: bool = True
) -> list[dict[str, Any]]:
    """Trains to a step, from what the folder has if it goes on, and leaves it there."""
    processes = processes_of(group)
    recipes = ALL if text else {name: ALL[name] for name in SIZES}
    recipe = Recipe(
        data=DataRecipe(train="a.txt"), model={"preset": "nano"}, tasks=recipes, balance=balance, engine=engine_name,
        steps=4, batch_size=1, accumulate=3, warmup_steps=1, learning_rate=0.01, log_every=1, clip_norm=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model, place, state = with_tasks(Andromeda(TINY), balance, recipes), Path(folder), TrainingState()
    tasks = attached(model)
    assert tasks is not None
    if goes_on:
        weights, held, state = kept(place)
        model.load_state_dict(weights, strict=False)
        restore_tasks(tasks, load_tasks(place))
    engine = build_engine(recipe, model, processes)
    if goes_on:
        engine.restore(held)
    processes.wait()  # all have read what the first will write

    def save(state: TrainingState) -> None:
        mine, theirs = engine.weights(), engine.optimizer_tensors()
        if processes.first:
            weights, of_tasks = split(mine)
            (place / "training").mkdir(exist_ok=True)
            save_tasks(place, tasks, of_tasks)
            keep(place, weights, theirs, state)

    lines: list[dict[str, Any]] = []
    outside = Outside(sequences, None, save, lines.append, lambda: state.step == until, lambda: False, lambda _: None)
    sources = {name: Source(partial(examples, name), n) for name, n in SIZES.items()}
    taken = (recipe, engine, state, Steps((ENDLESS,), (16,), int(text), 3), METER, outside)
    MultitaskLoop(*taken, sources=sources, longest=16, trunk_flops=1e6).run(Silent())
    return [{key: x for key, x in line.items() if key not in TIMINGS} for line in lines]


CASES = pytest.mark.parametrize(
    ("engine", "balance"),
    [
        ("ddp", "famo"), pytest.param("ddp", "uncertainty", marks=pytest.mark.slow), ("fsdp", "uncertainty"),
        pytest.param("fsdp", "famo", marks=pytest.mark.slow),
    ],
)  # fmt: skip


@CASES
def test_two_train_as_one_does_and_one_goes_on(engine: str, balance: str, ranks: Ranks, tmp_path: Path) -> None:
    """Five, three and two examples for six parts of a step, so that some have none."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    expected = run(None, "ddp", balance, 4, str(one), False)
    found, other = ranks(run, 2, engine, balance, 2, str(two), False)
    assert found == other
    found += run(None, "ddp", balance, 4, str(two), True)
    assert len(found) == len(expected) == 4
    for line, exact in zip(found, expected, strict=True):
        assert line == pytest.approx(exact, rel=2e-5 if balance == "uncertainty" else 2e-4)  # FAMO enlarges rounding


@pytest.mark.parametrize("engine", quick(["ddp", "fsdp"], ["fsdp"]))
def test_without_text_too(engine: str, ranks: Ranks, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    expected = run(None, "ddp", "fixed", 4, str(one), False, False)
    found, _ = ranks(run, 2, engine, "fixed", 2, str(two), False, False)
    found += run(None, "ddp", "fixed", 4, str(two), True, False)
    for line, exact in zip(found, expected, strict=True):
        assert line == pytest.approx(exact, rel=2e-5)


def test_two_go_on_where_two_stopped_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    for until, folder, goes_on in ((4, whole, False), (2, parts, False), (4, parts, True)):
        ranks(run, 2, "fsdp", "uncertainty", until, str(folder), goes_on)
    for name in ("weights", "optimizer", "heads.safetensors", "training/balance.safetensors"):
        ours, theirs = load_tensors(parts / name)[0], load_tensors(whole / name)[0]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
