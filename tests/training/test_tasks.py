"""Tasks of a recipe: what a head tells, what it reads, what learns from it, and what a step takes of each."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.errors import AndromedaError
from andromeda.model import IGNORED, Andromeda
from andromeda.tensorfile import save_tensors
from andromeda.training.engines import Engine
from andromeda.training.loop import Outside
from andromeda.training.metrics import TIMINGS
from andromeda.training.nebula.curves import describe_tasks, plot_tasks
from andromeda.training.nebula.heads import Head, HeadSpec, load_heads, save_heads
from andromeda.training.nebula.keep import load_tasks, restore_tasks, save_tasks, split
from andromeda.training.nebula.loop import MultitaskLoop, Source
from andromeda.training.nebula.objective import Examples, Multitask, Tasks, attach, attached, mix, nothing, table_of
from andromeda.training.nebula.packing import pack, pool
from andromeda.training.nebula.recipe import TaskRecipe
from andromeda.training.nebula.targets import Target, build_target, found_kind
from andromeda.training.objective import NextToken
from andromeda.training.processes import Processes
from andromeda.training.progress import Silent
from andromeda.training.recipe import DataRecipe, Recipe
from andromeda.training.state import TrainingState
from andromeda.training.steps import ENDLESS, Steps
from tests.quick import quick
from tests.training.conftest import TINY
from tests.training.test_loop import METER, sequences

CPU = torch.device("cpu")
RECIPES = {
    "text": TaskRecipe(kind="language_model"),
    "tool": TaskRecipe(train="a.jsonl", weight=0.5),
    "size": TaskRecipe(train="b.jsonl", pooling="mean"),
    "has": TaskRecipe(train="c.jsonl"),
}
SPECS = {
    "tool": HeadSpec(Target("classification", ("cat", "dog", "owl"))),
    "size": HeadSpec(Target("regression", mean=3.0, scale=2.0), "mean"),
    "has": HeadSpec(Target("multi_label", ("x", "y"))),
}
SIZES = {"tool": 5, "size": 3, "has": 2}


def where(number: int) -> str:
    return f"a.jsonl:{number + 1}"


def with_tasks(model: Andromeda, balance: Any = "fixed", recipes: dict[str, TaskRecipe] = RECIPES) -> Andromeda:
    specs = {name: SPECS[name] for name in recipes if name in SPECS}
    teachers = {name: small_teacher() for name, task in recipes.items() if task.teacher}
    tasks = Tasks(model.config.dim, recipes, balance, specs, teachers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in filter(tasks.has_head, tasks.names):
            tasks.head(name).weight.normal_(generator=generator)  # at zero, as it begins, it moves no trunk
    attach(model, tasks)
    return model


def small_teacher() -> Andromeda:
    torch.manual_seed(1)
    return Andromeda(replace(TINY, dim=16, depth=1))


def examples(name: str, first: int, count: int) -> Examples:
    """Example n of a task from n alone."""
    inputs, targets = [], []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(1000 * len(name) + number)
        inputs.append(torch.randint(64, (2 + number % 7,), generator=generator))
        target: Any = {"tool": number % 3, "size": math.sin(number), "has": [float(number % 2), 1.0]}[name]
        targets.append(target)
    return inputs, torch.tensor(targets)


# ---- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", "b", "a"], "classification"),
        (["1", "b"], "classification"),
        ([True, False], "classification"),
        ([1, 2.5], "regression"),
        ([1.0, 2.0], "regression"),
        ([["a"], []], "multi_label"),
    ],
)
def test_a_kind_is_found_where_only_one_can_be_meant(values: list[Any], kind: str) -> None:
    assert found_kind(values, "task") == kind


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, 3], r"tasks\.task: .*whole numbers \(1, 2, 3\) may mean classification or regression; state its kind"),
        (["1", "2.5"], r"texts of numbers \('1', '2\.5'\) may mean classification or regression; state its kind"),
        ([1, "a"], r"fit no kind"),
        ([True, 1], r"fit no kind"),
        ([[1.0, 2.0]], r"fit no kind"),
        ([{"a": 1}], r"fit no kind"),
    ],
)
def test_ambiguity_names_the_choices(values: list[Any], message: str) -> None:
    with pytest.raises(AndromedaError, match=message):
        found_kind(values, "task")


def test_classes_there_and_back() -> None:
    values = ["dog", "cat", "dog"]
    target = build_target("classification", values, where, None, "task")
    assert target.labels == ("cat", "dog")
    encoded = target.encode(values, where)
    assert encoded.tolist() == [1, 0, 1] and encoded.dtype == torch.int64
    assert target.decode(F.one_hot(encoded).float()) == values
    assert build_target("classification", values, where, ["dog", "cat"], "task").labels == ("dog", "cat")
    assert build_target("classification", [10, 9, 10], where, None, "task").labels == ("9", "10")
    assert build_target("classification", [True, False], where, None, "task").labels == ("false", "true")


def test_labels_there_and_back() -> None:
    values = [["b"], [], ["a", "b"]]
    target = build_target("multi_label", values, where, None, "task")
    encoded = target.encode(values, where)
    assert encoded.tolist() == [[0, 1], [0, 0], [1, 1]]
    assert target.decode(encoded * 2 - 1) == values


def test_numbers_are_standardised() -> None:
    values = [2, "4", 6.0, 8]
    target = build_target("regression", values, where, None, "task")
    encoded = target.encode(values, where)
    assert encoded.mean().abs() < 1e-6 and encoded.std(correction=0).item() == pytest.approx(1)
    assert target.decode(encoded[:, None]) == pytest.approx([2, 4, 6, 8])


@pytest.mark.parametrize(
    ("kind", "values", "labels", "message"),
    [
        ("classification", ["a", "a"], None, r"tasks\.task: all targets are 'a'; there is nothing to learn"),
        ("classification", ["a", "b"], ["a", "b", "c"], r"tasks\.task\.labels: no example has 'c'"),
        ("classification", ["a", "b"], ["a"], r"a\.jsonl:2: 'b' is none of tasks\.task\.labels"),
        ("classification", [1.5, 2], None, r"a\.jsonl:1: the target 1\.5 is no class"),
        ("multi_label", [[], []], None, r"no example has a label"),
        ("multi_label", [["a"], "b"], None, r"a\.jsonl:2: the target 'b' is no list of labels"),
        ("regression", [3, 3.0], None, r"all 2 targets are 3; there is nothing to learn"),
        ("regression", [3, "x"], None, r"a\.jsonl:2: the target 'x' is not a number"),
        ("regression", [3, True], None, r"a\.jsonl:2: the target True is not a number"),
        ("regression", [3, "nan"], None, r"a\.jsonl:2: the target 'nan' is not a number"),
    ],
)
def test_targets_of_which_nothing_can_be_learned(kind: Any, values: list[Any], labels: Any, message: str) -> None:
    with pytest.raises(AndromedaError, match=message):
        build_target(kind, values, where, labels, "task")


def test_a_label_unseen_in_training_is_named() -> None:
    for target, value in ((Target("classification", ("a", "b")), "c"), (Target("multi_label", ("a", "b")), ["c"])):
        with pytest.raises(AndromedaError, match=r"a\.jsonl:1: the label 'c' is not known; there are a, b"):
            target.encode([value], where)


# ---- inputs, and heads ---------------------------------------------------------------------------


def test_inputs_share_rows_and_see_themselves_alone(model: Andromeda) -> None:
    inputs, _ = examples("tool", 0, 9)
    packed = pack(inputs, 16)
    assert packed.ids.shape[0] < 9 and packed.ids.shape[1] <= 16
    hidden = model.hidden(packed.ids, documents=packed.documents)
    for pooling in ("last", "mean"):
        found = pool(hidden, packed, pooling)
        for number, ids in enumerate(inputs):
            alone = model.hidden(ids[None])[0]
            expected = alone[-1] if pooling == "last" else alone.mean(0)
            torch.testing.assert_close(found[number], expected, rtol=1e-4, atol=1e-5)


def test_heads_are_saved_beside_the_model_and_checked(tmp_path: Path) -> None:
    heads = {name: Head(32, spec) for name, spec in SPECS.items()}
    for head in heads.values():
        torch.nn.init.normal_(head.weight)
    weights = {f"{name}.{key}": x for name, head in heads.items() for key, x in head.state_dict().items()}
    assert load_heads(tmp_path) == {}
    save_heads(tmp_path, SPECS, weights)
    loaded = load_heads(tmp_path)
    assert {name: head.spec for name, head in loaded.items()} == SPECS
    assert all(torch.equal(loaded[name].weight, head.weight) for name, head in heads.items())

    text = (tmp_path / "heads.json").read_text()
    for bad in (
        text.replace('"cat",', ""), text.replace('"last"', '"first"'), text.replace('"scale": 2.0', '"scale": 0'), "{",
        text.replace('"format_version": 1', '"format_version": 2'), '{"format_version": 1, "heads": []}',
        text.replace('"dog"', '"cat"'), text.replace('"regression"', '"magic"'), text.replace('"tool"', '"tol"'),
    ):  # fmt: skip
        (tmp_path / "heads.json").write_text(bad)
        with pytest.raises(AndromedaError, match="heads"):
            load_heads(tmp_path)
    (tmp_path / "heads.json").unlink()
    with pytest.raises(AndromedaError, match=r"heads\.json: no such file"):
        load_heads(tmp_path)


# ---- what is made small --------------------------------------------------------------------------


def mixed(model: Andromeda, names: list[str], text: bool = True) -> Any:
    tasks = attached(model)
    assert tasks is not None
    batch = sequences(0, 3)
    counts = torch.tensor([float(SIZES.get(name, (batch[1] != IGNORED).sum())) for name in tasks.names])
    given = {name: examples(name, 0, SIZES[name]) for name in names}
    return mix(batch if text else None, given, counts, 1.0, 16)


def by_hand(model: Andromeda, name: str) -> tuple[Tensor, float]:
    """A task's mean loss over its first examples, one at a time, and what its measure is."""
    tasks = attached(model)
    assert tasks is not None
    if name == "text":
        ids, targets, documents = sequences(0, 3)
        losses = model.token_losses(ids, targets, documents=documents)
        return losses.sum() / (targets != IGNORED).sum(), 0.0
    parts: list[Tensor] = []
    measure, head = 0.0, tasks.head(name)
    for ids, target in zip(*examples(name, 0, SIZES[name]), strict=True):
        hidden = model.hidden(ids[None])[0]
        scores = head(hidden.mean(0) if head.spec.pooling == "mean" else hidden[-1])
        if name == "tool":
            parts.append(F.cross_entropy(scores, target))
            measure += float(scores.argmax() == target)
        elif name == "size":
            parts.append((scores[0] - target) ** 2)
            measure += (2.0 * (scores[0] - target)).item() ** 2
        else:
            parts.append(F.binary_cross_entropy_with_logits(scores, target))
            measure += float(((scores > 0) == target.bool()).all())
    return torch.stack(parts).mean(), measure


def test_all_tasks_at_once_cost_what_each_does(model: Andromeda) -> None:
    model = with_tasks(model)
    totals = Multitask(model, CPU)(mixed(model, list(SIZES)))
    table = table_of(totals)
    names, expected = ["has", "size", "text", "tool"], torch.zeros(())
    for place, name in enumerate(names):
        loss, measure = by_hand(model, name)
        expected = expected + RECIPES[name].weight * loss
        assert (table[0, place] / table[1, place]).item() == pytest.approx(loss.item(), rel=1e-5)
        assert table[2, place].item() == pytest.approx(measure, rel=1e-4)
    torch.testing.assert_close(totals[0].float(), expected)
    ours = torch.autograd.grad(totals[0], list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", list(SIZES))
def test_gradients_of_a_task_reach_its_head_and_the_model_and_no_other_head(model: Andromeda, name: str) -> None:
    model = with_tasks(model, recipes={name: RECIPES[name], "text": RECIPES["text"], "tool": RECIPES["tool"]})
    Multitask(model, CPU)(mixed(model, [name], text=False))[0].backward()
    moved = {key for key, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    heads = {key for key in moved if key.startswith("tasks.")}
    assert heads == {f"tasks.heads.to_{name}.weight", f"tasks.heads.to_{name}.bias"}
    assert {"embedding.weight", "blocks.0.feed_forward.up.weight", "blocks.1.attention.to_qkv.weight"} <= moved
    assert "to_logits.weight" not in moved


def test_label_smoothing_and_z_loss_of_the_text_are_the_recipe_s(model: Andromeda) -> None:
    plain = Multitask(with_tasks(model), CPU)(mixed(model, []))[1:]
    smooth = TaskRecipe(kind="language_model", smoothing=0.1, z_loss=0.01)
    changed = Multitask(with_tasks(model, recipes={**RECIPES, "text": smooth}), CPU)(mixed(model, []))[1:]
    ids, targets, documents = sequences(0, 3)
    log_p = model(ids, documents=documents).log_softmax(-1)
    log_z = model(ids, documents=documents).logsumexp(-1)
    known = targets != IGNORED
    expected = 0.9 * plain[2] + (0.1 * -log_p.mean(-1) + 0.01 * log_z**2)[known].sum()
    assert changed[2].item() == pytest.approx(expected.item(), rel=1e-5)
    batch = sequences(0, 3)  # what is validated is the cross-entropy alone
    assert torch.equal(Multitask(model, CPU)(batch), NextToken(model, CPU)(batch))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_teacher_s_distribution_is_learned_where_there_is_a_target(model: Andromeda, reverse: bool) -> None:
    recipes = {"told": TaskRecipe(teacher="t", temperature=2.0, reverse=reverse), "tool": RECIPES["tool"]}
    teacher = attached(with_tasks(model, "fixed", recipes)).teachers["told"]  # type: ignore[union-attr]
    ids, targets, documents = sequences(0, 3)
    counts = torch.tensor([float((targets != IGNORED).sum()), 0.0])
    found = Multitask(model, CPU)(mix((ids, targets, documents), {}, counts, 1.0, 16))
    student, theirs = ((m(ids, documents=documents) / 2).log_softmax(-1) for m in (model, teacher))
    one, other = (student, theirs) if reverse else (theirs, student)
    exact = 4 * (one.exp() * (one - other)).sum(-1)[targets != IGNORED]
    assert found[0].item() == pytest.approx(exact.mean().item(), rel=1e-5)
    assert table_of(found)[:2, 0].tolist() == pytest.approx([exact.sum().item(), counts[0].item()], rel=1e-5)
    found[0].backward()
    assert model.output_weight.grad is not None and model.output_weight.grad.any()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any("teacher" in name or "told" in name for name in model.state_dict())


@pytest.mark.parametrize("name", list(SIZES))
def test_an_example_that_counts_nothing_does_not(model: Andromeda, name: str) -> None:
    model = with_tasks(model, recipes={name: RECIPES[name], "text": RECIPES["text"]})
    tasks = attached(model)
    assert tasks is not None
    found = Multitask(model, CPU)(mix(None, {name: nothing(tasks, name)}, torch.ones(2), 0.0, 16))
    found[0].backward()
    assert not found.any()
    assert all(not p.grad.any() and p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ---- steps ---------------------------------------------------------------------------------------


class Trained:
    """A loop over text and three tasks, and what it leaves."""

    saved: tuple[TrainingState, Any, dict[str, Tensor]]

    def __init__(self, folder: Path, balance: str, until: int, start: Trained | None = None, **keys: Any) -> None:
        torch.manual_seed(0)
        recipes = keys.pop("tasks", RECIPES)
        model = with_tasks(Andromeda(TINY), balance, recipes)
        recipe = Recipe(**{
            "data": DataRecipe(train="a.txt"), "model": {"preset": "nano"}, "tasks": recipes, "balance": balance,
            "steps": 6, "batch_size": 2, "accumulate": 2, "warmup_steps": 2, "learning_rate": 0.01, "log_every": 2,
            **keys,
        })  # fmt: skip
        state, tasks = TrainingState(), attached(model)
        assert tasks is not None
        if start is not None:
            state = start.saved[0]
            model.load_state_dict(start.saved[2], strict=False)
            restore_tasks(tasks, load_tasks(folder))
        self.engine = Engine(recipe, model, Processes(0, 1, CPU))
        if start is not None:
            self.engine.restore(start.saved[1])
        self.lines: list[dict[str, Any]] = []
        self.model = model

        def save(state: TrainingState) -> None:
            weights, of_tasks = split(self.engine.weights())
            assert not [name for name in weights if "tasks" in name]
            (folder / "training").mkdir(exist_ok=True)
            assert tasks is not None
            save_tasks(folder, tasks, of_tasks)
            self.saved = copy.deepcopy((state, self.engine.optimizer_tensors(), weights))

        outside = Outside(
            sequences, None, save, self.lines.append, lambda: state.step == until, lambda: False, lambda _: None
        )
        count = 0 if tasks.text is None else recipe.batch_size
        steps = Steps((ENDLESS,), (16,), count, recipe.accumulate)
        self.sources = {name: Source(partial(self.read, name), SIZES[name]) for name in recipes if name != "text"}
        self.taken: list[tuple[str, int, int]] = []
        MultitaskLoop(
            recipe, self.engine, state, steps, METER, outside, sources=self.sources, longest=16, trunk_flops=1e6
        ).run(Silent())

    def read(self, name: str, first: int, count: int) -> Examples:
        self.taken.append((name, first, count))
        return examples(name, first, count)

    def untimed(self) -> list[dict[str, Any]]:
        return [{key: x for key, x in line.items() if key not in TIMINGS} for line in self.lines]


BALANCES = pytest.mark.parametrize("balance", ["fixed", "uncertainty", "famo"])


@BALANCES
@pytest.mark.parametrize("stop_after", quick([1, 3, 4], [3]))
def test_stopped_and_resumed_it_is_the_same_bit_for_bit(balance: str, stop_after: int, tmp_path: Path) -> None:
    whole = Trained(tmp_path, balance, 6)
    before = Trained(tmp_path, balance, stop_after)
    after = Trained(tmp_path, balance, 6, start=before)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, after.model.state_dict()[name]), name
    assert before.untimed() + after.untimed() == whole.untimed()
    assert before.taken + after.taken == whole.taken


def test_a_step_takes_the_next_examples_of_each_task(tmp_path: Path) -> None:
    taken = Trained(tmp_path, "fixed", 6).taken
    for name, size in SIZES.items():
        numbers = [i for task, first, count in taken if task == name for i in range(first, first + count)]
        assert numbers == list(range(6 * size))


@BALANCES
def test_however_a_step_is_split_it_is_the_same(balance: str, tmp_path: Path) -> None:
    two, one = (Trained(tmp_path, balance, 6, batch_size=4 // n, accumulate=n) for n in (2, 1))
    for ours, theirs in zip(two.untimed(), one.untimed(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@BALANCES
def test_the_balance_learns_or_does_not(balance: str, tmp_path: Path) -> None:
    weights = [[line[f"{name}/weight"] for name in RECIPES] for line in Trained(tmp_path, balance, 6).lines]
    if balance == "fixed":
        assert weights == [[1.0, 0.5, 1.0, 1.0]] * 3
    else:
        assert weights[0] != weights[-1]


def test_a_line_of_metrics(tmp_path: Path) -> None:
    line = Trained(tmp_path, "fixed", 1, log_every=1).lines[0]
    torch.manual_seed(0)
    model = with_tasks(Andromeda(TINY))
    tool, right = by_hand(model, "tool")
    size, squares = by_hand(model, "size")
    assert line["tool/loss"] == pytest.approx(tool.item(), rel=1e-5)
    assert line["tool/accuracy"] == pytest.approx(right / 5)
    assert line["size/loss"] == pytest.approx(size.item(), rel=1e-5)
    assert line["size/error"] == pytest.approx(math.sqrt(squares / 3), rel=1e-5)
    assert line["train_bits_per_byte"] == pytest.approx(line["text/loss"] / math.log(2) / METER.bytes_per_token)
    total = sum(line[f"{name}/loss"] * task.weight for name, task in RECIPES.items())
    assert line["loss"] == pytest.approx(total, rel=1e-6)
    assert line["tokens"] == int((sequences(0, 4)[1] != IGNORED).sum()) + sum(SIZES.values())
    json.dumps(line, allow_nan=False)


def test_without_text(tmp_path: Path) -> None:
    run = Trained(tmp_path, "fixed", 6, tasks={"tool": RECIPES["tool"]})
    assert "train_bits_per_byte" not in run.lines[0] and "text/loss" not in run.lines[0]
    assert run.lines[-1]["tokens"] == 6 * 5 and run.lines[-1]["tokens_per_second"] > 0
    assert run.lines[-1]["tool/loss"] < run.lines[0]["tool/loss"]


def test_famo_learns_nothing_from_a_step_that_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "clip", lambda engine: torch.tensor(math.nan))
    run = Trained(tmp_path, "famo", 2)
    tasks = attached(run.model)
    assert tasks is not None and (tasks.nebula.balance.state_dict()["losses"] == 1).all()  # as it begins
    assert [line["left_out"] for line in run.lines if "left_out" in line] == [[0, 3], [4, 7]]


def test_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With text less of all is computed at once; without, it is told in one line."""
    accumulate, failed = Engine.accumulate, list[int]()

    def full(engine: Engine, *args: Any, **keys: Any) -> Tensor:
        if len(failed) < 1:
            failed.append(1)
            raise torch.OutOfMemoryError
        return accumulate(engine, *args, **keys)

    whole = Trained(tmp_path, "fixed", 2)
    monkeypatch.setattr(Engine, "accumulate", full)
    assert Trained(tmp_path, "fixed", 2).untimed()[0] == pytest.approx(whole.untimed()[0], rel=1e-5)
    failed.clear()
    with pytest.raises(AndromedaError, match="out of memory with the examples of a step; raise accumulate"):
        Trained(tmp_path, "fixed", 2, tasks={"tool": RECIPES["tool"]})


def test_a_checkpoint_of_other_tasks_is_refused(tmp_path: Path) -> None:
    Trained(tmp_path, "uncertainty", 2)
    kept = load_tasks(tmp_path)
    for recipes, balance in ((RECIPES, "famo"), ({**RECIPES, "other": RECIPES["tool"]}, "uncertainty")):
        specs = {name: SPECS.get(name, SPECS["tool"]) for name in recipes if name != "text"}
        with pytest.raises(AndromedaError, match="it belongs to another recipe"):
            restore_tasks(Tasks(32, recipes, balance, specs), kept)  # type: ignore[arg-type]
    with pytest.raises(AndromedaError, match="of another size"):
        restore_tasks(Tasks(16, RECIPES, "uncertainty", SPECS), kept)
    save_tensors(tmp_path / "heads.safetensors", {})
    with pytest.raises(AndromedaError, match=r"heads\.safetensors"):
        load_tasks(tmp_path)


# ---- seen ----------------------------------------------------------------------------------------


def test_curves_in_words_and_as_a_picture(tmp_path: Path) -> None:
    lines = Trained(tmp_path, "famo", 6).lines
    words = describe_tasks(lines[-1])
    assert list(words) == ["has", "size", "text", "tool"]
    assert words["tool"].startswith(f"loss {lines[-1]['tool/loss']:.3g}, accuracy")
    lines[-1] |= {"validation_bits_per_byte": 3.0, "tool/validation_accuracy": 0.5}
    plot_tasks(lines, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
