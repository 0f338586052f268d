"""The loop: equal steps however they are split, and whenever the process ended in between."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from andromeda.errors import AndromedaError
from andromeda.model import IGNORED, Andromeda
from andromeda.training.engines import Engine
from andromeda.training.loop import Loop, Outside
from andromeda.training.metrics import TIMINGS, Meter
from andromeda.training.objective import Batch
from andromeda.training.optimizer import build_optimizer, learning_rate
from andromeda.training.processes import Processes
from andromeda.training.recipe import Recipe
from andromeda.training.scaling import LossScale
from andromeda.training.state import TrainingState
from andromeda.training.steps import ENDLESS, Steps
from tests.quick import quick

MakeRecipe = Callable[..., Recipe]
METER = Meter(bytes_per_token=2.0, flops_per_token=lambda seq_len: 1e6 * seq_len / 16, possible_flops_per_second=1e9)

VALIDATED = {"validation_bits_per_byte": 1.5}


def sequences(first: int, count: int) -> Batch:
    """Sequence n from n alone; some have few targets."""
    rows = []
    for number in range(first, first + count):
        row = torch.randint(64, (17,), generator=torch.Generator().manual_seed(number))
        rows.append(row)
    ids = torch.stack(rows)
    targets = ids[:, 1:].clone()
    targets[torch.arange(first, first + count) % 3 == 0, 4:] = IGNORED
    return ids[:, :-1], targets, (torch.arange(16) >= 5).long().expand(count, 16)


class Silent:
    def advance(self, step: int) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        pass


class Run:
    """A loop with everything outside of it, that keeps what it is told."""

    def __init__(self, model: Andromeda, recipe: Recipe, start: Run | None = None, **outside: Any) -> None:
        self.model = copy.deepcopy(model if start is None else start.saved[-1][0])
        self.engine = Engine(recipe, self.model, Processes(0, 1, torch.device("cpu")))
        self.optimizer = self.engine.optimizer
        state = TrainingState()
        if start is not None:
            self.optimizer.load_state_dict(copy.deepcopy(start.saved[-1][1]))
            state = copy.copy(start.saved[-1][2])
        self.lines: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.saved: list[tuple[Andromeda, dict[str, Any], TrainingState]] = []
        calls: dict[str, Any] = {
            "batches": sequences, "validate": None, "save": self.save, "log": self.lines.append, "stop": lambda: False,
            "go_back": lambda: False, "warn": self.warnings.append,
        }  # fmt: skip
        steps = Steps((ENDLESS,), (16,), recipe.batch_size, recipe.accumulate)
        self.loop = Loop(recipe, self.engine, state, steps, METER, Outside(**{**calls, **outside}))

    def save(self, state: TrainingState) -> None:
        self.saved.append((copy.deepcopy(self.model), copy.deepcopy(self.optimizer.state_dict()), copy.copy(state)))

    def go(self) -> Run:
        self.loop.run(Silent())
        return self

    def weights(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.model.parameters()]

    def untimed(self) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key not in TIMINGS} for line in self.lines]


def test_accumulation_equals_the_big_batch(model: Andromeda, recipe: MakeRecipe) -> None:
    model = model.double()  # so that rounding explains nothing
    keys: dict[str, Any] = {"steps": 4, "warmup_steps": 0, "log_every": 1, "learning_rate": 0.01}
    whole = Run(model, recipe(batch_size=12, accumulate=1, **keys)).go()
    for batch_size, accumulate in ((6, 2), (4, 3), (1, 12)):
        parts = Run(model, recipe(batch_size=batch_size, accumulate=accumulate, **keys)).go()
        for ours, theirs in zip(parts.weights(), whole.weights(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # losses are float32
        for part, line in zip(parts.untimed(), whole.untimed(), strict=True):
            assert part == pytest.approx(line, rel=1e-5)


def test_a_step_by_hand(model: Andromeda, recipe: MakeRecipe) -> None:
    plan = recipe(steps=1, batch_size=3, accumulate=2, warmup_steps=2, learning_rate=0.01, log_every=1, clip_norm=0.5)
    ids, targets, documents = sequences(0, 6)
    expected = copy.deepcopy(model)
    losses = expected.token_losses(ids, targets, documents=documents)
    loss = losses.sum() / (targets != IGNORED).sum()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in expected.parameters() if p.grad is not None]).norm()
    assert norm > 0.5
    optimizer = build_optimizer(expected, plan)
    for parameter in expected.parameters():
        assert parameter.grad is not None
        parameter.grad *= 0.5 / norm
    for group in optimizer.param_groups:
        group["lr"] = 0.005
    optimizer.step()

    run = Run(model, plan).go()
    for ours, theirs in zip(run.weights(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)
    (line,) = run.lines
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert line["train_bits_per_byte"] == pytest.approx(loss.item() / math.log(2) / 2.0)
    assert line["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert line["learning_rate"] == 0.005 == learning_rate(plan, 0)
    assert line["tokens"] == int((targets != IGNORED).sum()) == run.loop.state.tokens
    assert line["flops_per_second"] == pytest.approx(line["tokens_per_second"] * 1e6)
    assert line["seconds"] == pytest.approx(6 * 16 / line["tokens_per_second"])  # those that are not learned too


def test_a_step_without_targets_moves_nothing_but_goes_on(model: Andromeda, recipe: MakeRecipe) -> None:
    def questions(first: int, count: int) -> Batch:
        ids, targets, documents = sequences(first, count)
        return ids, torch.full_like(targets, IGNORED), documents

    run = Run(model, recipe(steps=2, batch_size=2, weight_decay=0.0, log_every=1), batches=questions).go()
    assert all(torch.equal(a, b) for a, b in zip(run.weights(), model.parameters(), strict=True))
    assert [(line["tokens"], line["loss"]) for line in run.lines] == [(0, 0.0), (0, 0.0)]
    assert run.loop.state.sequence == 4


def test_no_clipping(model: Andromeda, recipe: MakeRecipe) -> None:
    keys: dict[str, Any] = {"steps": 2, "batch_size": 4, "warmup_steps": 0}
    free, wide = (Run(model, recipe(clip_norm=norm, **keys)).go() for norm in (None, 1e6))
    tight = Run(model, recipe(clip_norm=1e-3, **keys)).go()
    assert all(torch.equal(a, b) for a, b in zip(free.weights(), wide.weights(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(free.weights(), tight.weights(), strict=True))


@pytest.mark.parametrize("stop_after", quick(range(1, 7), [1, 4, 5]))
def test_stopped_anywhere_and_resumed_it_is_the_same(model: Andromeda, recipe: MakeRecipe, stop_after: int) -> None:
    plan = recipe(steps=7, batch_size=4, log_every=3, validate_every=2, save_every=5, warmup_steps=2)
    whole = Run(model, plan, validate=lambda: VALIDATED).go()
    stopped = Run(model, plan, validate=lambda: VALIDATED)
    stopped.loop.outside = Outside(
        **{**vars(stopped.loop.outside), "stop": lambda: stopped.loop.state.step == stop_after}
    )
    stopped.go()
    assert stopped.saved[-1][2].step == stop_after
    resumed = Run(model, plan, start=stopped, validate=lambda: VALIDATED).go()
    for ours, theirs in zip(resumed.weights(), whole.weights(), strict=True):
        assert torch.equal(ours, theirs)
    assert stopped.untimed() + resumed.untimed() == whole.untimed()
    assert [line["step"] for line in whole.lines] == [2, 3, 4, 6, 7]


def test_what_happens_when(model: Andromeda, recipe: MakeRecipe) -> None:
    events: list[tuple[str, int]] = []
    plan = recipe(steps=5, batch_size=2, log_every=2, validate_every=4, save_every=3)
    run = Run(model, plan)

    def note(name: str) -> Callable[..., dict[str, float]]:
        def call(*_: object) -> dict[str, float]:
            events.append((name, run.loop.state.step))
            return VALIDATED

        return call

    run.loop.outside = Outside(
        sequences, note("validate"), note("save"), note("log"), lambda: False, lambda: False, lambda _: None,
        note("watch"),
    )  # fmt: skip
    run.go()
    assert events == [
        ("log", 2), ("save", 3), ("validate", 4), ("log", 4), ("watch", 4), ("validate", 5), ("log", 5), ("watch", 5),
        ("save", 5),
    ]  # fmt: skip


def test_stopped_before_the_first_step_nothing_happens(model: Andromeda, recipe: MakeRecipe) -> None:
    run = Run(model, recipe(), stop=lambda: True).go()
    assert run.saved == [] and run.lines == [] and run.loop.state == TrainingState()


def test_divergence_stops_without_saving(model: Andromeda, recipe: MakeRecipe) -> None:
    with torch.no_grad():
        model.output_weight[0, 0] = torch.inf
    for keys in ({"log_every": 1}, {"save_every": 1}, {}, {"steps": 3}):
        run = Run(model, recipe(batch_size=8, **keys))
        with pytest.raises(AndromedaError, match=r"at step [35] the loss or its gradient is no number any more.*lower"):
            run.go()
        assert run.saved == []


class Disturbed(Run):
    """Finds the gradients of some steps, counted from 1, to be of a norm that they are not."""

    def __init__(self, model: Andromeda, recipe: Recipe, norms: dict[int, float], **outside: Any) -> None:
        super().__init__(model, recipe, **outside)
        clip = self.engine.clip
        self.engine.clip = lambda: (  # type: ignore[method-assign]
            clip() * 0 + norms[self.loop.state.step + 1] if self.loop.state.step + 1 in norms else clip()
        )


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_step_whose_gradient_is_no_number_is_left_out(model: Andromeda, recipe: MakeRecipe, norm: float) -> None:
    """As if its sequences had not been there; the schedule goes on."""
    plan = recipe(steps=4, batch_size=2, log_every=1, save_every=1, schedule="constant", warmup_steps=0)
    run = Disturbed(model, plan, {2: norm}).go()

    def without(first: int, count: int) -> Batch:
        return sequences(first if first < 2 else first + 2, count)

    expected = Run(model, recipe(**{**vars(plan), "steps": 3}), batches=without).go()
    assert all(torch.equal(a, b) for a, b in zip(run.weights(), expected.weights(), strict=True))
    assert run.warnings == ["step 2: the gradient of sequences 2 to 3 is no number, so they are left out"]
    assert run.lines[1] == {"step": 2, "left_out": [2, 3], "gradient_norm": None}
    assert [state.step for _, _, state in run.saved] == [1, 3, 4]
    assert run.loop.state.sequence == 8 and run.loop.state.tokens == expected.loop.state.tokens


def test_a_spike_is_left_out_where_the_recipe_says_so(model: Andromeda, recipe: MakeRecipe) -> None:
    plan = recipe(steps=24, batch_size=1, log_every=1, spike=50.0)
    run = Disturbed(model, plan, {3: 1e6, 22: 1e6}).go()
    assert run.warnings == ["step 22: the gradient of sequences 21 to 21 is 1e+06, so they are left out"]
    assert not Disturbed(model, recipe(steps=24, batch_size=1), {22: 1e6}).go().warnings


def test_after_five_in_a_row_it_goes_back_once(model: Andromeda, recipe: MakeRecipe) -> None:
    plan = recipe(steps=12, batch_size=1, save_every=2, log_every=1)
    called: list[int] = []

    def go_back() -> bool:
        called.append(run.loop.state.step)
        return True

    run = Disturbed(model, plan, dict.fromkeys(range(3, 8), math.nan), go_back=go_back)
    run.go()
    assert called == [7]
    assert run.warnings[-1] == "step 7: weights and optimizer are back where the last checkpoint has them"
    assert [state.step for _, _, state in run.saved] == [2, 8, 10, 12]

    run = Disturbed(model, plan, dict.fromkeys(range(3, 13), math.nan), go_back=go_back)
    with pytest.raises(AndromedaError, match="at step 12 the loss or its gradient"):
        run.go()
    assert called == [7, 7]


def test_a_validation_that_is_no_number(model: Andromeda, recipe: MakeRecipe) -> None:
    run = Run(model, recipe(batch_size=2), validate=lambda: {"validation_bits_per_byte": math.nan})
    with pytest.raises(AndromedaError, match="at step 6 the loss"):
        run.go()
    assert run.saved == []


def test_it_learns(model: Andromeda, recipe: MakeRecipe) -> None:
    def same(first: int, count: int) -> Batch:
        return sequences(0, count)

    run = Run(model, recipe(steps=60, batch_size=4, learning_rate=0.01, warmup_steps=5), batches=same).go()
    assert run.lines[-1]["loss"] < 0.3 * run.lines[0]["loss"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slower on two
    yield
    torch.set_num_threads(threads)


class TestMemory:
    def run_with_room_for(self, most: int, model: Andromeda, plan: Recipe) -> Run:
        run = Run(model, plan)
        accumulate = run.engine.accumulate

        def limited(batch: Any, *others: Any, **more: Any) -> Tensor:
            totals = accumulate(batch, *others, **more)  # the gradient is there when memory runs out
            if len(batch[0]) > most:
                raise torch.OutOfMemoryError
            return totals

        run.engine.accumulate = limited  # type: ignore[method-assign]
        return run.go()

    def test_less_goes_through_at_once_and_the_steps_are_the_same(self, model: Andromeda, recipe: MakeRecipe) -> None:
        limited = self.run_with_room_for(2, model, recipe(batch_size=6, accumulate=2, log_every=1))
        expected = Run(model, recipe(batch_size=1, accumulate=12, log_every=1)).go()
        for ours, theirs in zip(limited.weights(), expected.weights(), strict=True):
            assert torch.equal(ours, theirs)
        assert limited.untimed() == expected.untimed()
        assert limited.warnings == [
            f"training: out of memory with {before} sequences of 16 tokens at once; going on with {after}, which "
            "changes no step beyond rounding"
            for before, after in ((6, 3), (3, 1))
        ]

    def test_one_sequence_is_too_much(self, model: Andromeda, recipe: MakeRecipe) -> None:
        with pytest.raises(AndromedaError, match=r"out of memory with 1 sequences of 16 tokens.*checkpointing=full"):
            self.run_with_room_for(0, model, recipe(batch_size=2))


class TestFloat16:
    def test_it_learns_as_in_float32(self, model: Andromeda, recipe: MakeRecipe) -> None:
        keys: dict[str, Any] = {"batch_size": 4, "log_every": 1, "learning_rate": 0.01, "warmup_steps": 0}
        exact, half = (Run(model, recipe(**keys, precision=name)).go() for name in ("float32", "float16"))
        for line, other in zip(half.untimed(), exact.untimed(), strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=0.01)
            assert line["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=0.05)
        assert half.loop.state.finite == 6 and not half.warnings

    def test_a_scale_that_is_too_much_is_halved_and_no_step_is_refused_for_it(
        self, model: Andromeda, recipe: MakeRecipe
    ) -> None:
        run = Run(model, recipe(batch_size=4, precision="float16", steps=30, warmup_steps=0))
        run.loop.state.loss_scale = 2.0**36
        run.go()
        assert 1 < run.loop.state.loss_scale < 2.0**36 and run.loop.state.finite > 0
        assert not run.warnings and run.loop.state.refused == 0

    def test_weights_that_are_no_number_end_it(self, model: Andromeda, recipe: MakeRecipe) -> None:
        run = Run(model, recipe(batch_size=4, precision="float16", steps=60))
        run.loop.state.loss_scale = 8.0
        run.model.blocks[0].feed_forward.up.weight.data[0, 0] = math.nan
        with pytest.raises(AndromedaError, match="is no number any more"):
            run.go()
        assert run.loop.state.loss_scale == 1 and run.loop.state.step == 3 + 5

    def test_it_goes_on_with_the_scale_it_had(self, model: Andromeda, recipe: MakeRecipe) -> None:
        plan = recipe(batch_size=4, precision="float16", steps=6)
        whole = Run(model, plan).go()
        part = Run(model, plan, stop=iter([False] * 3 + [True] * 2).__next__).go()
        resumed = Run(model, plan, start=part).go()
        assert all(map(torch.equal, resumed.weights(), whole.weights()))
        assert (resumed.loop.state.loss_scale, resumed.loop.state.finite) == (2.0**16, 6)


@pytest.mark.parametrize(
    ("finite", "before", "after"),
    [
        (True, (4.0, 5), (4.0, 6)), (True, (4.0, 1999), (8.0, 0)), (False, (4.0, 7), (2.0, 0)),
        (False, (1.0, 0), (1.0, 0)),
    ],
)  # fmt: skip
def test_the_loss_scale(finite: bool, before: tuple[float, int], after: tuple[float, int]) -> None:
    assert LossScale(*before).after(finite) == LossScale(*after)
