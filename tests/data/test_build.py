"""Builds: the same bytes each time, whole or not at all, each token as often as asked, and every change noticed."""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from andromeda.atomic import locked, replace_file
from andromeda.data import build as build_module
from andromeda.data import encode
from andromeda.data.build import build, read_manifest, verify
from andromeda.data.spec import Spec, parse_spec
from andromeda.data.store import write_store
from andromeda.data.stream import Stream
from andromeda.errors import AndromedaError
from andromeda.model import IGNORED

SPEC = """
tokenizer: {vocab_size: 300}
sources:
  verse: {files: [verse/*.jsonl], licence: public domain, text: text}
  sums: {files: [sums.jsonl], licence: MIT, user: "What is {question}?", assistant: answer, bad: skip}
stages:
  short: {seq_len: 16, proportions: {verse: 3, sums: 1}, num_sequences: 61}
  long: {seq_len: 40, epochs: {sums: 2, verse: 1}}
seed: 5
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng, folder = random.Random(0), tmp_path / "corpus"
    (folder / "verse").mkdir(parents=True)
    for name in ("a", "b"):
        poems = [
            " ".join(rng.choices(["tiger", "burning", "bright", "forests"], k=rng.randint(1, 60))) for _ in range(15)
        ]
        write_lines(folder / "verse" / f"{name}.jsonl", [{"text": poem} for poem in poems])
    sums = [{"question": f"{a} + {b}", "answer": a + b} for a in range(5) for b in range(4)]
    write_lines(folder / "sums.jsonl", [*sums[:7], {"question": "?"}, *sums[7:]])
    return folder


def write_lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def spec(text: str = SPEC) -> Spec:
    return parse_spec(text, "spec.yaml")


def built(corpus: Path, out: Path, text: str = SPEC) -> dict[str, Any]:
    return build(spec(text), corpus, out, lambda *_: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the same bytes ------------------------------------------------------------------------------


def test_two_builds_are_the_same_byte_for_byte(corpus: Path, tmp_path: Path) -> None:
    assert built(corpus, tmp_path / "one") == built(corpus, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert verify(tmp_path / "one") == []


@pytest.mark.parametrize("name", ["verse/a.jsonl", "sums.jsonl"])
def test_any_changed_byte_of_the_corpus_changes_the_manifest(corpus: Path, tmp_path: Path, name: str) -> None:
    before = built(corpus, tmp_path / "one")
    data = bytearray((corpus / name).read_bytes())
    data[-2] = ord(" ")  # the last brace: JSON no more, or white space at the end of a line
    (corpus / name).write_bytes(bytes(data) if name == "sums.jsonl" else data[:-2] + b"} \n")
    assert built(corpus, tmp_path / "two")["key"] != before["key"]


def test_a_finished_build_is_left_alone_and_an_other_is_not_replaced(corpus: Path, tmp_path: Path) -> None:
    built(corpus, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    built(corpus, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    with pytest.raises(AndromedaError, match="was begun with another spec, tokenizer or corpus"):
        built(corpus, tmp_path / "out", SPEC.replace("seed: 5", "seed: 6"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("not yours")
    with pytest.raises(AndromedaError, match="mine: holds something else"):
        built(corpus, tmp_path / "mine")


@pytest.mark.parametrize(
    ("module", "part"), [(encode, "write_store"), (build_module, "pack"), (build_module, "replace_file")]
)
def test_a_build_that_failed_goes_on_to_the_same_bytes(
    corpus: Path, tmp_path: Path, module: ModuleType, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(corpus, tmp_path / "whole")
    original, calls = getattr(module, part), Counter[str]()

    def failing(*arguments: Any, **options: Any) -> Any:
        calls[part] += 1
        if calls[part] == 2:
            original(*arguments, **options)
            raise OSError(28, "No space left on device")
        return original(*arguments, **options)

    monkeypatch.setattr(module, part, failing)
    with pytest.raises((AndromedaError, OSError), match="No space left"):
        built(corpus, tmp_path / "cut")
    assert not (tmp_path / "cut" / "manifest.json").exists()
    with pytest.raises(AndromedaError, match=r"holds no manifest\.json"):
        read_manifest(tmp_path / "cut")
    built(corpus, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_build_goes_on_from_whatever_a_kill_left(corpus: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    built(corpus, whole)
    for missing in (["manifest.json", "spec.yaml"], ["manifest.json", "spec.yaml", "build.key"]):
        out.mkdir()
        if "build.key" not in missing:
            built(corpus, out)
        (out / ".build.key.tmp-1").write_text("half")
        (out / "sources" / ".verse.tmp-1").mkdir(parents=True)
        (out / "sources" / ".verse.tmp-1" / "tokens-00000.bin").write_bytes(b"half")
        for name in missing:
            (out / name).unlink(missing_ok=True)
        if "build.key" in missing:
            shutil.rmtree(out / "sources")
        assert built(corpus, out) == read_manifest(whole)
        assert verify(out) == []
        shutil.rmtree(out)


def test_one_process_builds_in_a_directory_at_a_time(corpus: Path, tmp_path: Path) -> None:
    built(corpus, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    with locked(tmp_path / "out" / "build.key"), pytest.raises(AndromedaError, match="out: another process builds"):
        built(corpus, tmp_path / "out")
    built(corpus, tmp_path / "out")
    assert verify(tmp_path / "out") == []


def test_of_two_that_begin_at_once_the_second_is_told(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def begin(text: str) -> str:
        return build_module.begin(spec(text), corpus, tmp_path / "out", 1, lambda *_: None).key

    def second() -> None:
        try:
            told.append(begin(SPEC.replace("seed: 5", "seed: 6")))
        except AndromedaError as error:
            told.append(str(error))

    other = threading.Thread(target=second)

    def slow(path: Path, content: str) -> None:
        if not other.ident:  # of the first
            other.start()
            other.join(0.5)
        replace_file(path, content)

    monkeypatch.setattr(build_module, "replace_file", slow)
    key = begin(SPEC)
    other.join()
    assert (tmp_path / "out" / "build.key").read_text() == f"{key}\n"
    assert len(told) == 1 and "out: was begun with another spec" in told[0]


@pytest.mark.parametrize("content", ["[]", "{", '{"format": 0}', '"'])
def test_a_manifest_that_is_none(corpus: Path, tmp_path: Path, content: str) -> None:
    built(corpus, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text(content)
    with pytest.raises(AndromedaError, match=r"manifest\.json: .*; build it again"):
        Stream(tmp_path / "out")


# ---- what training reads -------------------------------------------------------------------------


def test_each_token_is_learned_as_often_as_the_stage_says(corpus: Path, tmp_path: Path) -> None:
    built(corpus, tmp_path / "out")
    stream = Stream(tmp_path / "out")
    tokenizer, eos = stream.tokenizer, stream.tokenizer.eos_id
    lines = [json.loads(line)["text"] for name in "ab" for line in (corpus / "verse" / f"{name}.jsonl").open()]
    expected = Counter((*tokenizer.encode(poem), eos) for poem in lines)
    seen: Counter[tuple[int, ...]] = Counter()
    asked = Counter[int]()
    for number in range(int(stream.mix.starts[1]), len(stream)):
        shown = stream.sequence(number)
        for piece in shown.pieces:
            targets = shown.targets[piece.first : piece.end].tolist()
            if shown.source == "verse":
                asked.update(targets)
                if piece.start == 0 and targets[-1] == eos:
                    seen[tuple(targets)] += 1
    assert asked == Counter(token for poem, times in expected.items() for _ in range(times) for token in poem)
    assert seen == Counter({poem: times for poem, times in expected.items() if len(poem) <= 40})


def test_of_conversations_only_the_assistant_is_learned(corpus: Path, tmp_path: Path) -> None:
    built(corpus, tmp_path / "out")
    stream = Stream(tmp_path / "out")
    store, tokenizer = stream.stores["sums"], stream.tokenizer
    assert store.facts["num_documents"] == 20
    messages = [{"role": "user", "content": "What is 1 + 3?"}, {"role": "assistant", "content": "4"}]
    ids, mask = tokenizer.encode_chat_with_mask(messages)
    which = next(n for n in range(20) if store.piece(n, 0, len(ids) + 1)[0][1:].tolist() == ids)
    given, following, learned = store.piece(which, 0, len(ids) + 1)
    assert given.tolist() == [tokenizer.eos_id, *ids]
    assert following.tolist() == [*ids, tokenizer.eos_id]
    assert learned.tolist() == [*mask, mask[-1]]
    assert 0 < sum(mask) < len(mask)
    assert store.where(which) == "sums.jsonl:9"  # behind the line that was left out


def test_batches_are_their_sequences_whoever_reads_them(corpus: Path, tmp_path: Path) -> None:
    built(corpus, tmp_path / "out")
    stream = Stream(tmp_path / "out", check=True)
    batch = stream.batch(3, 5)
    for row, number in enumerate(range(3, 8)):
        shown = stream.sequence(number)
        assert torch.equal(batch.ids[row], torch.from_numpy(shown.ids))
        assert torch.equal(batch.targets[row], torch.from_numpy(shown.targets))
        assert batch.documents is not None
        assert torch.equal(batch.documents[row], torch.from_numpy(shown.documents))
        filled = shown.pieces[-1].end
        assert (shown.targets[filled:] == IGNORED).all()
        assert len(set(shown.documents.tolist())) == len(shown.pieces) + (filled < 16)
    border = int(stream.mix.starts[1])
    with pytest.raises(AndromedaError, match="are of several lengths"):
        stream.batch(border - 1, 2)
    with pytest.raises(IndexError):
        stream.sequence(len(stream))


def test_shards_hold_whole_documents(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(corpus, tmp_path / "one")
    original = write_store
    monkeypatch.setattr(encode, "write_store", lambda *a, **k: original(*a, **k, shard_tokens=100))
    built(corpus, tmp_path / "many")
    assert len(list((tmp_path / "many" / "sources" / "verse").glob("tokens-*.bin"))) > 3
    one, many = Stream(tmp_path / "one"), Stream(tmp_path / "many")
    for number in range(len(one)):
        for name in ("ids", "targets", "documents"):
            assert np.array_equal(getattr(one.sequence(number), name), getattr(many.sequence(number), name))


def test_what_was_left_out_is_counted_and_listed(corpus: Path, tmp_path: Path) -> None:
    manifest = built(corpus, tmp_path / "out")
    assert manifest["sources"]["sums"]["unread"] == {"no `answer`": 1}
    listed = (tmp_path / "out" / "sources" / "sums" / "unread.txt").read_text()
    assert listed == "no `answer`\tsums.jsonl:8: has no `answer` (there are: question)\n"
    with pytest.raises(AndromedaError, match=r"source sums: sums\.jsonl:8: has no `answer`"):
        built(corpus, tmp_path / "strict", SPEC.replace(", bad: skip", ""))


# ---- damage --------------------------------------------------------------------------------------


def test_a_flipped_byte_a_cut_and_a_stranger_are_named(corpus: Path, tmp_path: Path) -> None:
    built(corpus, tmp_path / "out")
    for path in sorted(
        path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != "manifest.json"
    ):
        name, data = path.relative_to(tmp_path / "out").as_posix(), path.read_bytes()
        if not data:
            continue
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert verify(tmp_path / "out") == [f"{name}: is not what was built"]
        path.write_bytes(data[:-1])
        assert verify(tmp_path / "out") == [f"{name}: is not what was built"]
        with pytest.raises(AndromedaError, match=re.escape(path.name)):
            Stream(tmp_path / "out", check=True)
        path.unlink()
        assert verify(tmp_path / "out") == [f"{name}: is missing"]
        path.write_bytes(data)
    (tmp_path / "out" / "sources" / "extra.bin").write_bytes(b"?")
    assert verify(tmp_path / "out") == ["sources/extra.bin: was not built"]


def test_a_shard_cut_short_is_noticed_without_reading_it(corpus: Path, tmp_path: Path) -> None:
    built(corpus, tmp_path / "out")
    shard = tmp_path / "out" / "sources" / "verse" / "tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(AndromedaError, match=r"tokens-00000\.bin: must have .* bytes; found"):
        Stream(tmp_path / "out")
