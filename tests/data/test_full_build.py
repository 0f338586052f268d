"""Builds with every stage: cleaned, deduplicated across sources, decontaminated, with tasks, by several processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.data import across, encode, sift, workers
from andromeda.data import build as build_module
from andromeda.data.build import build, verify
from andromeda.data.spec import parse_spec
from andromeda.data.stream import Stream
from andromeda.data.synthetic import Chat, Text, make_task, sample
from andromeda.errors import AndromedaError

pytest.importorskip("rensa")

SPEC = """
tokenizer: {vocab_size: 400}
clean: {redact: [emails], min_english: 0.02}
dedup: near
decontaminate: {files: [test/*.jsonl]}
sources:
  scraps: {files: [scraps.jsonl], licence: unknown, priority: low}
  verse: {files: [verse/*.jsonl], licence: public domain, priority: high}
  prose: {files: [prose.jsonl], licence: MIT, dedup: off, clean: off}
  chats: {files: [chats.jsonl], licence: MIT, messages: messages, dedup: exact, bad: skip}
  sums: {synthetic: {task: arithmetic, digits: [1, 2]}, documents: 300}
  calls: {synthetic: {task: tool_calls, tools: [1, 3]}, documents: 12, priority: high}
stages:
  short: {seq_len: 64, epochs: {verse: 1, scraps: 1, prose: 1, sums: 1}}
  long: {seq_len: 512, epochs: {verse: 1, chats: 2, calls: 1}}
seed: 3
"""
WORDS = ["the tiger", "and", "burning", "bright", "in the forests", "of", "the night", "what", "immortal", "hand", "or"]
SECRET = "blake@lambeth.co.uk"
QUESTION = "natalia sold clips to forty eight of her friends in april and then she sold half as many in may"


def poem(draw: random.Random) -> str:
    return "\n".join(" ".join(draw.choices(WORDS, k=6)) + f" {draw.randint(0, 10**6)}" for _ in range(8))


def lines(path: Path, *records: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def exchange(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw, folder = random.Random(0), tmp_path_factory.mktemp("corpus")
    poems = [poem(draw) for _ in range(30)]
    lines(folder / "verse" / "a.jsonl", *({"text": text} for text in poems[:20]), {"text": "dirty\r\ncopy and so on"})
    lines(folder / "verse" / "b.jsonl", {"text": f"write to {SECRET} about the tiger"}, {"text": poems[0].upper()})
    changed = poems[1].replace("bright", "dim", 1)
    lines(
        folder / "scraps.jsonl", {"text": poems[2]}, {"text": changed}, {"text": f"A riddle: {QUESTION}?"},
        {"text": "Wer reitet so spät durch Nacht und Wind"}, *({"text": text} for text in poems[20:]), {"text": " "},
    )  # fmt: skip
    lines(folder / "prose.jsonl", {"text": poems[3]}, {"text": poems[3]}, {"text": f"kept\r\n {SECRET}"})
    lines(
        folder / "chats.jsonl", exchange("Where is the tiger?", "In the forests of the night."), {"messages": []},
        exchange("where is THE tiger", "in the forests of the night!"), exchange("What is it?", "It is bright."),
        {"messages": [{"role": "assistant", "content": f"The answer: {QUESTION}"}]},
    )  # fmt: skip
    lines(folder / "test" / "questions.jsonl", {"id": 1, "question": QUESTION}, {"question": "too short"})
    return folder


def built(corpus: Path, out: Path, num_workers: int = 1, text: str = SPEC) -> dict[str, Any]:
    return build(parse_spec(text, "spec.yaml"), corpus, out, lambda *_: None, num_workers)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "whole"
    built(corpus, out)
    return out


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "HERE", 0)
    for module in (sift, encode):
        monkeypatch.setattr(module, "BATCH_BYTES", 2000)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts(stream: Stream, name: str) -> list[str]:
    store = stream.stores[name]
    pieces = (store.piece(number, 0, int(length))[0][1:] for number, length in enumerate(store.lengths))
    return [stream.tokenizer.decode(ids.tolist(), skip_special=False) for ids in pieces]


def listed(folder: Path, name: str, file: str = "removed.txt") -> list[list[str]]:
    return [line.split("\t") for line in (folder / "sources" / name / file).read_text().splitlines()]


# ---- what is built -------------------------------------------------------------------------------


def test_duplicates_go_from_the_source_of_lower_priority_and_say_what_they_repeat(whole: Path) -> None:
    assert listed(whole, "verse") == [["duplicate", "verse/b.jsonl:2", "of verse: verse/a.jsonl:1"]]
    *_, same, near = listed(whole, "scraps")
    assert same == ["duplicate", "scraps.jsonl:1", "of verse: verse/a.jsonl:3"]
    assert near[:2] == ["near-duplicate", "scraps.jsonl:2"]
    assert near[2].startswith("of verse: verse/a.jsonl:2, similarity 0.")
    assert listed(whole, "prose") == []
    assert listed(whole, "chats")[-1] == ["duplicate", "chats.jsonl:3", "of chats: chats.jsonl:1"]


def test_what_is_cleaned_is_what_is_tokenised(whole: Path) -> None:
    stream = Stream(whole, check=True)
    assert texts(stream, "verse")[-2:] == ["dirty\ncopy and so on", "write to [e-mail address] about the tiger"]
    assert stream.manifest["sources"]["verse"]["changes"] == {"e-mail address": 1, "line ends": 1}
    assert texts(stream, "prose")[-1] == f"kept\r\n {SECRET}"
    assert stream.manifest["sources"]["prose"]["changes"] == {}
    assert listed(whole, "scraps")[1][:2] == ["English", "scraps.jsonl:4"]
    assert all(SECRET.encode() not in data for name, data in contents(whole).items() if "/verse" in name)


def test_evaluation_texts_are_in_no_source(whole: Path) -> None:
    shared = " ".join(QUESTION.split()[:13])
    assert listed(whole, "scraps")[0] == ["evaluation text", "scraps.jsonl:3", f"test/questions.jsonl:1: {shared}"]
    assert listed(whole, "chats")[0][:2] == ["evaluation text", "chats.jsonl:5"]
    stream = Stream(whole)
    assert not any("natalia" in text for name in ("scraps", "chats") for text in texts(stream, name))
    found = stream.manifest["evaluations"]
    assert (found["texts"], found["too_short"]) == (1, 2)


def test_all_that_was_read_is_there_or_listed_and_counted(whole: Path) -> None:
    read = {"scraps": 15, "verse": 23, "prose": 3, "chats": 5, "sums": 300, "calls": 12}
    for name, facts in Stream(whole).manifest["sources"].items():
        assert facts["removed"] == Counter(line[0] for line in listed(whole, name))
        assert facts["unread"] == Counter(line[0] for line in listed(whole, name, "unread.txt"))
        left_out = sum(facts["removed"].values()) + sum(facts["unread"].values())
        assert facts["num_documents"] + left_out == read[name]
    assert listed(whole, "scraps", "unread.txt") == [["empty", "scraps.jsonl:15: no text"]]
    assert not (whole / ".work").exists()


def test_of_a_task_only_the_answer_is_learned_and_its_prompt_is_encoded_as_when_asked(whole: Path) -> None:
    stream, task = Stream(whole), make_task("arithmetic", digits=[1, 2])
    store, tokenizer, seen = stream.stores["sums"], stream.tokenizer, set()
    for number in range(len(store)):
        body = sample(task, "train", 3, int(store.where(number).removeprefix("arithmetic:"))).body
        assert isinstance(body, Text)
        ids, following, learned = store.piece(number, 0, int(store.lengths[number]))
        prompt = tokenizer.encode(body.prompt)
        assert ids[1 : 1 + len(prompt)].tolist() == prompt
        assert tokenizer.decode(ids[1:].tolist()) == body.text
        assert learned.tolist() == [place >= len(prompt) for place in range(len(ids))]
        assert following[-1] == tokenizer.eos_id
        seen.add(body.text)
    assert len(seen) == len(store) < 300, "there are fewer such sums than were asked for"
    assert sum(line[0] == "duplicate" for line in listed(whole, "sums")) == 300 - len(store)


def test_tool_calls_are_conversations(whole: Path) -> None:
    stream, task = Stream(whole), make_task("tool_calls", tools=[1, 3])
    store = stream.stores["calls"]
    for number in range(len(store)):
        body = sample(task, "train", 3, number).body
        assert isinstance(body, Chat)
        ids, mask = stream.tokenizer.encode_chat_with_mask(body.messages, body.tools)
        found, _, learned = store.piece(number, 0, len(ids) + 1)
        assert found[1:].tolist() == ids
        assert learned[:-1].tolist() == mask


def test_what_is_in_nothing_but_a_removed_document_is_no_token(whole: Path) -> None:
    """The vocabulary is trained on what stays."""
    tokenizer = Stream(whole).tokenizer
    assert len(tokenizer.encode(" natalia")) > 4
    assert len(tokenizer.encode(" burning")) == 1


def test_a_vocabulary_of_a_large_corpus_is_trained_on_a_part_of_each_source(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "LEARNED_FROM", 5)
    draw = random.Random(0)
    texts = ["first words " * 5, *(f"xylophone {draw.random()}" for _ in range(30))]
    lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    spec = """
tokenizer: {vocab_size: 300}
sources: {a: {files: [a.jsonl], licence: none}}
stages: {s: {seq_len: 9, epochs: {a: 1}}}
"""
    built(tmp_path, tmp_path / "out", text=spec)
    tokenizer = Stream(tmp_path / "out").tokenizer
    assert len(tokenizer.encode(" words")) < len("words") < len(tokenizer.encode("xylophone"))


@pytest.mark.slow  # so many words that it shows
def test_the_memory_that_a_vocabulary_took_to_train_is_free_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "HERE", 0)
    draw, process = random.Random(0), psutil.Process()
    words = ("".join(draw.choices("abcdefghij", k=9)) for _ in range(200_000))
    lines(tmp_path / "a.jsonl", {"text": " ".join(words)})
    spec = """
tokenizer: {vocab_size: 300}
sources: {a: {files: [a.jsonl], licence: none}}
stages: {s: {seq_len: 9, epochs: {a: 1}}}
"""
    train, kept = build_module._tokenizer, []

    def watched(*arguments: Any) -> None:
        before = process.memory_info().rss
        train(*arguments)
        kept.append(process.memory_info().rss - before)

    monkeypatch.setattr(build_module, "_tokenizer", watched)
    built(tmp_path, tmp_path / "out", 2, spec)
    assert kept[0] < 30 << 20, "bytes; in this process it would be 220 MiB"


@settings(max_examples=10, deadline=None)
@given(st.permutations(["high", "medium", "low"]))
def test_the_higher_priority_keeps_what_stands_in_all(tmp_path_factory: Any, priorities: list[str]) -> None:
    folder, text = tmp_path_factory.mktemp("same"), poem(random.Random(1))
    for name in "abc":
        lines(folder / f"{name}.jsonl", {"text": text}, {"text": f"own words of {name}"})
    sources = "\n".join(
        f"  {name}: {{files: [{name}.jsonl], licence: none, priority: {priority}}}"
        for name, priority in zip("abc", priorities, strict=True)
    )
    stages = "stages: {s: {seq_len: 9, epochs: {a: 1}}}"
    spec = f"tokenizer: {{vocab_size: 300}}\ndedup: exact\nsources:\n{sources}\n{stages}"
    built(folder, folder / "out", text=spec)
    winner = "abc"[priorities.index("high")]
    for name in "abc":
        expected = [] if name == winner else [["duplicate", f"{name}.jsonl:1", f"of {winner}: {winner}.jsonl:1"]]
        assert listed(folder / "out", name) == expected


# ---- the same bytes ------------------------------------------------------------------------------


def test_several_processes_give_the_same_bytes(corpus: Path, whole: Path, tmp_path: Path, small_batches: None) -> None:
    for number in (1, 3):
        built(corpus, tmp_path / str(number), number)
        assert contents(tmp_path / str(number)) == contents(whole)
    assert verify(whole) == []


def test_any_changed_byte_of_an_evaluation_file_changes_the_manifest(corpus: Path, whole: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    path = copy / "test" / "questions.jsonl"
    path.write_text(path.read_text().replace("too short", "too shirt"))
    assert built(copy, tmp_path / "out")["key"] != json.loads((whole / "manifest.json").read_text())["key"]


@pytest.mark.parametrize(
    ("module", "part", "calls"),
    [
        (sift, "TextsWriter", 1), (sift, "TextsWriter", 4), (across, "Index", 1), (encode, "write_store", 5),
        (build_module, "find_duplicates", 1), (shutil, "rmtree", 1), (build_module, "replace_file", 3),
    ],
)  # fmt: skip
def test_a_build_that_failed_goes_on_to_the_same_bytes(
    corpus: Path, whole: Path, tmp_path: Path, module: Any, part: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, made = getattr(module, part), []

    def failing(*arguments: Any, **options: Any) -> Any:
        made.append(part)
        if len(made) == calls:
            raise OSError(28, "No space left on device")
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, part, failing)
        with pytest.raises((AndromedaError, OSError), match="No space left"):
            built(corpus, tmp_path / "cut")
    built(corpus, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(whole)


# ---- killed, interrupted -------------------------------------------------------------------------


def command(corpus: Path, spec: Path, out: Path) -> list[str]:
    (spec).write_text(SPEC)
    script = str(Path(__file__).with_name("kill_build.py"))
    return [sys.executable, script, str(spec), str(out), "--corpus", str(corpus), "--workers", "2"]


STAGES = (
    "build.key", ".work/texts/scraps", ".work/texts/verse", ".work/texts/sums", ".work/texts/calls", ".work/duplicates",
    "tokenizer", "sources/scraps", "sources/chats", "sources/calls", "packs",
)  # fmt: skip


def kill(arguments: list[str], seen: Path) -> list[psutil.Process]:
    """Kills a build soon after this file or folder is there. Returns the processes that it had started."""
    process = psutil.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not seen.exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.05))
    children: list[psutil.Process] = process.children(recursive=True) if process.poll() is None else []
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0), "it failed by itself"
    return children


def kill_and_build(corpus: Path, whole: Path, tmp_path: Path, stage: str) -> None:
    """Kills a build soon after a stage of it is there, and builds again."""
    out = tmp_path / "killed"
    for _ in range(5):
        children = kill(command(corpus, tmp_path / "spec.yaml", out), out / stage)
        assert not psutil.wait_procs(children, timeout=10)[1], "workers outlive the build"
        if not (out / "manifest.json").exists():
            break
        shutil.rmtree(out)  # it was done before
    else:
        raise AssertionError(f"five builds were done before a kill after {stage}")
    built(corpus, out)
    assert contents(out) == contents(whole)


def test_kill(corpus: Path, whole: Path, tmp_path: Path) -> None:
    kill_and_build(corpus, whole, tmp_path, ".work/texts/verse")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [1, 2])
def test_kill_in_every_stage(corpus: Path, whole: Path, tmp_path: Path, stage: str, number: int) -> None:
    kill_and_build(corpus, whole, tmp_path, stage)


@pytest.mark.parametrize("stage", [pytest.param("build.key", marks=pytest.mark.slow), ".work/duplicates"])
def test_control_c_ends_it_in_silence(corpus: Path, tmp_path: Path, stage: str) -> None:
    """While two workers clean, or one trains the vocabulary."""
    arguments = command(corpus, tmp_path / "spec.yaml", tmp_path / "out")
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    least = 3 if stage == "build.key" else 2  # workers, and multiprocessing's own tracker
    while process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        if (tmp_path / "out" / stage).exists() and len(children) >= least:
            break
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2))
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err and "Error" not in err
    assert out == ""
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_a_worker_that_dies_is_told_in_one_line(
    corpus: Path, tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sift.Sift, "__reduce__", lambda self: (os._exit, (9,)), raising=False)
    with pytest.raises(AndromedaError, match=r"^a worker process died, .* run the same command again"):
        built(corpus, tmp_path / "out", 2)


def test_what_is_wrong_is_the_same_with_several_processes(corpus: Path, tmp_path: Path, small_batches: None) -> None:
    strict = SPEC.replace(", bad: skip", "")
    said = set()
    for number in (1, 2):
        with pytest.raises(AndromedaError, match=r"source chats: chats\.jsonl:2: a conversation without") as raised:
            built(corpus, tmp_path / str(number), number, strict)
        said.add(str(raised.value))
    assert len(said) == 1


def test_a_template_that_refuses_is_counted_or_stops(corpus: Path, tmp_path: Path, whole: Path) -> None:
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    tokenizer = shutil.copytree(whole / "tokenizer", tmp_path / "tokenizer")
    (tokenizer / "chat_template.jinja").write_text(
        "{{ raise_exception('no') if messages|length > 1 }}{% generation %}{{ messages[0].content }}{% endgeneration %}"
    )
    spec = f"""
tokenizer: {{path: {tokenizer}}}
sources:
  chats: {{files: [chats.jsonl], licence: MIT, messages: messages, bad: skip}}
stages: {{all: {{seq_len: 64, epochs: {{chats: 1}}}}}}
"""
    facts = built(folder, tmp_path / "out", text=spec)["sources"]["chats"]
    assert (facts["num_documents"], facts["unread"]) == (1, {"no conversation": 3, "no messages": 1})
    assert [line[0] for line in listed(tmp_path / "out", "chats", "unread.txt")] == [
        "no messages",
        *["no conversation"] * 3,
    ]
    lines(folder / "chats.jsonl", exchange("a", "b"))
    with pytest.raises(AndromedaError, match=r"source chats: chats\.jsonl:1: chat template: no"):
        built(folder, tmp_path / "strict", text=spec.replace(", bad: skip", ""))


def test_ids_of_every_size_are_kept(corpus: Path, whole: Path) -> None:
    store = Stream(whole).stores["verse"]
    assert np.diff(store.firsts).sum() == store.facts["num_tokens"] == len(store._tokens[0])
