"""`andromeda train` as a whole: runs, resumes, refuses; and survives being killed."""

from __future__ import annotations

import errno
import math
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.checkpoint import load_checkpoint, save_checkpoint
from andromeda.commands import session
from andromeda.commands.summary import About, summarise
from andromeda.commands.train import train
from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError
from andromeda.tensorfile import load_tensors
from andromeda.tokenizer import Tokenizer
from andromeda.training.engines import Engine
from andromeda.training.metrics import TIMINGS, read_metrics
from andromeda.training.state import load_state
from tests.commands.quick_training import quick_training
from tests.commands.runs import (
    VERSE,
    assert_same_run,
    at_step,
    contents,
    copied,
    flip,
    kill_and_compare,
    refused,
    snapshot,
    write_recipe,
)

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick")


def run(recipe: Path, *overrides: str) -> Path:
    """Trains; returns the run directory."""
    train(str(recipe), list(overrides))
    outputs = [override.removeprefix("output=") for override in overrides if override.startswith("output=")]
    return Path(outputs[-1]) if outputs else recipe.parent / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the recipe, undisturbed, with all of its checkpoints. It is read and copied, and left as it is."""
    with quick_training():
        return run(write_recipe(tmp_path_factory.mktemp("whole")), "keep_last=3")


# ---- a run ---------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_says(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("andromeda.commands.session.summarise", summarise)
    directory = run(recipe)
    names = sorted(path.name for path in directory.iterdir())
    assert names == [
        "checkpoints", "curves.png", "data", "heads.jsonl", "heads.png", "loss.png", "metrics.jsonl", "recipe.yaml",
        "summary.md",
    ]  # fmt: skip
    checkpoints = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert checkpoints == ["step-00000008", "step-00000012"]  # the last two
    newest = directory / "checkpoints" / "step-00000012"
    tokenizer, model = Tokenizer.load(newest), load_checkpoint(newest)
    assert tokenizer.vocab_size == 300 and model.config.num_tokens == 320  # a multiple of 64
    lines = read_metrics(directory / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "validation_bits_per_byte" in line] == [5, 10, 12]
    assert all(line[name] > 0 for line in lines for name in TIMINGS if name != "peak_device_bytes")
    assert lines[-1]["tokens"] == 12 * 4 * 16
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "tokenizer: trained, 300 tokens"
    assert "12 steps of 64 tokens" in out[2]
    assert out[-1] == f"{directory}: finished 12 steps; the model is {newest}"
    assert f"summary: {directory / 'summary.md'}" in out
    summary = (directory / "summary.md").read_text()
    assert "Finished." in summary and f"{lines[-1]['tokens']:,} trained on, in 12 steps" in summary
    assert "`checkpoints/step-00000012`" in summary and "![heads](heads.png)" in summary
    assert [line["step"] for line in read_metrics(directory / "heads.jsonl")] == [5, 10, 12]


def test_validation_by_hand(recipe: Path, whole: Path) -> None:
    newest = whole / "checkpoints" / "step-00000012"
    tokenizer, model = Tokenizer.load(newest), load_checkpoint(newest)
    text = (recipe.parent / "validation.txt").read_text()
    ids = tokenizer.encode(text)
    nats = 0.0
    for first in range(0, len(ids), 16):
        window = ids[first : first + 16]
        logits = model(torch.tensor([[tokenizer.eos_id, *window[:-1]]]))[0].double()
        nats += F.cross_entropy(logits, torch.tensor(window), reduction="sum").item()
    reported = read_metrics(whole / "metrics.jsonl")[-1]["validation_bits_per_byte"]
    assert reported == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_a_finished_run_is_left_alone(recipe: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = copied(whole, recipe)
    before = snapshot(directory)
    run(recipe, "keep_last=3")
    assert capsys.readouterr().out == f"{directory}: finished already, at step 12; raise steps to go on\n"
    assert snapshot(directory) == before
    run(recipe, "steps=5")
    assert "finished already, at step 12" in capsys.readouterr().out


def test_one_process_shares_no_sequence(recipe: Path) -> None:
    with refused(recipe.parent, "context_parallel=2 needs a multiple of 2 processes, and there is 1"):
        run(recipe, "context_parallel=2")


def test_a_run_can_be_made_longer(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("schedule=constant", "validate_every=4")
    directory = run(recipe, *keys)
    run(recipe, *keys, "steps=16", "keep_last=1")
    assert f"{directory}: going on from step 12 of 16" in capsys.readouterr().out
    whole = run(recipe, *keys, "steps=16", "keep_last=1", f"output={recipe.parent / 'whole'}")
    assert_same_run(directory, whole)


def test_without_validation_or_matplotlib(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("andromeda.commands.session.summarise", summarise)
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    directory = run(recipe, "data.validation=[]")
    assert list(directory.glob("*.png")) == []
    assert "![" not in (directory / "summary.md").read_text()
    out = capsys.readouterr().out
    assert "pip install 'andromeda-lm[train]'" in out and "no validation" in out
    assert not any("validation_bits_per_byte" in line for line in read_metrics(directory / "metrics.jsonl"))
    for line in read_metrics(directory / "heads.jsonl"):
        assert line.keys() == {"step", "tokens", "bounds", "windows"}


def test_the_summary_is_written_while_training_goes_on_and_when_it_stops(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LOOK_BACK_SECONDS", 0.0)
    monkeypatch.setattr(session, "LOOK_BACK_SHARE", 0)
    told: list[str] = []

    def look(_: object, about: About) -> bool:
        told.append(about.status)
        return True

    monkeypatch.setattr("andromeda.commands.session.summarise", look)
    at_step(monkeypatch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(recipe)
    assert told == [
        "Training stands at step 4 of 12.", "Training stands at step 8 of 12.", "Training stands at step 10 of 12.",
        "Stopped at step 10 of 12; the same command goes on.",
    ]  # fmt: skip


def test_training_does_not_depend_on_the_summary(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("andromeda.commands.session.summarise", fail)
    directory = run(recipe)
    told = capsys.readouterr()
    assert "finished 12 steps" in told.out
    assert "summary:" not in told.out
    assert f"warning: {directory / 'summary.md'}: cannot be written: [Errno 28] No space left" in told.err


def test_bfloat16_trains_and_keeps_float32(recipe: Path, whole: Path) -> None:
    rough = run(recipe, "precision=bfloat16")
    losses = [[line["loss"] for line in read_metrics(path / "metrics.jsonl")] for path in (whole, rough)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    weights, _ = load_tensors(rough / "checkpoints" / "step-00000012" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


# ---- where a model or a tokenizer comes from -----------------------------------------------------


def test_training_goes_on_from_another_model(recipe: Path, whole: Path) -> None:
    directory = copied(whole, recipe)
    before = load_checkpoint(directory / "checkpoints" / "step-00000012")
    tokenizer = Tokenizer.load(directory / "checkpoints" / "step-00000012")
    keys = ("tokenizer.vocab_size=null", "learning_rate=1e-9", "weight_decay=0")
    origin, output = f"model={{from: {directory}, position_interpolation: 2.0}}", f"output={recipe.parent / 'tuned'}"
    tuned = run(recipe, origin, output, *keys, "steps=1") / "checkpoints"
    after = load_checkpoint(tuned / "step-00000001")
    assert after.config.position_interpolation == 2.0
    for ours, theirs in zip(after.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
    assert Tokenizer.load(tuned / "step-00000001").sha256 == tokenizer.sha256
    state, _ = load_state(tuned / "step-00000001")
    assert state.step == 1 and state.tokens == 64

    with pytest.raises(AndromedaError, match=r"model\.depth=3 cannot change the model of model\.from; .*max_seq_len"):
        run(recipe, f"model={{from: {directory}, depth: 3}}", f"output={recipe.parent / 'deeper'}", *keys)
    shutil.rmtree(directory)
    run(recipe, origin, output, *keys, "steps=2")  # it has all that it needs
    assert (tuned / "step-00000002").is_dir()


def test_a_tokenizer_that_exists(recipe: Path, whole: Path) -> None:
    checkpoint = whole / "checkpoints" / "step-00000012"
    for number, path in enumerate((checkpoint, checkpoint / "tokenizer.json", whole)):
        tokenizer = ("tokenizer.vocab_size=null", f"tokenizer.path={path}")
        other = run(recipe, *tokenizer, "steps=1", f"output={recipe.parent / str(number)}")
        stored = Tokenizer.load(other / "checkpoints" / "step-00000001")
        assert stored.sha256 == Tokenizer.load(checkpoint).sha256


def test_without_a_size_the_tokenizer_is_as_large_as_the_model_s(recipe: Path) -> None:
    directory = run(recipe, "tokenizer.vocab_size=null", "model.num_tokens=290", "steps=1")
    checkpoint = directory / "checkpoints" / "step-00000001"
    assert Tokenizer.load(checkpoint).vocab_size == load_checkpoint(checkpoint).config.num_tokens == 290


# ---- what is refused, before anything is written -------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=none.txt"], r"none\.txt: no such file"),
        (["data.validation=none.txt"], r"none\.txt: no such file"),
        (["data.train=recipe.pdf"], r"recipe\.pdf: unknown kind of file"),
        (["model.dim=0"], r"config: dim=0 must be at least 1"),
        (["model.dimension=3"], r"no key 'model\.dimension'"),
        (
            ["model.depth=1000000000"],
            r"a model of [\d.]+ T parameters needs [\d.]+ TiB of .*, and this machine has .*iB",
        ),
        (["model.num_tokens=299"], r"the tokenizer has 300 tokens, more than the model's num_tokens=299"),
        (["seq_len=17"], r"seq_len=17 is more than the model's max_seq_len=16"),
        (["tokenizer.vocab_size=null", "tokenizer.path=none.json"], r"none\.json"),
        (["tokenizer.path=none.json"], r"tokenizer\.vocab_size=300 is for a new tokenizer"),
        (["model={from: runs/none}", "tokenizer.vocab_size=null"], r"runs/none: no such directory"),
        (
            ["model={from: runs/none}"],
            r"tokenizer\.vocab_size=300 is for a new tokenizer, and the model of model\.from",
        ),
        (["stepps=3"], r"no key 'stepps'"),
    ],
)
def test_mistakes_leave_nothing_behind(recipe: Path, overrides: list[str], message: str) -> None:
    with refused(recipe.parent, message):
        run(recipe, *overrides)


def test_a_vocabulary_too_small_for_a_tokenizer_that_exists(recipe: Path) -> None:
    Tokenizer.train([VERSE], 350).save(recipe.parent / "tokenizer")
    with pytest.raises(AndromedaError, match=r"the tokenizer has 350 tokens, more than the model's num_tokens=320"):
        run(
            recipe, "tokenizer.vocab_size=null", f"tokenizer.path={recipe.parent / 'tokenizer'}", "model.num_tokens=320"
        )  # fmt: skip


def test_a_model_for_which_no_memory_is_free(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(config: AndromedaConfig) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr("andromeda.commands.start.Andromeda", full)
    with pytest.raises(AndromedaError, match=r"a model of .* parameters needs .* KiB of memory .*, and less is free"):
        run(recipe)


def test_a_corpus_without_text_can_be_put_right(recipe: Path) -> None:
    (recipe.parent / "empty.txt").write_text(" \n")
    before = snapshot(recipe.parent)
    for key in ("train", "validation"):
        with pytest.raises(AndromedaError, match=r"empty\.txt: no text"):
            run(recipe, f"data.{key}={recipe.parent / 'empty.txt'}")
        assert snapshot(recipe.parent) == before  # found before the tokenizer is trained
    assert (run(recipe) / "checkpoints" / "step-00000012").is_dir()


def test_another_recipe_does_not_touch_the_run(recipe: Path, whole: Path) -> None:
    directory = copied(whole, recipe)
    before = snapshot(directory)
    with pytest.raises(AndromedaError, match=r"this run has learning_rate=0\.01, and the recipe now says 0\.02"):
        run(recipe, "learning_rate=0.02")
    assert snapshot(directory) == before


# ---- interrupted ---------------------------------------------------------------------------------


class CrashError(Exception):
    pass


def test_it_goes_back_to_the_last_checkpoint_that_is_whole(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five steps in a row without a gradient: from step 4's weights on, with the data that comes next."""
    original, forget, restore = Engine.clip, Engine.forget, Engine.restore
    steps, back = 0, []

    def clip(engine: Engine) -> Tensor:
        norm = original(engine)
        return norm * math.nan if steps in range(5, 10) else norm

    def counted(engine: Engine) -> None:
        nonlocal steps
        steps += 1
        forget(engine)

    def restored(engine: Engine, tensors: dict[str, Tensor]) -> None:
        restore(engine, tensors)
        back.append({name: x.clone() for name, x in engine.model.state_dict().items()})

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "clip", clip)
        patch.setattr(Engine, "forget", counted)
        patch.setattr(Engine, "restore", restored)
        directory = run(recipe)
    kept = load_checkpoint(directory / "checkpoints" / "step-00000004").state_dict()
    assert len(back) == 1 and all(torch.equal(back[0][name], kept[name]) for name in kept)
    assert "step 10: weights and optimizer are back where the last checkpoint has them" in capsys.readouterr().err
    left_out = [line["left_out"] for line in read_metrics(directory / "metrics.jsonl") if "left_out" in line]
    assert left_out == [[4 * step, 4 * step + 3] for step in range(5, 10)]


def test_a_full_disk_stops_training_or_is_told(
    recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = save_checkpoint

    def full(directory: Path, *args: Any, **kwargs: Any) -> None:
        def fails(_: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        save(directory, *args, **{**kwargs, "files": fails} if directory.name.endswith("8") else kwargs)

    monkeypatch.setattr(session, "save_checkpoint", full)
    with pytest.raises(AndromedaError, match=r"step-00000008: cannot be written.*No space left.*unchanged"):
        run(recipe)
    output = recipe.parent / "goes-on"
    run(recipe, f"output={output}", "failed_save=go_on")
    assert "No space left on device; what was there before is unchanged" in capsys.readouterr().err
    assert [path.name for path in sorted((output / "checkpoints").iterdir())] == ["step-00000004", "step-00000012"]
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        ours, theirs = (path / "checkpoints" / "step-00000012" / name for path in (output, whole))
        assert ours.read_bytes() == theirs.read_bytes()


class FullDisk:
    """There is no room on it for some open files of this process."""

    def __init__(self, *paths: Path) -> None:
        self.paths, self.before = paths, dict[int, int]()

    def fill(self) -> None:
        for link in Path("/proc/self/fd").iterdir():
            if link.is_symlink() and link.readlink() in self.paths:
                self.before[int(link.name)] = os.dup(int(link.name))
        full = os.open("/dev/full", os.O_WRONLY)
        for number in self.before:
            os.dup2(full, number)
        os.close(full)

    def free(self) -> None:
        while self.before:
            number, before = self.before.popitem()
            os.dup2(before, number)
            os.close(before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has /dev/full")
def test_a_disk_too_full_for_what_is_measured(
    recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What finds no room waits, for a checkpoint too; no line is lost or torn."""
    directory = recipe.parent / "run"
    disk = FullDisk(directory / "metrics.jsonl", directory / "heads.jsonl")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        at_step(patch, 5, disk.fill)
        at_step(patch, 10, disk.free)
        run(recipe, "keep_last=3", "failed_save=go_on")
    warnings = capsys.readouterr().err.splitlines()
    what = "cannot be written: No space left on device; free space: what was measured from step 5 on is not in it"
    named = {name: f"warning: {directory / name}: {what}" for name in ("metrics.jsonl", "heads.jsonl")}
    assert [line for line in warnings if line.startswith("warning")] == [
        *named.values(), f"{named['heads.jsonl']}; training goes on",
    ]  # fmt: skip
    assert_same_run(directory, whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has /dev/full")
def test_weights_are_saved_where_what_is_measured_has_no_room(
    recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = recipe.parent / "run"
    disk = FullDisk(directory / "metrics.jsonl")
    with monkeypatch.context() as patch:
        at_step(patch, 6, disk.fill)
        with pytest.raises(
            AndromedaError, match=r"metrics\.jsonl: cannot be written: No space .* from step 6 on"
        ) as raised:
            run(recipe, "keep_last=3")
        assert "\n" not in str(raised.value)
    for descriptor in disk.before.values():
        os.close(descriptor)
    assert contents(directory) == {name: data for name, data in contents(whole).items() if "step-00000012" not in name}
    assert [line["step"] for line in read_metrics(directory / "metrics.jsonl")] == [2, 4, 5]
    run(recipe, "keep_last=3")
    assert contents(directory) == contents(whole)
    assert [line["step"] for line in read_metrics(directory / "metrics.jsonl")] == [2, 4, 5, 10, 12]


def test_the_best_checkpoint_may_stay(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(session.Session, "_bits_per_byte", lambda *_: next(values))
    directory = run(recipe, "keep_best=true", "keep_last=1", "validate_every=3", "save_every=3")
    assert [path.name for path in sorted((directory / "checkpoints").iterdir())] == ["step-00000006", "step-00000012"]


@pytest.mark.parametrize("seed", range(3))
def test_a_crash_at_any_step_changes_nothing(
    recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    def crash() -> None:
        raise CrashError

    for step in sorted(random.Random(seed).sample(range(1, 13), 3)):
        with monkeypatch.context() as patch:
            at_step(patch, step, crash)
            with pytest.raises(CrashError):
                run(recipe, "keep_last=3")
    assert_same_run(run(recipe, "keep_last=3"), whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_asked_to_stop_it_saves_and_goes_on_exactly(
    recipe: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: signal.raise_signal(number))
        with pytest.raises(SystemExit) as raised:
            run(recipe)
    assert raised.value.code == 128 + number
    directory = recipe.parent / "run"
    assert f"{directory}: stopped by {number.name} at step 7; the same command goes on" in capsys.readouterr().out
    assert (directory / "checkpoints" / "step-00000007").is_dir()
    expected = shutil.copytree(whole, recipe.parent / "whole")
    shutil.rmtree(expected / "checkpoints" / "step-00000004")  # two are kept
    assert_same_run(run(recipe), expected)
    assert f"{directory}: going on from step 7 of 12" in capsys.readouterr().out


DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights cut short": lambda path: os.truncate(path / "model.safetensors", 1000),
    "optimizer cut short": lambda path: os.truncate(path / "training" / "optimizer.safetensors", 1000),
    "a bit of the weights flipped": lambda path: flip(path / "model.safetensors"),
    "a bit of the optimizer flipped": lambda path: flip(path / "training" / "optimizer.safetensors"),
    "a bit of the state flipped": lambda path: flip(path / "training" / "state.json"),
    "no state": lambda path: (path / "training" / "state.json").unlink(),
    "no config": lambda path: (path / "config.json").unlink(),
    "no tokenizer": lambda path: (path / "tokenizer.json").unlink(),
    "another tokenizer": lambda path: (path / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    recipe: Path, whole: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    directory = copied(whole, recipe)
    shutil.rmtree(directory / "checkpoints" / "step-00000012")
    DAMAGE[damage](directory / "checkpoints" / "step-00000008")
    capsys.readouterr()
    run(recipe, "keep_last=3")
    out, err = capsys.readouterr()
    assert err.startswith("warning: ") and "set aside as step-00000008.1.damaged, going on from step-00000004" in err
    assert f"{directory}: going on from step 4 of 12" in out
    shutil.rmtree(directory / "checkpoints" / "step-00000008.1.damaged")
    assert_same_run(directory, whole)


def test_other_data_is_told(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            run(recipe)
    with (recipe.parent / "train.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    capsys.readouterr()
    run(recipe)
    assert "warning: the training data is not what this run began with" in capsys.readouterr().err


LONGER = ("steps: 12", "steps: 40"), ("save_every: 4", "save_every: 3")  # so that kills hit saves too


def test_kill_9(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("save_every: 4", "save_every: 3"))
    kill_and_compare(recipe, kills=1, seed=3)


@pytest.mark.slow
def test_kill_9_twenty_times(recipe: Path) -> None:
    for old, new in LONGER:
        recipe.write_text(recipe.read_text().replace(old, new))
    kill_and_compare(recipe, kills=20, seed=random.SystemRandom().randrange(2**32))
