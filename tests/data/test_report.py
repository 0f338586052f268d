"""The report of a build: its figures are those of the build, with and without a picture."""

from __future__ import annotations

import json
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.data.build import build, verify
from andromeda.data.picture import reason_groups, shares_up_to
from andromeda.data.report import tables, write_report
from andromeda.data.spec import parse_spec
from andromeda.data.stream import Stream

SPEC = """
tokenizer: {vocab_size: 300}
clean: {gopher: {min_words: 3, min_word_length: 1, min_stop_words: 0}}
dedup: exact
sources:
  poems: {files: [poems.jsonl], licence: "a\\n| b", bad: skip}
  sums: {synthetic: {task: arithmetic}, documents: 5}
stages:
  short $x^$: {seq_len: 16, epochs: {poems: 2}}
  long: {seq_len: 64, epochs: {poems: 1, sums: 1}}
"""


@pytest.fixture
def _no_picture() -> None:
    """Here it is drawn."""


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    folder = tmp_path_factory.mktemp("report")
    texts = [
        "tiger tiger burning bright",
        "two words",
        "tiger tiger, burning bright",
        "a\r\nb c d e f g h",
        [5],
        "x " * 60,
    ]
    (folder / "poems.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build(parse_spec(SPEC, "spec.yaml"), folder, folder / "out", lambda *_: None)
    return Stream(folder / "out")


def test_tables_are_of_the_build(stream: Stream) -> None:
    found = {table.title: table for table in tables(stream)}
    poems, sums = stream.stores.values()
    assert found["Sources"].rows == [
        ("poems", "3", f"{int(poems.lengths.sum()):,}", "1", "2", "a\n| b"),
        ("sums", "5", f"{int(sums.lengths.sum()):,}", "0", "0", "generated"),
    ]  # fmt: skip
    reasons = ["`text` is no text", "duplicate", "gopher: words"]
    assert sorted(found["Left out"].rows) == [("poems", reason, "1", "16.67%") for reason in reasons]
    assert ("poems", "line ends", "1") in found["Cleaned"].rows
    stages = [(row[0], row[1], row[2], int(row[3]), row[5]) for row in found["Stages"].rows]
    counts = stream.mix.counts
    assert stages == [
        ("short $x^$", "poems", "16", counts[0, 0], "2"), ("long", "poems", "64", counts[1, 0], "1"),
        ("long", "sums", "64", counts[1, 1], "1"),
    ]  # fmt: skip


def test_the_report_is_no_part_of_what_is_verified(stream: Stream) -> None:
    pytest.importorskip("matplotlib")
    assert write_report(stream)
    text, picture = (stream.folder / "report.md").read_text(), (stream.folder / "report.png").read_bytes()
    assert "![Tokens, lengths, and what was removed](report.png)" in text
    assert "| poems | duplicate | 1 | 16.67% |" in text
    assert r"| a \| b |" in text
    width, height = struct.unpack(">II", picture[16:24])
    assert picture.startswith(b"\x89PNG") and 1000 < width < 1500 and 700 < height < 2000
    assert write_report(stream) and (stream.folder / "report.png").read_bytes() == picture
    assert verify(stream.folder) == []


def test_without_matplotlib(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert not write_report(stream)
    assert "report.png" not in (stream.folder / "report.md").read_text()


@given(st.lists(st.integers(1, 10**6), max_size=30))
def test_shares_are_those_of_the_tokens(lengths: list[int]) -> None:
    borders, shares = shares_up_to(np.array(lengths, np.int64))
    assert len(borders) == len(shares)
    for border, share in zip(borders, shares, strict=True):
        below = sum(length for length in lengths if length < border * (1 - 1e-9))
        at_most = sum(length for length in lengths if length <= border * (1 + 1e-9))
        assert below / sum(lengths) - 1e-9 <= share <= at_most / sum(lengths) + 1e-9
    if lengths:
        assert shares[0] == 0 and shares[-1] == 1 and borders[0] <= min(lengths) <= max(lengths) <= borders[-1]


def test_reasons_are_grouped_by_their_first_word() -> None:
    facts = {
        "unread": {"empty": 2, "not JSON": 1},
        "removed": {"gopher: words": 3, "gopher: hashes": 4, "duplicate": 5},
    }
    assert reason_groups(facts) == Counter({"unread": 3, "gopher": 7, "duplicate": 5})
    assert reason_groups({"unread": {}, "removed": {}}) == Counter()


def test_a_source_without_documents(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "some.jsonl").write_text('{"text": "tiger"}\n')
    spec = SPEC.replace("files: [poems.jsonl]", "files: [some.jsonl]").replace("clean:", "seed: 1 #")
    spec = spec.replace("sources:\n", "sources:\n  none: {files: [none.jsonl], licence: MIT}\n")
    build(parse_spec(spec, "spec.yaml"), tmp_path, tmp_path / "out", lambda *_: None)
    stream = Stream(tmp_path / "out")
    write_report(stream)
    assert "| none | 0 | 0 | 1 | 0 | MIT |" in (tmp_path / "out" / "report.md").read_text()
