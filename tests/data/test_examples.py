"""Examples of tasks: what is read, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from andromeda.data.examples import read_examples
from andromeda.errors import AndromedaError


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_records_of_all_files_in_their_order(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", {"q": "what?", "who": "I", "n": 3}, {"q": "why?", "who": "you", "n": [1.5]})
    two = write(tmp_path / "two.jsonl", {"q": "where?", "who": "we", "n": False})
    found = read_examples([one, two], "{who}: {q}", "n")
    assert [(x.text, x.target) for x in found] == [("I: what?", 3), ("you: why?", [1.5]), ("we: where?", False)]
    assert [x.where for x in found] == [f"{one}:1", f"{one}:2", f"{two}:1"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"a\.jsonl: holds no example"),
        ([{"q": "what?"}], r"a\.jsonl:1: has no `n` \(there are: q\)"),
        ([{"q": "what?", "n": None}], r"a\.jsonl:1: has no `n`"),
        ([{"q": "a", "n": 1}, {"p": "what?", "n": 1}], r"a\.jsonl:2: has no `q` \(there are: p, n\)"),
        ([{"q": " \n", "n": 1}], r"a\.jsonl:1: `q` is empty"),
        ([{"q": {}, "n": 1}], r"a\.jsonl:1: `q` is a dict; it must be text"),
        ([3], r"a\.jsonl:1: is a int"),
    ],
)
def test_mistakes_in_one_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(AndromedaError, match=message) as raised:
        read_examples([path], "q", "n")
    assert "\n" not in str(raised.value)


def test_files_of_other_kinds_or_none(tmp_path: Path) -> None:
    with pytest.raises(AndromedaError, match=r"none\.jsonl: no such file"):
        read_examples([tmp_path / "none.jsonl"], "q", "n")
    with pytest.raises(AndromedaError, match=r"a\.txt: unknown kind of file; examples are \.jsonl or \.parquet"):
        read_examples([tmp_path / "a.txt"], "q", "n")
    with pytest.raises(AndromedaError, match="is no template"):
        read_examples([write(tmp_path / "a.jsonl", {"q": "a", "n": 1})], "{q", "n")
