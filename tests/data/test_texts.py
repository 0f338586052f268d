"""Cleaned documents on disk: the same again, counted, and their prints."""

from __future__ import annotations

import datetime
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.data import texts
from andromeda.data.fields import Document
from andromeda.data.minhash import Near, prints
from andromeda.data.sources import Unread
from andromeda.data.texts import Batch, Lines, Removed, Texts, TextsWriter, from_line, to_line
from andromeda.errors import AndromedaError

ANY_TEXT = st.text(st.characters(), max_size=20)  # lone surrogates too
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(st.dictionaries(ANY_TEXT, JSON, max_size=3), max_size=3).map(tuple)
DOCUMENTS = st.builds(
    Document, ANY_TEXT, text=ANY_TEXT, span=st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9))
) | st.builds(Document, ANY_TEXT, messages=MESSAGES, tools=st.none() | MESSAGES)


@given(DOCUMENTS)
def test_a_line_is_the_document(document: Document) -> None:
    line = to_line(document)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert from_line(line) == document


@pytest.mark.parametrize("value", [datetime.date(1794, 1, 1), b"bytes", {1, 2}, float("nan"), float("-inf")])
def test_what_json_cannot_hold(value: Any) -> None:
    with pytest.raises(AndromedaError, match=r"a\.parquet:3: holds what is no plain JSON value"):
        to_line(Document("a.parquet:3", messages=({"role": "user", "arguments": value},)))


def batch(*names: str, near: Near | None = None) -> Batch:
    documents = [Document(name, text=f"text {name}") for name in names]
    return Batch(
        [to_line(document) for document in documents],
        list(names),
        prints([f"text {name}" for name in names], near),
        [Unread("f:0", "not JSON", "f:0: not\tJSON\nat all")],
        [Removed("f:1", "English", "0 < 0.07")],
        Counter({"line ends": 2}),
        len(names),
    )


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=5), st.sampled_from([None, Near()]), st.integers(1, 4))
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], near: Near | None, block: int
) -> None:
    pytest.importorskip("rensa")
    folder, number = tmp_path_factory.mktemp("texts"), iter(range(100))
    batches = [batch(*(f"f:{next(number)}" for _ in range(size)), near=near) for size in sizes]
    with TextsWriter(folder) as writer:
        for one in batches:
            writer.add(one)
    kept = Texts(folder)
    assert len(kept) == sum(sizes) == kept.facts["num_bytes"]
    assert list(kept.lines()) == [line for one in batches for line in one.lines]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "BLOCK", block)
        read = list(kept.prints(near is not None))
    for name in ("words", "bands", "signatures") if sum(sizes) else ():
        expected = np.concatenate([getattr(one.prints, name) for one in batches])
        assert np.array_equal(np.concatenate([getattr(part, name) for part in read]), expected)
    assert kept.facts["unread"] == ({"not JSON": len(sizes)} if sizes else {})
    assert kept.facts["removed"] == ({"English": len(sizes)} if sizes else {})
    assert kept.facts["changes"] == ({"line ends": 2 * len(sizes)} if sizes else {})
    assert (folder / "unread.txt").read_text() == "not JSON\tf:0: not JSON at all\n" * len(sizes)
    assert (folder / "removed.txt").read_text() == "English\tf:1\t0 < 0.07\n" * len(sizes)


def test_lines_by_number(tmp_path: Path) -> None:
    names = [f"prose/ü{number}.txt" for number in range(40)]
    (tmp_path / "where.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    with Lines(tmp_path / "where.txt") as lines:
        assert [lines[number] for number in (39, 0, 7)] == [names[39], names[0], names[7]]
