"""`andromeda train` on a build of data: its sequences in its order, each once, whatever comes in between."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from andromeda.checkpoint import load_checkpoint, run_checkpoints
from andromeda.cli import main
from andromeda.commands.train import train
from andromeda.commands.training_data import build_steps
from andromeda.config import preset
from andromeda.data.build import build
from andromeda.data.spec import parse_spec
from andromeda.data.stream import Stream
from andromeda.data.windows import Batch
from andromeda.errors import AndromedaError
from andromeda.model import IGNORED, Andromeda
from andromeda.tokenizer import Tokenizer
from andromeda.training.metrics import read_metrics
from andromeda.training.objective import NextToken
from andromeda.training.recipe import read_recipe
from andromeda.training.state import load_counts
from tests.commands.quick_training import quick_training
from tests.commands.runs import assert_same_run, at_step, kill_and_compare, refused
from tests.quick import quick

pytestmark = pytest.mark.usefixtures("quick")
VERSE = (Path(__file__).parents[2] / "examples" / "verse" / "validation.txt").read_text(encoding="utf-8")
SPEC = """
tokenizer: {vocab_size: 300}
sources:
  verse: {files: [verse.jsonl], licence: public domain}
  sums: {files: [sums.jsonl], licence: MIT, user: question, assistant: answer}
stages:
  short: {seq_len: 16, proportions: {verse: 3, sums: 1}, num_sequences: 35}
  middle: {seq_len: 16, proportions: {sums: 1}, num_sequences: 4}
  long: {seq_len: 48, proportions: {verse: 1, sums: 1}, num_sequences: 11}
"""
RECIPE = """
model: {preset: nano, dim: 32, depth: 2, heads: 4, alibi_num_heads: 2, dim_head: 8}
data: {build: FOLDER/build, validation: FOLDER/validation.txt}
output: FOLDER/run
batch_size: 1
accumulate: 2
learning_rate: 0.01
warmup_steps: 3
log_every: 2
validate_every: 7
save_every: 4
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    words = VERSE.split()[:600]
    phrases = [{"text": " ".join(words[place : place + 3])} for place in range(0, len(words), 3)]
    sums = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(8) for b in range(6)]
    for name, records in (("verse", phrases), ("sums", sums)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, seed in (("build", 0), ("other", 1)):
        build(parse_spec(f"{SPEC}seed: {seed}\n", "spec.yaml"), folder, folder / name, lambda *_: None)
    return folder


@pytest.fixture
def recipe(built: Path, tmp_path: Path) -> Path:
    return write_recipe(built, tmp_path)


def write_recipe(built: Path, folder: Path) -> Path:
    shutil.copytree(built / "build", folder / "build")
    (folder / "validation.txt").write_text(VERSE[-1200:])
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("FOLDER", str(folder)))
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    return reading(monkeypatch)


def reading(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What the loss was computed of in training, batch by batch."""
    batches: list[Batch] = []
    original = NextToken.__call__

    def computing(objective: NextToken, batch: Batch) -> Tensor:
        if torch.is_grad_enabled():
            batches.append(Batch(*batch))
        return original(objective, batch)

    monkeypatch.setattr(NextToken, "__call__", computing)
    return batches


class Whole(NamedTuple):
    """A run that nothing disturbed, and what it has read."""

    directory: Path
    read: list[Batch]


@pytest.fixture(scope="module")
def whole(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    with quick_training(), pytest.MonkeyPatch.context() as patch:
        batches = reading(patch)
        return Whole(run(write_recipe(built, tmp_path_factory.mktemp("whole"))), batches)


def run(recipe: Path, *overrides: str) -> Path:
    """Trains; returns the run directory."""
    train(str(recipe), list(overrides))
    outputs = [override.removeprefix("output=") for override in overrides if override.startswith("output=")]
    return Path(outputs[-1]) if outputs else recipe.parent / "run"


def stopped(recipe: Path, monkeypatch: pytest.MonkeyPatch, step: int, *overrides: str) -> None:
    """Trains, and is asked to stop in the middle of a step."""
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            run(recipe, *overrides)


def rows(batches: list[Batch]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """ids, targets and documents of each sequence."""
    return [row for batch in batches for row in zip(*(part for part in batch if part is not None), strict=True)]


def assert_is_stream(batches: list[Batch], stream: Stream) -> None:
    """All of the stream, in its order."""
    found = rows(batches)
    assert len(found) == len(stream)
    for number, (ids, targets, documents) in enumerate(found):
        expected = stream.sequence(number)
        assert torch.equal(ids, torch.from_numpy(expected.ids))
        assert torch.equal(targets, torch.from_numpy(expected.targets))
        assert torch.equal(documents, torch.from_numpy(expected.documents))


# ---- what is read --------------------------------------------------------------------------------


def test_the_build_is_read_in_its_order_once(
    recipe: Path, read: list[Batch], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, stream = run(recipe), Stream(recipe.parent / "build")
    assert_is_stream(read, stream)
    sizes = [tuple(batch.ids.shape) for batch in read]
    assert sizes == [(3, 16)] * 11 + [(2, 16), (3, 16), (1, 16)] + [(1, 48)] * 11  # 35, 4 and 11 sequences
    newest = directory / "checkpoints" / "step-00000013"
    state = load_counts(newest)
    assert (state.step, state.sequence, state.data_key) == (13, len(stream), stream.key)
    learned = sum(int((batch.targets != IGNORED).sum()) for batch in read)
    assert 0 < learned < sum(batch.targets.numel() for batch in read) - 100  # questions and padding are not learned
    lines = read_metrics(directory / "metrics.jsonl")
    assert lines[-1]["tokens"] == state.tokens == learned
    assert [line["step"] for line in lines if "validation_bits_per_byte" in line] == [7, 13]
    assert Tokenizer.load(newest).sha256 == stream.tokenizer.sha256
    assert load_checkpoint(newest).config.max_seq_len == 48
    out = capsys.readouterr().out
    assert "in 50 sequences of 16 and 48, validation on" in out and "13 steps of 96 tokens" in out
    run(recipe)
    assert "finished already, at step 13" in capsys.readouterr().out


def test_the_loss_is_the_mean_over_what_the_assistant_says(recipe: Path, read: list[Batch]) -> None:
    directory = run(recipe, "steps=1", "log_every=1", "learning_rate=1e-9", "weight_decay=0")
    model = load_checkpoint(directory / "checkpoints" / "step-00000001")
    with torch.inference_mode():
        losses = [model.token_losses(ids, targets, documents=documents) for ids, targets, documents in read]
    learned = torch.cat([targets for _, targets, _ in read]) != IGNORED
    assert 0 < learned.sum() < learned.numel()
    expected = torch.cat(losses)[learned].mean().item()
    assert read_metrics(directory / "metrics.jsonl")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_of_a_conversation_the_answers_alone_are_learned(built: Path, whole: Whole) -> None:
    stream, said = Stream(built / "build"), ""
    for number, (_, targets, _) in enumerate(rows(whole.read)):
        if stream.sequence(number).source == "sums":
            said += stream.tokenizer.decode(targets[targets != IGNORED].tolist(), skip_special=False)
    assert re.fullmatch(r"(\d|<\|im_end\|>)+", said)  # a cut may come anywhere
    assert said.count("<|im_end|>") > 10


def test_show_prints_the_very_sequence(built: Path, whole: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, read = Tokenizer.load(built / "build" / "tokenizer"), rows(whole.read)
    for number in range(0, len(read), 3):
        ids, targets, documents = read[number]
        capsys.readouterr()
        assert main(["data", "show", str(built / "build"), "--sequence", str(number)]) == 0
        said = capsys.readouterr().out
        pieces = re.findall(r"^--- tokens (\d+) to (\d+): .*, (\d+) of \d+ targets learned\n", said, re.MULTILINE)
        texts = re.split(r"^--- .*\n", said, flags=re.MULTILINE)[1:]
        for piece, ((first, last, learned), text) in enumerate(zip(pieces, texts, strict=False)):
            part = slice(int(first), int(last) + 1)
            assert (documents[part] == piece).all()
            assert int((targets[part] != IGNORED).sum()) == int(learned)
            assert text == tokenizer.decode(ids[part].tolist(), skip_special=False) + "\n"
        padding = len(ids) - int(pieces[-1][1]) - 1
        assert said.endswith(f"--- {padding} tokens of padding\n" if padding > 1 else said[-1:])
        assert (targets[len(ids) - padding :] == IGNORED).all()


@pytest.mark.parametrize("keys", [{}, {"shift_tokens": 3, "rotary_heads": "all"}, {"use_abs_pos_emb": True}])
def test_no_document_of_a_sequence_moves_another(built: Path, keys: dict[str, object]) -> None:
    """Neither through attention, nor token shift, nor positions."""
    stream = Stream(built / "build")
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 2, "heads": 4, "alibi_num_heads": 2, "dim_head": 8, "num_tokens": 320}
    model = Andromeda(preset("nano", max_seq_len=48, **sizes, **keys)).double()
    batch = stream.batch(int(stream.mix.starts[2]), 8)
    assert batch.documents is not None
    packed = [row for row in range(8) if batch.documents[row].max() >= 2]
    assert len(packed) > 2
    with torch.inference_mode():
        before = model(batch.ids, documents=batch.documents)
        for document in range(int(batch.documents.max()) + 1):
            inside = batch.documents == document
            after = model(torch.where(inside, batch.ids.flip(1), batch.ids), documents=batch.documents)
            assert torch.equal(after[~inside], before[~inside])
            assert not torch.equal(after[inside], before[inside])


# ---- interrupted and changed ---------------------------------------------------------------------


@pytest.mark.parametrize("step", quick([3, 6, 7, 9], [6, 9]))
def test_stopped_before_at_and_behind_a_border_it_goes_on_exactly(
    recipe: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    stopped(recipe, monkeypatch, step)
    assert_same_run(run(recipe), whole.directory)


@pytest.mark.parametrize(
    ("step", "keys", "steps"), [(2, "batch_size=3", 7), (4, "accumulate=1", 21), (8, "batch_size=2", 11)]
)
def test_another_batch_size_goes_on_in_the_same_order(
    recipe: Path, read: list[Batch], monkeypatch: pytest.MonkeyPatch, step: int, keys: str, steps: int
) -> None:
    stopped(recipe, monkeypatch, step)
    newest = run_checkpoints(run(recipe, keys))[0]
    stream = Stream(recipe.parent / "build")
    assert_is_stream(read, stream)
    assert load_counts(newest).sequence == len(stream)
    assert newest.name == f"step-{steps:08d}" != "step-00000013"


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_shares_of_processes_are_the_global_batch(recipe: Path, ranks: int) -> None:
    stream = Stream(recipe.parent / "build")
    steps, sequence = build_steps(read_recipe(recipe), stream), 0
    readers = [Stream(recipe.parent / "build") for _ in range(ranks)]
    while sequence < len(stream):
        step = steps.at(sequence)
        shares = [step.share(rank, ranks) for rank in range(ranks)]
        parts = [reader.batch(s.first, s.count) for reader, s in zip(readers, shares, strict=True) if s.count]
        for name in Batch._fields:
            together = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(together, getattr(stream.batch(step.first, step.count), name))
        sequence += step.count


def test_another_build_is_refused_and_the_same_one_elsewhere_is_not(
    recipe: Path, built: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(recipe, monkeypatch, 5)
    message = r"run: this run trains on the build with the manifest [0-9a-f]{12}, and .*other has [0-9a-f]{12}; name"
    with refused(recipe.parent, message):
        run(recipe, f"data.build={built / 'other'}")
    (recipe.parent / "build").rename(recipe.parent / "moved")
    assert_same_run(run(recipe, f"data.build={recipe.parent / 'moved'}"), whole.directory)


@pytest.mark.slow
def test_kill_9(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("save_every: 4", "save_every: 3"))
    kill_and_compare(recipe, kills=3, seed=4)


@pytest.mark.slow
def test_kill_9_twenty_times(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("save_every: 4", "save_every: 1"))
    kill_and_compare(recipe, kills=20, seed=random.SystemRandom().randrange(2**32))


# ---- refused before anything is written ----------------------------------------------------------


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, path.stat().st_size - 2), Path.unlink])
@pytest.mark.parametrize("name", ["sources/verse/tokens-00000.bin", "packs/sums-48/starts.npy", "spec.yaml"])
def test_a_damaged_build_is_named_before_training(recipe: Path, damage: Callable[[Path], object], name: str) -> None:
    damage(recipe.parent / "build" / name)
    with refused(recipe.parent, rf"build: {re.escape(name)}: is (not what was built|missing); build it"):
        run(recipe)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.build=none"], r"none: holds no manifest\.json; build it with `andromeda data build`"),
        (["steps=14"], r"steps=14 is more than the 13 that .*build has for this batch_size"),
        (["batch_size=2", "steps=8"], r"steps=8 is more than the 7 that"),
        (["model.max_seq_len=32"], r"has sequences of 48 tokens, more than the model's max_seq_len=32"),
        (["model.num_tokens=299"], r"the tokenizer has 300 tokens, more than the model's num_tokens=299"),
        (["data.validation=none.txt"], r"none\.txt: no such file"),
    ],
)
def test_mistakes_leave_nothing_behind(recipe: Path, overrides: list[str], message: str) -> None:
    with refused(recipe.parent, message):
        run(recipe, *overrides)


def test_a_model_goes_on_with_its_own_tokenizer(recipe: Path) -> None:
    directory = run(recipe, "steps=1")
    origin, output = f"model={{from: {directory}}}", f"output={recipe.parent / 'tuned'}"
    tuned = run(recipe, origin, output, "steps=2")
    assert load_counts(tuned / "checkpoints" / "step-00000002").step == 2
    other = directory / "checkpoints" / "step-00000001"
    Tokenizer.train([VERSE], 290).save(other)
    with pytest.raises(AndromedaError, match=r"model\.from=.* has another tokenizer than the build .*build; build"):
        run(recipe, origin, f"output={recipe.parent / 'else'}")
