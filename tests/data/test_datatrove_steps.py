"""A build as pipelines of datatrove, in several tasks, is the build of one machine, byte for byte."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.atomic import locked
from andromeda.data.build import build
from andromeda.data.part import Part
from andromeda.data.parts import Done, folders_of_parts, read_tokens, write_tokens
from andromeda.data.spec import read_spec
from andromeda.data.store import Encoded
from andromeda.errors import AndromedaError

pytest.importorskip("datatrove", reason="the pipelines need datatrove")
pytest.importorskip("rensa")

from datatrove.executor import LocalPipelineExecutor

from andromeda.data.datatrove_steps import Compare, Read, Tokenise, begin

SPEC = """
tokenizer: {vocab_size: 600}
clean: {redact: [emails], min_english: 0.02}
dedup: near
decontaminate: {files: [test.txt]}
sources:
  verse: {files: ['verse/*'], licence: public domain, priority: high, bad: skip, augment: {span_corruption: 0.3}}
  scraps: {files: [scraps.jsonl], licence: unknown}
  chats: {files: [chats.jsonl], licence: MIT, messages: messages, bad: skip}
  sums: {synthetic: {task: arithmetic, digits: [1, 2]}, documents: 101}
stages:
  short: {seq_len: 64, epochs: {verse: 1, scraps: 1, sums: 1}}
  long: {seq_len: 256, epochs: {verse: 1, chats: 2}}
"""
WORDS = ["the tiger", "and", "burning", "bright", "in the forests", "of", "the night", "what", "immortal", "hand", "or"]
QUESTION = "natalia sold clips to forty eight of her friends in april"


def lines(path: Path, *records: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a spec, and what one machine makes of them."""
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
    poems = [" ".join(draw.choices(WORDS, k=40)) + f" {draw.randint(0, 10**6)}" for _ in range(60)]
    for number in range(5):
        texts = [*poems[10 * number : 10 * number + 12], "write to blake@lambeth.co.uk about the tiger"]
        lines(folder / "verse" / f"{number}.jsonl", *({"text": text} for text in texts), {"body": "of another kind"})
    lines(folder / "scraps.jsonl", *({"text": text.upper()} for text in poems[3:60:3]), {"text": f"Then {QUESTION} so"})
    said = [{"role": "user", "content": "Where is the tiger?"}, {"role": "assistant", "content": "In the night."}]
    lines(folder / "chats.jsonl", {"messages": said}, {"messages": said}, {"messages": []})
    (folder / "test.txt").write_text(QUESTION)
    (folder / "spec.yaml").write_text(SPEC)
    built(folder, "whole")
    return folder


def built(folder: Path, name: str) -> dict[str, bytes]:
    out = folder / name
    build(read_spec(folder / "spec.yaml"), folder, out, lambda *_: None, 1)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def run(step: Any, folder: Path, name: str, tasks: int) -> Any:
    made = step(str(folder / "spec.yaml"), str(folder), str(folder / name))
    logs = str(folder / f"logs-{name}" / step.__name__)
    return LocalPipelineExecutor([made], tasks=tasks, workers=1, logging_dir=logs, skip_completed=False).run()


@pytest.mark.parametrize(("read", "tokenise"), [(1, 1), (3, 4), (7, 2)])
def test_tasks_make_what_one_machine_makes(folder: Path, read: int, tokenise: int) -> None:
    name = f"tasks-{read}-{tokenise}"
    begin(str(folder / "spec.yaml"), str(folder), str(folder / name))
    stats = run(Read, folder, name, read)
    run(Compare, folder, name, 1)
    run(Tokenise, folder, name, tokenise)
    parts = sorted(path.name for path in (folder / name / ".work" / "parts" / "tokens" / "verse").iterdir())
    assert parts == [Part(number, tokenise).name for number in range(tokenise)]
    assert not (folder / name / "sources").exists(), "that is the build's"
    assert built(folder, name) == built(folder, "whole")
    facts = json.loads((folder / name / "manifest.json").read_text())["sources"]
    assert facts["verse"]["augmented"] and facts["verse"]["unread"] == {"no `text`": 5}
    assert facts["scraps"]["removed"].keys() >= {"duplicate", "evaluation text"}
    assert stats.stats[0].stats["documents"].total > 100


def test_tasks_that_read_need_not_be_those_that_do_the_rest(folder: Path) -> None:
    begin(str(folder / "spec.yaml"), str(folder), str(folder / "half"))
    run(Read, folder, "half", 3)
    assert built(folder, "half") == built(folder, "whole")


def test_a_join_that_was_killed_is_done_or_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(str(folder / "spec.yaml"), str(folder), str(folder / "killed"))
    run(Read, folder, "killed", 3)
    remove = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        remove(path, **options)
        if "-of-" in path.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        built(folder, "killed")
    monkeypatch.undo()
    assert built(folder, "killed") == built(folder, "whole")


def test_long_documents_are_joined_one_by_one(folder: Path) -> None:
    part = folder / "tokens" / "00000-of-00001"
    counts = [1, 400_000, 3, 0, 300_000, 2]
    done: Done = [
        Encoded(str(number), np.arange(count, dtype=np.uint32), None, count, None)
        for number, count in enumerate(counts)
    ]
    write_tokens([done], part)
    found = list(read_tokens([part]))
    assert [len(item.ids) for items in found for item in items if isinstance(item, Encoded)] == counts
    assert [len(items) for items in found] == [2, 3, 1]


def test_a_part_that_is_missing_is_named(folder: Path) -> None:
    begin(str(folder / "spec.yaml"), str(folder), str(folder / "less"))
    run(Read, folder, "less", 3)
    shutil.rmtree(folder / "less" / ".work" / "parts" / "texts" / "scraps" / "00001-of-00003")
    with pytest.raises(AndromedaError, match=r"scraps: part 00001-of-00003 is missing, 1 in all; run the pipeline"):
        built(folder, "less")
    run(Read, folder, "less", 3)
    assert built(folder, "less") == built(folder, "whole")
    with pytest.raises(AndromedaError, match="holds parts of several pipelines"):
        for name in ("00000-of-00002", "00000-of-00003"):
            (folder / "mixed" / "verse" / name).mkdir(parents=True)
        folders_of_parts(folder / "mixed", "verse")


def test_what_is_called_in_the_wrong_order(folder: Path) -> None:
    with pytest.raises(AndromedaError, match="is no build that was begun; call"):
        run(Read, folder, "never", 2)
    begin(str(folder / "spec.yaml"), str(folder), str(folder / "begun"))
    with pytest.raises(AndromedaError, match="holds no texts to tokenise; run the pipelines of Read and Compare"):
        run(Tokenise, folder, "begun", 2)
    with pytest.raises(AndromedaError, match="compares all with all, so it is one task"):
        run(Compare, folder, "begun", 2)
    with locked(folder / "begun" / "build.key"), pytest.raises(AndromedaError, match="another process builds there"):
        run(Compare, folder, "begun", 1)
    (folder / "begun" / ".work" / "texts").mkdir(parents=True)
    with pytest.raises(AndromedaError, match="run the pipelines of Read and Compare before"):
        run(Tokenise, folder, "begun", 2)


@given(st.integers(1, 40), st.integers(0, 100), st.lists(st.integers(0, 1000), max_size=30))
def test_parts_are_the_whole_in_its_order(tmp_path_factory: Any, count: int, number: int, sizes: list[int]) -> None:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{place:03}" for place in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(b"x" * size)
    parts = [Part(place, count) for place in range(count)]
    assert [item for part in parts for item in part.of(number)] == list(range(number))
    assert [path for part in parts for path in part.of_files(paths)] == paths
    most = max((sum(path.stat().st_size for path in part.of_files(paths)) for part in parts), default=0)
    assert most <= sum(sizes) / count + max(sizes, default=0) + 1
