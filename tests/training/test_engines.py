"""Several processes compute what one does, whatever they share, and any of them goes on where another stopped."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from andromeda.config import AndromedaConfig
from andromeda.model import Andromeda
from andromeda.tensorfile import load_tensors
from andromeda.training.engines import build_engine
from andromeda.training.loop import Loop, Outside
from andromeda.training.metrics import training_flops_per_token
from andromeda.training.objective import total_nats
from andromeda.training.progress import Silent
from andromeda.training.recipe import DataRecipe, Recipe
from andromeda.training.state import TrainingState
from andromeda.training.steps import ENDLESS, Steps
from tests.quick import quick
from tests.ranks import Ranks
from tests.training.conftest import TINY
from tests.training.kept import keep, kept, processes_of
from tests.training.test_loop import METER, sequences

MUON = 2e-3  # tolerance: PyTorch's orthogonalises in bfloat16, so that a rounding may move a weight by so much
KEYS: dict[str, Any] = {
    "steps": 6, "batch_size": 2, "accumulate": 3, "warmup_steps": 2, "learning_rate": 0.01, "log_every": 1,
    "clip_norm": 0.5, "validate_every": 1,
}  # fmt: skip
ODD = dataclasses.replace(TINY, dim=33)  # of some parameters the shares differ


def named(engine: str) -> dict[str, Any]:
    """The recipe's keys of an engine and of where it keeps things."""
    name, _, offload = engine.partition(" ")
    return {"engine": name, **({"offload": offload} if offload else {})}


def run(
    group: Any,
    keys: dict[str, Any],
    until: int,
    folder: str,
    goes_on: bool = False,
    poisoned: Sequence[int] = (),
    config: AndromedaConfig = ODD,
) -> tuple[list[dict[str, Any]], float]:
    """Trains a tiny model to a step, from the folder's tensors if it goes on, and leaves them there.

    In the poisoned steps the last process' loss is no number. Returns the lines of metrics, and the operations of a
    token as this process reckons them.
    """  # fmt: skip
    processes = processes_of(group).in_teams(keys.get("context_parallel", 1))
    recipe = Recipe(data=DataRecipe(train="a.txt"), model={"preset": "nano"}, **{**KEYS, **keys})
    torch.manual_seed(0)
    model = Andromeda(config)
    state = TrainingState()
    if goes_on:
        weights, held, state = kept(Path(folder))
        model.load_state_dict(weights)
    engine = build_engine(recipe, model, processes)
    if goes_on:
        engine.restore(held)
    processes.wait()  # all have read what the first will write

    def save(state: TrainingState) -> None:
        mine, theirs = engine.weights(), engine.optimizer_tensors()
        if processes.first:
            keep(Path(folder), mine, theirs, state)

    def poison(module: Any, inputs: Any, output: Tensor) -> Tensor:
        poisons = state.step in poisoned and processes.rank == processes.ranks - 1 and torch.is_grad_enabled()
        return output * torch.nan if poisons else output

    def go_back() -> bool:
        weights, held, _ = kept(Path(folder))
        engine.take(weights)
        engine.restore(held)
        return True

    def validate() -> dict[str, float]:
        count = 2 // processes.teams
        nats = total_nats(engine.objective, [sequences(1000 + processes.team_number * count, count)])
        return {"validation_bits_per_byte": processes.sum(nats).item()}

    engine.model.blocks[1].register_forward_hook(poison)
    lines: list[dict[str, Any]] = []
    outside = Outside(sequences, validate, save, lines.append, lambda: state.step == until, go_back, lambda _: None)
    Loop(recipe, engine, state, Steps((ENDLESS,), (16,), recipe.batch_size, recipe.accumulate), METER, outside).run(
        Silent()
    )
    with engine.whole():
        return lines, training_flops_per_token(engine.model, 16)


def tensors(folder: Path) -> Mapping[str, Tensor]:
    return load_tensors(folder / "weights")[0] | load_tensors(folder / "optimizer")[0]


def assert_close(folder: Path, other: Path, tolerance: float) -> None:
    ours, theirs = tensors(folder), tensors(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)


def folders(tmp_path: Path, *names: str) -> list[Path]:
    made = [tmp_path / name for name in names]
    for folder in made:
        folder.mkdir()
    return made


class Runs:
    """Those that several tests ask of are made once. Their folders are read and not written to."""

    def __init__(self, ranks: Ranks, folder: Path) -> None:
        self.ranks, self.folder = ranks, folder
        self._made: dict[str, tuple[list[Any], Path]] = {}

    def one(self, keys: dict[str, Any], until: int = 6, poisoned: Sequence[int] = ()) -> tuple[Any, Path]:
        """What `run` returns in one process, and where it leaves what it has trained."""
        found, folder = self._run(1, keys, until, poisoned)
        return found[0], folder

    def two(self, engine: str, keys: dict[str, Any], until: int = 6) -> tuple[list[Any], Path]:
        return self._run(2, {**keys, **named(engine)}, until, ())

    def _run(self, size: int, keys: dict[str, Any], until: int, poisoned: Sequence[int]) -> tuple[list[Any], Path]:
        name = repr((size, keys, until, poisoned))
        if name not in self._made:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            given = keys, until, str(folder), False, poisoned
            self._made[name] = [run(None, *given)] if size == 1 else self.ranks(run, size, *given), folder
        return self._made[name]


@pytest.fixture(scope="module")
def runs(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("runs"))


SHARES: dict[str, dict[str, Any]] = {
    "even": {}, "one sequence for two": {"batch_size": 1, "accumulate": 1},
    "uneven": {"batch_size": 5, "accumulate": 1}, "muon": {"optimizer": "muon"},
    "checkpointed": {"checkpointing": "full"},
}  # fmt: skip
SHARED = {
    "ddp": ["even", "one sequence for two", "uneven", "muon"],
    "fsdp": ["even", "one sequence for two", "uneven", "muon"],
    "zero3": ["even", "one sequence for two", "uneven"],
    "zero3 cpu": ["checkpointed"],
}
OTHERWISE_SHOWN = [("fsdp", "one sequence for two"), ("zero3", "uneven")]


@pytest.mark.parametrize(
    ("engine", "share"),
    [
        pytest.param(engine, name, marks=[pytest.mark.slow] if (engine, name) in OTHERWISE_SHOWN else [])
        for engine, names in SHARED.items()
        for name in names
    ],
)
def test_the_loss_curve_is_that_of_one_process(engine: str, share: str, runs: Runs) -> None:
    keys = SHARES[share]
    (expected, operations), one = runs.one(keys)
    found, two = runs.two(engine, keys)
    for lines, reckoned in found:
        assert reckoned == pytest.approx(operations)
        assert len(lines) == 6
        for line, exact in zip(lines, expected, strict=True):
            for key in ("step", "tokens", "loss", "gradient_norm", "learning_rate", "validation_bits_per_byte"):
                assert line[key] == pytest.approx(exact[key], rel=1e-5), key
    assert_close(two, one, MUON if keys.get("optimizer") == "muon" else 1e-4)


def test_bfloat16_is_the_same_with_zero3(runs: Runs) -> None:
    """As with DDP: one process has other sums."""
    expected, found = (runs.two(engine, {"precision": "bfloat16"}, 4)[0][0][0] for engine in ("ddp", "zero3"))
    assert len(found) == 4
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)


@pytest.mark.parametrize(
    ("engine", "optimizer"),
    [
        ("ddp", "adamw"), pytest.param("ddp", "muon", marks=pytest.mark.slow),
        pytest.param("fsdp", "adamw", marks=pytest.mark.slow), ("fsdp", "muon"), ("zero3", "adamw"),
    ],
)  # fmt: skip
def test_what_two_saved_one_goes_on_with_and_the_other_way_round(
    engine: str, optimizer: str, ranks: Ranks, runs: Runs, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"optimizer": optimizer}
    _, whole = runs.one(keys)
    first, second = (
        shutil.copytree(made, tmp_path / name)
        for name, (_, made) in (("first", runs.two(engine, keys, 3)), ("second", runs.one(keys, 3)))
    )
    run(None, keys, 6, str(first), True)
    ranks(run, 2, {**keys, **named(engine)}, 6, str(second), True)
    for folder in (first, second):
        assert_close(folder, whole, MUON if optimizer == "muon" else 1e-4)


@pytest.mark.parametrize(
    ("engine", "share"), [("ddp", "even"), ("fsdp", "even"), ("zero3", "even"), ("zero3 cpu", "checkpointed")]
)
def test_stopped_and_resumed_it_is_the_same_bit_for_bit(
    engine: str, share: str, ranks: Ranks, runs: Runs, tmp_path: Path
) -> None:
    keys = SHARES[share]
    _, whole = runs.two(engine, keys)
    ranks(run, 2, {**keys, **named(engine)}, 2, str(tmp_path))
    ranks(run, 2, {**keys, **named(engine)}, 6, str(tmp_path), True)
    ours, theirs = tensors(tmp_path), tensors(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("engine", quick(SHARED, ["ddp", "fsdp", "zero3"]))
def test_steps_are_left_out_and_taken_back_as_by_one_process(
    engine: str, ranks: Ranks, runs: Runs, tmp_path: Path
) -> None:
    keys = {"steps": 9, "save_every": 2}
    poisoned = [0, 3, 4, 5, 6, 7]  # the first; and five in a row, after one that weights followed since they were saved
    (expected, _), one = runs.one(keys, 9, poisoned)
    found, _ = ranks(run, 2, {**keys, **named(engine)}, 9, str(tmp_path), False, poisoned)[0]
    assert [line["step"] for line in expected if "left_out" in line] == [1, 4, 5, 6, 7, 8]
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert_close(tmp_path, one, 1e-4)


def held(group: Any, engine: str) -> tuple[int, int]:
    """Numbers of weights that a process holds, and that all learn."""
    processes = processes_of(group)
    recipe = Recipe(data=DataRecipe(train="a.txt"), model={"preset": "nano"}, engine=engine)  # type: ignore[arg-type]
    built = build_engine(recipe, Andromeda(TINY), processes)
    kept = "ds_tensor" if engine == "zero3" else "_local_tensor"
    own = [getattr(parameter, kept, parameter) for parameter in built.model.parameters()]
    return sum(part.numel() for part in own), built.num_learned


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_weights_are_shared_out(engine: str, ranks: Ranks) -> None:
    total = TINY.num_parameters()
    assert ranks(held, 2, "ddp") == [(total, total)] * 2
    parts = ranks(held, 2, engine)
    assert sum(part for part, _ in parts) == total and max(part for part, _ in parts) < 0.55 * total
    assert [learned for _, learned in parts] == [total, total]


def asked_to_stop(group: Any) -> int:
    """The second process alone is asked to, after its second step."""
    processes = processes_of(group)
    recipe = Recipe(data=DataRecipe(train="a.txt"), model={"preset": "nano"}, **KEYS)
    state = TrainingState()
    nothing: Any = lambda *_: None  # noqa: E731
    stops = lambda: group.rank() == 1 and state.step == 2  # noqa: E731
    outside = Outside(sequences, None, nothing, nothing, stops, nothing, nothing)
    engine = build_engine(recipe, copy.deepcopy(Andromeda(TINY)), processes)
    Loop(recipe, engine, state, Steps((ENDLESS,), (16,), 2, 3), METER, outside).run(Silent())
    return state.step


def test_one_asked_to_stop_stops_all(ranks: Ranks) -> None:
    assert ranks(asked_to_stop, 2) == [2, 2]
