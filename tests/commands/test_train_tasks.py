"""`andromeda train` with tasks: heads beside the model, exact resume, and one line for each mistake before any work."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from andromeda.checkpoint import load_checkpoint
from andromeda.commands.generate import generate
from andromeda.commands.train import train
from andromeda.errors import AndromedaError
from andromeda.training.metrics import read_metrics
from andromeda.training.nebula.heads import load_heads
from andromeda.training.nebula.keep import load_tasks
from andromeda.training.nebula.predict import Predictor
from tests.commands.quick_training import quick_training
from tests.commands.runs import (
    VERSE,
    assert_same_run,
    at_step,
    copied,
    kill_and_compare,
    refused,
    untimed,
    write_recipe,
)
from tests.quick import quick

TASKS = """
tasks:
  text: {kind: language_model, z_loss: 1.0e-4}
  first: {train: FOLDER/lines.jsonl, validation: FOLDER/more.jsonl, input: line, target: first, batch_size: 4}
  size: {train: FOLDER/lines.jsonl, validation: FOLDER/more.jsonl, input: "{line}", target: size, pooling: mean}
  has: {train: FOLDER/lines.jsonl, input: line, target: has, batch_size: 3, weight: 0.5}
balance: uncertainty
"""

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_tasks(tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without tasks, which is read alone."""
    with quick_training():
        return run(write_tasks(tmp_path_factory.mktemp("plain")), "tasks={}", "balance=fixed")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe of tasks and 8 steps of its run. It is copied."""
    recipe = write_tasks(tmp_path_factory.mktemp("begun"))
    with quick_training():
        run(recipe, "steps=8")
    return recipe.parent


def write_tasks(folder: Path) -> Path:
    """`write_recipe`'s, with three tasks that have examples."""
    recipe = write_recipe(folder)
    lines = [line for line in VERSE.splitlines() if line.strip()][:50]
    write(folder / "lines.jsonl", [example(line) for line in lines[:40]])
    write(folder / "more.jsonl", [example(line) for line in lines[40:]])
    recipe.write_text(recipe.read_text() + TASKS.replace("FOLDER", str(folder)))
    return recipe


def example(line: str) -> dict[str, Any]:
    first = "vowel" if line[0].lower() in "aeiou" else "other"
    return {"line": line[:24], "first": first, "size": float(len(line)), "has": sorted({*line} & {*"xyz"})}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(recipe: Path, *overrides: str) -> Path:
    train(str(recipe), list(overrides))
    given = dict(override.split("=", 1) for override in overrides)
    return Path(given.get("output", recipe.parent / "run"))


def test_heads_lie_beside_a_plain_model(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run(recipe)
    out, _ = capsys.readouterr()
    assert "first 40 examples, size 40 examples, has 40 examples" in out
    checkpoint = directory / "checkpoints" / "step-00000012"
    assert not any("tasks" in name for name in load_checkpoint(checkpoint).state_dict())
    generate(str(directory), prompt="the", max_new_tokens=3, seed=1)
    assert set(load_heads(checkpoint)) == {"first", "size", "has"}

    lines = [line for line in read_metrics(directory / "metrics.jsonl") if "first/validation_accuracy" in line]
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert all({"validation_bits_per_byte", "size/validation_error", "has/accuracy"} <= set(line) for line in lines)
    assert "has/validation_accuracy" not in lines[0]

    predictor = Predictor.load(directory)
    rows = [json.loads(line) for line in (recipe.parent / "more.jsonl").read_text().splitlines()]
    told = predictor.predict([row["line"] for row in rows], "first")
    right = sum(one == row["first"] for one, row in zip(told, rows, strict=True)) / len(rows)
    assert right == pytest.approx(lines[-1]["first/validation_accuracy"])
    sizes = torch.tensor(predictor.predict([row["line"] for row in rows], "size"))
    error = (sizes - torch.tensor([row["size"] for row in rows])).square().mean().sqrt().item()
    assert error == pytest.approx(lines[-1]["size/validation_error"], rel=1e-4)
    assert predictor.predict(["xyz"], "has")[0] in ([], ["x"], ["y"], ["z"], ["y", "z"])
    assert predictor.predict([], "size") == []
    words = ["a", "of", "he", "so"]  # which share a row
    for one, word in zip(predictor.scores(words, "first"), words, strict=True):
        torch.testing.assert_close(one, predictor.scores([word], "first")[0])
    with pytest.raises(AndromedaError, match=r"no head 'last'; there are: first, has, size"):
        predictor.predict(["a"], "last")


def test_a_model_without_heads_predicts_nothing(recipe: Path) -> None:
    directory = run(recipe, "tasks={text: {z_loss: 1.0e-4}}", "balance=fixed", "steps=1")
    assert load_heads(directory / "checkpoints" / "step-00000001") == {}
    with pytest.raises(AndromedaError, match=r"has no heads; train it by a recipe with `tasks`"):
        Predictor.load(directory)


def test_the_language_model_alone_as_a_task_learns_what_the_plain_recipe_does(recipe: Path, plain: Path) -> None:
    alone = run(recipe, "tasks={text: {z_loss: 0.0}}", "balance=fixed")
    for ours, theirs in zip(untimed(alone), untimed(plain), strict=True):
        assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("balance", quick(["uncertainty", "famo"], ["famo"]))
def test_asked_to_stop_it_saves_and_goes_on_exactly(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, balance: str
) -> None:
    whole = run(recipe, f"balance={balance}", f"output={recipe.parent / 'whole'}")
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            run(recipe, f"balance={balance}")
    before, tasks, after = re.split("tasks:\n|(?=balance)", recipe.read_text())
    swapped = "".join(reversed(tasks.splitlines(keepends=True)))  # tasks in another order are the same tasks
    recipe.write_text(f"{before}tasks:\n{swapped}{after}")
    assert_same_run(run(recipe, f"balance={balance}"), whole)


@pytest.mark.slow
def test_kill_9_twice(recipe: Path) -> None:
    kill_and_compare(recipe, kills=2, seed=5)


def test_without_text_a_model_goes_on_with_tasks_alone(recipe: Path, begun: Path) -> None:
    directory = begun / "run"
    tuned = recipe.parent / "tuned.yaml"
    tuned.write_text(f"""
model: {{from: {directory}}}
tasks:
  first: {{train: {recipe.parent}/lines.jsonl, input: line, target: first}}
steps: 30
learning_rate: 0.01
warmup_steps: 3
output: {recipe.parent}/tuned
""")
    lines = read_metrics(run(tuned, f"output={recipe.parent}/tuned") / "metrics.jsonl")
    assert lines[-1]["first/loss"] < 0.8 * lines[0]["first/loss"]
    assert set(Predictor.load(recipe.parent / "tuned").heads) == {"first"}


def test_a_smaller_model_learns_from_a_larger(recipe: Path, plain: Path) -> None:
    keys = (
        f"tasks={{like: {{teacher: {plain}}}, text: {{z_loss: 0.0}}}}", "balance=fixed", "model.dim=16",
        "tokenizer.vocab_size=null", f"tokenizer.path={plain}", "schedule=constant",
    )  # fmt: skip
    student, whole = recipe.parent / "student", recipe.parent / "whole"
    run(recipe, *keys, "steps=8", f"output={student}")
    run(recipe, *keys, "steps=12", f"output={student}")
    run(recipe, *keys, "steps=12", f"output={whole}")
    lines, newest = untimed(student), [path / "checkpoints" / "step-00000012" for path in (student, whole)]
    assert lines[-1]["like/loss"] < lines[0]["like/loss"] and lines[-1] == untimed(whole)[-1]
    ours, theirs = (load_checkpoint(path) for path in newest)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert ours.config.dim == 16


def test_a_teacher_with_other_tokens(recipe: Path, plain: Path) -> None:
    keys = (f"tasks={{like: {{teacher: {plain}}}}}", "balance=fixed")
    for more, message in (
        (
            (),
            r"tasks\.like\.teacher='.*' has other tokens than the model \(320, and 320\); let tokenizer\.path name it",
        ),
        (
            ("tokenizer.vocab_size=null", f"tokenizer.path={plain}", "model.num_tokens=384"),
            r"has other tokens than the model \(320, and 384\)",
        ),
        ((f"tasks.like.teacher={recipe.parent}/none",), r"none: no such directory"),
    ):
        with refused(recipe.parent, message):
            run(recipe, *keys, *more)


def test_with_an_adapter_heads_are_trained_too(recipe: Path) -> None:
    origin = run(recipe, "steps=4", "balance=fixed", "tasks={text: {}}")
    keys = (f"model={{from: {origin}}}", "tokenizer.vocab_size=null", "lora.rank=2", "schedule=constant")
    tuned, whole = recipe.parent / "tuned", recipe.parent / "whole"
    run(recipe, *keys, "steps=8", f"output={tuned}")
    run(recipe, *keys, f"output={tuned}")
    newest = tuned / "checkpoints" / "step-00000012"
    assert (newest / "adapter").is_dir() and not any("tasks" in name for name in load_checkpoint(newest).state_dict())
    assert all(head.weight.any() for head in load_heads(newest).values())
    run(recipe, *keys, f"output={whole}")
    for name in ("heads.safetensors", "model.safetensors", "training/balance.safetensors"):
        assert (newest / name).read_bytes() == (whole / "checkpoints" / "step-00000012" / name).read_bytes()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "heads cut short": lambda path: os.truncate(path / "heads.safetensors", 100),
    "no heads": lambda path: (path / "heads.safetensors").unlink(),
    "no specs": lambda path: (path / "heads.json").unlink(),
    "balance cut short": lambda path: os.truncate(path / "training" / "balance.safetensors", 10),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_heads_give_way_to_the_checkpoint_before(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    recipe = write_tasks(tmp_path)
    directory = copied(begun / "run", recipe)
    DAMAGE[damage](directory / "checkpoints" / "step-00000008")
    run(recipe, "steps=8")
    assert "set aside as step-00000008.1.damaged, going on from step-00000004" in capsys.readouterr().err


def test_it_goes_back_with_heads_and_balance(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from andromeda.training.engines.single import Engine

    steps, back = 0, []
    clip, forget, restore = Engine.clip, Engine.forget, Engine.restore

    def clipped(engine: Engine) -> torch.Tensor:
        return clip(engine) * (torch.nan if steps in range(5, 10) else 1.0)

    def forgotten(engine: Engine) -> None:
        nonlocal steps
        steps += 1
        forget(engine)

    def restored(engine: Engine, tensors: dict[str, torch.Tensor]) -> None:
        restore(engine, tensors)
        back.append({name: x.clone() for name, x in engine.model.state_dict().items() if name.startswith("tasks.")})

    monkeypatch.setattr(Engine, "clip", clipped)
    monkeypatch.setattr(Engine, "forget", forgotten)
    monkeypatch.setattr(Engine, "restore", restored)
    directory = run(recipe, "balance=famo", "keep_last=9")
    kept = load_tasks(directory / "checkpoints" / "step-00000004").tensors
    assert len(back) == 1 and "tasks.nebula.balance.xi" in kept
    assert back[0].keys() == kept.keys() and all(torch.equal(back[0][name], kept[name]) for name in kept)


# ---- what is refused, before anything is written -------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.first.train=none.jsonl"], r"none\.jsonl: no such file"),
        (["tasks.first.train=a.txt"], r"a\.txt: unknown kind of file; examples are \.jsonl or \.parquet"),
        (["tasks.first.target=second"], r"lines\.jsonl:1: has no `second` \(there are: line, first, size, has\)"),
        (["tasks.first.input=text"], r"lines\.jsonl:1: has no `text`"),
        (["tasks.first.target=line", "tasks.first.validation=[]", "tasks.first.kind=regression"], r"is not a number"),
        (["tasks.first.target=line"], r"more\.jsonl:1: the label '.*' is not known; there are .* and 2[0-9] more"),
        (["tasks.first.labels=[vowel, other, none]"], r"tasks\.first\.labels: no example has 'none'"),
        (["tasks.first.huber=1"], r"tasks\.first\.huber=1\.0 is for regression, and this is classification"),
        (["tasks.size.smoothing=0.1"], r"tasks\.size\.smoothing=0\.1 is for language_model, classification, and"),
        (["tasks.first.kind=magic"], r"tasks\.\*\.kind: must be one of language_model \| distillation"),
        (["tasks.first.wieght=1"], r"no key 'tasks\.first\.wieght' in a recipe; did you mean 'tasks\.first\.weight'"),
        (["tasks.First={train: a.jsonl}"], r"tasks: 'First' is no name"),
        (["tasks.more={}"], r"tasks text and more both learn from `data`"),
        (["tasks.text.kind=null", "tasks.text.pooling=mean"], r"tasks\.text\.pooling='mean' is for classification"),
        (["tasks={first: {train: a.jsonl}}"], r"balance='uncertainty' needs at least two tasks; there are 1"),
        (["tasks.first.weight=-1"], r"tasks\.first\.weight=-1\.0 must not be negative"),
        (["tasks.first.batch_size=0"], r"tasks\.first\.batch_size=0 must be at least 1"),
        (["tasks.size.huber=0"], r"tasks\.size\.huber=0\.0 must be positive"),
        (
            ["tasks.text.kind=distillation", "tasks.text.z_loss=0"],
            r"tasks\.text\.teacher=None must name a model directory",
        ),
        (
            ["tasks.text.temperature=2"],
            r"tasks\.text\.temperature=2\.0 is for distillation, and this is language_model",
        ),
        (["tasks.text.smoothing=1"], r"tasks\.text\.smoothing=1\.0 must lie in \[0, 1\)"),
        (["tasks.size.kind=classification", "tasks.size.target=has"], r"the target \[\] is no class"),
    ],
)
def test_mistakes_leave_nothing_behind(recipe: Path, overrides: list[str], message: str) -> None:
    with refused(recipe.parent, message):
        run(recipe, *overrides)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"lines\.jsonl: holds no example"),
        ([{"line": "a", "first": "x"}] * 2, r"tasks\.first: all targets are 'x'; there is nothing to learn"),
        ([{"line": "a", "first": n} for n in range(3)], r"may mean classification or regression; state its kind"),
        ([{"line": "a", "first": "x"}, {"line": " ", "first": "y"}], r"lines\.jsonl:2: `line` is empty"),
        ([{"line": "a", "first": None}], r"lines\.jsonl:1: has no `first`"),
    ],
)
def test_examples_of_which_nothing_can_be_learned(recipe: Path, rows: list[dict[str, Any]], message: str) -> None:
    write(recipe.parent / "lines.jsonl", rows)
    only = f"tasks={{text: {{}}, first: {{train: {recipe.parent}/lines.jsonl, input: line, target: first}}}}"
    with refused(recipe.parent, message):
        run(recipe, only)


def test_without_text_there_must_be_a_tokenizer(recipe: Path) -> None:
    only = f"tasks={{first: {{train: {recipe.parent}/lines.jsonl, input: line, target: first}}}}"
    keys = (only, "balance=fixed", "data.validation=[]", "data.train=[]", "tokenizer.vocab_size=null")
    with refused(recipe.parent, r"data\.train=\[\] must name text to train a tokenizer on, or tokenizer\.path"):
        run(recipe, *keys)
    with refused(recipe.parent, r"data\.build='b' needs a task of kind language_model"):
        run(recipe, *keys, "data.build=b")


def test_other_examples_do_not_change_what_heads_tell(recipe: Path, begun: Path) -> None:
    copied(begun / "run", recipe)
    lines = (recipe.parent / "lines.jsonl").read_text()
    (recipe.parent / "lines.jsonl").write_text(lines.replace('"vowel"', '"another"'))
    with pytest.raises(AndromedaError, match=r"the label 'another' is not known; there are other, vowel"):
        run(recipe, "steps=9")
