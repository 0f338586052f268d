"""Stages of a model's life: one goes on from the other, and each goes on exactly after an interruption."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from andromeda.checkpoint import load_checkpoint, run_checkpoints
from andromeda.commands.session import Session
from andromeda.commands.train import train
from andromeda.data.build import build
from andromeda.data.spec import parse_spec
from andromeda.data.stream import Stream
from andromeda.errors import AndromedaError
from andromeda.model import IGNORED
from andromeda.tokenizer import Tokenizer
from andromeda.training.engines import Engine
from andromeda.training.lora import check_lora, load_adapter
from andromeda.training.lora_recipe import LoraRecipe
from andromeda.training.metrics import read_metrics
from andromeda.training.objective import NextToken
from andromeda.training.state import load_state
from tests.commands.quick_training import quick_training
from tests.commands.runs import VERSE, assert_same_run, at_step, refused, write_recipe

pytestmark = pytest.mark.usefixtures("quick")
DPO = """
model: {from: FOLDER/base}
data: {pairs: FOLDER/pairs.jsonl, validation: [FOLDER/validation.txt, FOLDER/held-out.jsonl]}
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
LORA = """
model: {from: FOLDER/base}
data: {train: FOLDER/train.jsonl, validation: FOLDER/validation.txt}
lora: {rank: 4, alpha: 8}
output: FOLDER/lora
steps: 6
batch_size: 2
learning_rate: 0.01
warmup_steps: 1
log_every: 2
validate_every: 3
save_every: 2
"""
LINES = [line for line in VERSE.splitlines() if 8 < len(line) < 40][:36]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model, `base`, of 64 tokens, and pairs that prefer verse to the same backwards."""
    folder = tmp_path_factory.mktemp("base")
    recipe = write_recipe(folder)
    with quick_training():
        train(str(recipe), [f"output={folder / 'base'}", "model.max_seq_len=64", "validate_every=12", "save_every=12"])
    pairs = [{"prompt": line[:4], "chosen": line[4:], "rejected": line[:3:-1]} for line in LINES]
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    (folder / "pairs.jsonl").write_text("".join(lines[:24]), encoding="utf-8")
    (folder / "held-out.jsonl").write_text("".join(lines[24:]), encoding="utf-8")
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "stage.yaml"
    path.write_text(text.replace("FOLDER", str(folder)))
    return path


def newest(run: Path) -> Path:
    return run_checkpoints(run)[0]


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
    validated = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validated] == [3, 6]
    assert validated[1]["validation_loss"] < validated[0]["validation_loss"] < 0.6931
    assert validated[1]["validation_reward_margin"] > 0.05 and validated[1]["validation_reward_accuracy"] > 0.8
    interrupted(recipe, monkeypatch, 3)
    shutil.rmtree(folder / "base")
    train(str(recipe), [])
    assert_same_run(folder / "dpo", folder / "whole")


def test_other_pairs_are_refused_once_the_reference_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, batches = write(folder, DPO), computed(monkeypatch)
    train(str(recipe), ["steps=2"])
    assert {batch[0].shape[1] for batch in batches} == {64}  # of pairs, of what measures the reference, of validation
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(pairs.read_text(encoding="utf-8").splitlines(keepends=True)[1:]))
    with pytest.raises(AndromedaError, match=r"data\.pairs=.* is not what this run began with"):
        train(str(recipe), ["steps=3"])


def test_other_pairs_are_not_held_out_once_the_reference_is_measured(folder: Path) -> None:
    recipe, held_out = write(folder, DPO), folder / "held-out.jsonl"
    train(str(recipe), ["steps=2"])
    held_out.write_text("".join(held_out.read_text(encoding="utf-8").splitlines(keepends=True)[1:]))
    with pytest.raises(AndromedaError, match=r"the pairs of data\.validation=.* are not what this run began with"):
        train(str(recipe), ["steps=3"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model={preset: nano}"], r"data\.pairs=.* needs model\.from"),
        (["data.validation=none.jsonl"], r"none\.jsonl: no such file"),
        (["data.validation=none.parquet"], r"none\.parquet: no such file"),
        (["data.validation=FOLDER/torn.jsonl"], r"torn\.jsonl:13: has no `rejected` \(there are: prompt, chosen\)"),
        (["data.validation=FOLDER/empty.jsonl"], r"empty\.jsonl: no text; name files that hold some"),
        (
            ["data.pairs=[]", "data.train=FOLDER/train.jsonl", "data.validation=FOLDER/held-out.jsonl"],
            r"held-out\.jsonl:1: has no `text`",
        ),
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
        (["tokenizer.path=FOLDER/other"], r"model\.from=.* has another tokenizer than tokenizer\.path="),
    ],
)
def test_mistakes_leave_nothing_behind(folder: Path, overrides: list[str], message: str) -> None:
    recipe = write(folder, DPO)
    if any("other" in override for override in overrides):
        Tokenizer.train([VERSE], 290).save(folder / "other")
    (folder / "empty.jsonl").touch()
    (folder / "torn.jsonl").write_text((folder / "held-out.jsonl").read_text() + '{"prompt": "a", "chosen": "b"}\n')
    with refused(folder, message):
        train(str(recipe), [override.replace("FOLDER", str(folder)) for override in overrides])


@pytest.mark.parametrize(("text", "lost"), [(DPO, "training/reference.safetensors"), (LORA, "adapter")])
def test_what_a_checkpoint_has_lost_is_not_made_up(text: str, lost: str, folder: Path) -> None:
    recipe = write(folder, text)
    train(str(recipe), ["steps=2"])
    path = newest(next(path for path in folder.iterdir() if path.name in ("dpo", "lora"))) / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(AndromedaError, match=r"its checkpoint has no .* any more"):
        train(str(recipe), ["steps=4"])


# ---- conversations -------------------------------------------------------------------------------

SPEC = """
tokenizer: {path: FOLDER/base, chat: CHAT}
sources:
  calls: {synthetic: {task: tool_calls, tools: [1, 1], cases: [one]}, documents: 2}
  talk: {files: [talk.jsonl], licence: own, messages: messages}
stages:
  chat: {seq_len: 2048, epochs: {calls: 1, talk: 1}}
"""
SFT = """
model: {from: FOLDER/base, max_seq_len: 2048}
data: {build: FOLDER/build}
output: FOLDER/sft
batch_size: 1
learning_rate: 0.003
"""
TALK = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is the sea deep?"},
    {"role": "assistant", "content": "It is."}, {"role": "user", "content": "And <|im_end|> wide?"},
    {"role": "assistant", "content": "That too."},
]  # fmt: skip


def build_chats(folder: Path, chat: bool) -> Stream:
    (folder / "talk.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    spec = parse_spec(SPEC.replace("FOLDER", str(folder)).replace("CHAT", str(chat).lower()), "spec.yaml")
    build(spec, folder, folder / "build", lambda *_: None, num_workers=1)
    return Stream(folder / "build")


def computed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches that the loss is computed of."""
    batches: list[Any] = []
    original = NextToken.forward

    def forward(objective: NextToken, batch: Any) -> Any:
        batches.append(batch)
        return original(objective, batch)

    monkeypatch.setattr(NextToken, "forward", forward)
    return batches


def assert_the_assistant_alone_is_learned(batches: list[Any], tokenizer: Tokenizer) -> None:
    """By ids: what is predicted is each answer with the end of its turn, or each call, and no other token."""
    said = []
    end = tokenizer.token_to_id("<|im_end|>")
    for ids, targets, documents in batches:
        for row in range(len(ids)):
            for document in documents[row].unique().tolist():
                own = targets[row][(documents[row] == document) & (targets[row] != IGNORED)].tolist()
                said.append(own)
    answers = sorted(tokenizer.decode(own, skip_special=False) for own in said if own)
    assert [*tokenizer.encode("It is."), end, *tokenizer.encode("That too."), end] in said
    assert len(answers) == 3 and answers[2] == "It is.<|im_end|>That too.<|im_end|>"
    for call in answers[:2]:
        assert call.startswith('<tool_call>{"name": "') and call.endswith("}</tool_call><|im_end|>")
        assert call.count("<|im_end|>") == 1


def test_of_conversations_and_calls_the_assistant_s_tokens_are_learned(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, batches = build_chats(folder, chat=False), computed(monkeypatch)
    train(str(write(folder, SFT)), [])
    assert_the_assistant_alone_is_learned(batches, stream.tokenizer)
    assert Tokenizer.load(newest(folder / "sft")).sha256 == Tokenizer.load(newest(folder / "base")).sha256


def test_a_model_without_a_chat_template_gets_ours_and_rows_for_its_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Tokenizer.train([VERSE], 300, special_tokens=["<|endoftext|>"], tool_tokens=[])
    plain.save(folder / "plain")
    shutil.rmtree(folder / "base")
    keys = [f"output={folder / 'base'}", "tokenizer.vocab_size=null", f"tokenizer.path={folder / 'plain'}"]
    train(str(folder / "tiny.yaml"), [*keys, "steps=2", "model.num_tokens=300", "model.max_seq_len=64"])
    with pytest.raises(AndromedaError, match="no chat template"):
        build_chats(folder, chat=False)
    shutil.rmtree(folder / "build")
    stream, batches = build_chats(folder, chat=True), computed(monkeypatch)
    recipe = write(folder, SFT)
    with pytest.raises(AndromedaError, match=r"the build .* has tokens that are new to model\.from=.* drop `lora`"):
        train(str(recipe), ["lora={rank: 2}"])
    train(str(recipe), ["learning_rate=1e-9"])
    assert_the_assistant_alone_is_learned(batches, stream.tokenizer)
    base, tuned = load_checkpoint(newest(folder / "base")), load_checkpoint(newest(folder / "sft"))
    assert (plain.vocab_size, stream.tokenizer.vocab_size, tuned.config.num_tokens) == (300, 308, 320)
    for before, after in ((base.embedding, tuned.embedding), (base.to_logits, tuned.to_logits)):
        rows, weight = cast(torch.Tensor, before.weight), cast(torch.Tensor, after.weight)
        torch.testing.assert_close(weight[:300], rows, rtol=0, atol=1e-7)
        torch.testing.assert_close(weight[300:308], rows.mean(0).expand(8, -1), rtol=0, atol=1e-6)
    train(str(write(folder, SFT.replace("base", "sft").replace("output: FOLDER/sft", "output: FOLDER/more"))), [])


# ---- a longer context ----------------------------------------------------------------------------


def test_a_model_goes_on_at_another_length(folder: Path) -> None:
    recipe = write(folder, DPO)
    longer = "{from: FOLDER/base, max_seq_len: 128, position_interpolation: 2.0, rotary_base: 20000.0}"
    model = f"model={longer.replace('FOLDER', str(folder))}"
    texts = f"data.train={folder / 'train.jsonl'}", f"data.validation={folder / 'validation.txt'}"
    keys = [model, "data.pairs=[]", *texts, "steps=1"]
    train(str(recipe), keys)
    before, after = (load_checkpoint(next((folder / run / "checkpoints").iterdir())) for run in ("base", "dpo"))
    assert (after.config.max_seq_len, after.config.rotary_base) == (128, 20000.0)
    assert after.config.xpos_scale == before.config.xpos_scale
    assert not torch.equal(after.to_logits.weight, before.to_logits.weight)
    assert read_metrics(folder / "dpo" / "metrics.jsonl")[0]["tokens"] == 2 * 128


# ---- adapters ------------------------------------------------------------------------------------


def test_an_adapter_is_learned_merged_and_opened_by_peft(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    train(str(write(folder, LORA)), [])
    base, tuned = load_checkpoint(newest(folder / "base")), load_checkpoint(newest(folder / "lora"))
    for (name, before), (_, after) in zip(base.named_parameters(), tuned.named_parameters(), strict=True):
        assert torch.equal(before, after) == (name.rsplit(".", 2)[-2] not in LoraRecipe.TARGETS), name
    _, tensors = load_state(newest(folder / "lora"))
    assert {name.rpartition("/")[0].split(".")[-3] for name in tensors if not name.startswith("random")} == {
        "lora_A", "lora_B",
    }  # fmt: skip
    ids = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        opened = peft.PeftModel.from_pretrained(base, newest(folder / "lora") / "adapter")
        torch.testing.assert_close(opened(ids), tuned(ids), rtol=1e-4, atol=1e-4)
        whole = opened.merge_and_unload()
    for ours, theirs in zip(tuned.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.allclose(tuned(ids), load_checkpoint(newest(folder / "base"))(ids), atol=1e-2)


def test_an_adapter_goes_on_exactly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is dropped is drawn again as it was."""
    pytest.importorskip("peft")
    recipe, keys = write(folder, LORA), ["lora.dropout=0.2"]
    train(str(recipe), [f"output={folder / 'whole'}", *keys])
    interrupted(recipe, monkeypatch, 3, *keys)
    train(str(recipe), keys)
    assert_same_run(folder / "lora", folder / "whole")


def test_an_adapter_of_preferences_begins_without_a_margin(folder: Path) -> None:
    pytest.importorskip("peft")
    train(str(write(folder, DPO)), ["lora.rank=2", "lora.targets=[to_qkv]", "optimizer=muon"])
    lines = [line for line in read_metrics(folder / "dpo" / "metrics.jsonl") if "loss" in line]
    assert lines[0]["reward_margin"] == 0.0 and lines[-1]["reward_margin"] > 0


def test_after_bad_steps_an_adapter_goes_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    recipe, accumulate, go_back = write(folder, LORA), Engine.accumulate, Session._go_back
    train(str(recipe), ["steps=4", "schedule=constant"])
    kept, found = load_adapter(newest(folder / "lora")), dict[str, torch.Tensor]()

    def no_number(engine: Engine, *args: Any, **keys: Any) -> Any:
        loss = accumulate(engine, *args, **keys)
        for parameter in engine.model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(float("nan"))
                with torch.no_grad():
                    parameter.add_(1)  # so that there is something to go back from
        return loss

    def going_back(session: Session) -> bool:
        went = go_back(session)
        found.update({name: tensor.clone() for name, tensor in session.engine.weights().items()})
        return went

    monkeypatch.setattr(Engine, "accumulate", no_number)
    monkeypatch.setattr(Session, "_go_back", going_back)
    at_step(monkeypatch, 10, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(str(recipe), ["steps=20", "schedule=constant"])
    assert kept is not None and all(torch.equal(kept[name], found[name]) for name in kept)


def test_the_model_of_an_adapter_must_be_the_same(folder: Path) -> None:
    pytest.importorskip("peft")
    recipe = write(folder, LORA)
    train(str(recipe), ["steps=2"])
    train(str(folder / "tiny.yaml"), [f"output={folder / 'base'}", "model.max_seq_len=64", "steps=14"])
    with pytest.raises(AndromedaError, match=r"model\.from=.* is not the model that this run began with .*embedding"):
        train(str(recipe), ["steps=4"])
    shutil.rmtree(folder / "base")
    with pytest.raises(AndromedaError, match=r"base: no such directory"):
        train(str(recipe), ["steps=4"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.targets=[to_q]"], r"lora\.targets=\['to_q'\] names 'to_q'; use some of to_qkv, to_out, up, down"),
        (["lora.targets=[]"], r"lora\.targets=\[\] names none of"),
        (["lora.rank=0"], r"lora\.rank=0 must be at least 1"),
        (["lora.alpha=-1"], r"lora\.alpha=-1 must be at least 1"),
        (["lora.dropout=1"], r"lora\.dropout=1\.0 must lie in \[0, 1\)"),
        (["lora.ranks=4"], r"no key 'lora\.ranks' in a recipe; did you mean 'lora\.rank'\?"),
        (["lora.rank=many"], r"lora\.rank: must be a whole number; got 'many'"),
        (["lora=3"], r"lora: must be keys with values or null; got '3'"),
        (["model={preset: nano}"], r"recipe: lora\.rank=4 needs model\.from"),
    ],
)
def test_adapters_that_make_no_sense(folder: Path, overrides: list[str], message: str) -> None:
    recipe = write(folder, LORA)
    with refused(folder, message):
        train(str(recipe), overrides)


def test_an_adapter_without_peft_is_refused_before_any_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(folder, LORA)
    monkeypatch.setattr("andromeda.training.lora.find_spec", lambda name: None)
    with refused(folder, "lora needs peft, which is not installed"):
        train(str(recipe), [])


def test_what_is_dropped_is_drawn_by_one_process_alone() -> None:
    check_lora(LoraRecipe(), 2)
    with pytest.raises(AndromedaError, match=r"lora\.dropout=0\.1 draws random numbers in each of 2 processes"):
        check_lora(LoraRecipe(dropout=0.1), 2)
