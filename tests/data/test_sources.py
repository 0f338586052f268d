"""What of a source's files becomes documents, what does not, and what is said about it."""

from __future__ import annotations

import datetime
import gzip
import json
import lzma
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.data import files, sources
from andromeda.data.fields import Document, Fields
from andromeda.data.json_object import BadRecordError
from andromeda.data.sources import Source, Unread
from andromeda.errors import AndromedaError

TIGER: dict[str, Any] = {"title": "The Tyger", "text": "Tyger Tyger, burning bright,", "year": 1794}
WORM: dict[str, Any] = {"title": "The Worm", "text": "ünïcödé — 虎", "year": 1789}


def zstd(data: bytes) -> bytes:
    module: Any = pytest.importorskip("backports.zstd")
    compressed: bytes = module.compress(data)
    return compressed


COMPRESS: dict[str, Any] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def jsonl(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def read(folder: Path, *patterns: str, bad: Any = "stop", **fields: str) -> list[Document | Unread]:
    source = Source("verse", patterns, "public domain", Fields(**(fields or {"text": "text"})), bad)
    return [document for path in source.paths(folder) for document in source.read(folder, path)]


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESS)
def test_lines_are_documents_and_know_their_place(tmp_path: Path, compression: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f"b.jsonl{compression}").write_bytes(COMPRESS[compression](jsonl(TIGER) + b"\n" + jsonl(WORM)))
    assert read(tmp_path, "**/*.jsonl*") == [
        Document(f"a/b.jsonl{compression}:1", text=TIGER["text"]),
        Document(f"a/b.jsonl{compression}:3", text=WORM["text"]),
    ]


@pytest.mark.parametrize("compression", COMPRESS)
def test_any_other_file_is_a_document(tmp_path: Path, compression: str) -> None:
    (tmp_path / f"tiger.py{compression}").write_bytes(COMPRESS[compression](b"burning = True\n"))
    expected = f"# tiger.py{compression}\nburning = True\n"
    assert read(tmp_path, "*.py*", text="# {path}\n{text}") == [Document(f"tiger.py{compression}", text=expected)]


def test_rows_of_parquet(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [TIGER | {"unused": b"\xff"}, WORM | {"unused": b""}, TIGER | {"text": None, "unused": b""}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second, third = read(tmp_path, "*.parquet", bad="skip", text="{title} ({year}): {text}")
    assert first == Document("a.parquet:1", text="The Tyger (1794): Tyger Tyger, burning bright,")
    assert second == Document("a.parquet:2", text="The Worm (1789): ünïcödé — 虎")
    assert isinstance(third, Unread)
    assert third.reason == "no `text`"


def test_files_come_in_the_order_of_their_names_each_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a.txt", "a/y.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    documents = read(tmp_path, "b.txt", "**/*.txt", "**/*.md")
    assert [document.where for document in documents] == ["a.txt", "a/y.md", "a/z.txt", "b.txt"]


@pytest.mark.parametrize("pattern", ["/etc/*.txt", "../*.txt", "a/../../b.txt"])
def test_a_source_stays_in_its_folder(pattern: str) -> None:
    with pytest.raises(AndromedaError, match=r"source verse: .* must lie in the corpus folder"):
        Source("verse", (pattern,), "none")


def test_a_pattern_without_files_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(AndromedaError, match=r"source verse: no file matches \*\.md in"):
        read(tmp_path, "*.txt", "*.md")


@pytest.mark.parametrize("pattern", ["", ".", "a/", "poems/**b", "a\0b"])
def test_what_is_no_pattern_is_told(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(AndromedaError, match=r"source verse: .*(is no pattern of files|no file matches)"):
        read(tmp_path, pattern)


def test_two_stars_at_the_end_are_all_files_below(tmp_path: Path) -> None:
    (tmp_path / "code" / "inner").mkdir(parents=True)
    (tmp_path / "code" / "inner" / "a.py").write_text("a = 1")
    assert [document.where for document in read(tmp_path, "code/**")] == ["code/inner/a.py"]


def test_linked_folders_are_entered_by_name_and_not_by_two_stars(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.txt").write_text("a")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "linked").symlink_to("../outside")
    assert [document.where for document in read(tmp_path / "corpus", "*/a.txt")] == ["linked/a.txt"]
    with pytest.raises(AndromedaError, match="no file matches"):
        read(tmp_path / "corpus", "**/a.txt")


# ---- fields --------------------------------------------------------------------------------------


def test_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    tools = [{"name": "weather", "parameters": {"type": "object"}}]
    (tmp_path / "a.jsonl").write_bytes(jsonl({"q": "2 + {2}", "a": 4}))
    (tmp_path / "b.jsonl").write_bytes(jsonl({"said": messages, "tools": tools}, {"said": messages, "tools": []}))
    (turns,) = read(tmp_path, "a.jsonl", system="Reckon {{so}}.", user="What is {q}?", assistant="a")
    assert isinstance(turns, Document)
    assert turns.messages == (
        {"role": "system", "content": "Reckon {so}."}, {"role": "user", "content": "What is 2 + {2}?"},
        {"role": "assistant", "content": "4"},
    )  # fmt: skip
    with_tools, without = read(tmp_path, "b.jsonl", messages="said", tools="tools")
    wrapped = {"type": "function", "function": tools[0]}
    assert with_tools == Document("b.jsonl:1", messages=tuple(messages), tools=(wrapped,))
    assert without == Document("b.jsonl:2", messages=tuple(messages))


def test_an_empty_field_leaves_no_blanks_in_a_turn() -> None:
    fields = Fields(user="{instruction}\n\n{input}", assistant="output")
    for asked, said in (("", "Add."), ("2 and 3", "Add.\n\n2 and 3")):
        document = fields.document({"instruction": "Add.", "input": asked, "output": " 5\n"}, "here")
        assert document.messages is not None
        assert [message["content"] for message in document.messages] == [said, " 5\n"]


def test_calls_and_results_come_in_one_form() -> None:
    said = [
        {"role": "user", "content": "A table?"},
        {"role": "assistant", "tool_call": {"name": "find", "arguments": {"n": 2}}},
        {"role": "tool", "name": "find", "content": [{"place": "Café"}]}, {"role": "assistant", "content": "Found."},
    ]  # fmt: skip
    document = Fields(messages="said").document({"said": said}, "here")
    call = {"type": "function", "function": {"name": "find", "arguments": {"n": 2}}}
    assert document.messages == (
        said[0], {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '[{"place": "Café"}]'}, said[3],
    )  # fmt: skip
    again = Fields(messages="said").document({"said": list(document.messages)}, "here")
    assert again.messages == document.messages


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "poet", "content": "a"}, "unknown role"), ({"role": "user"}, "empty message"),
        ({"role": "user", "content": "a", "image": "b"}, "unknown key of a message"),
        ({"role": "user", "content": ["a"]}, "content is no text"),
        ({"role": "user", "tool_call": {"name": "a"}}, "call by another"),
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, "bad call"),
        ({"role": "assistant", "tool_calls": [{"name": "a", "arguments": 3}]}, "bad call"),
        ({"role": "assistant", "tool_calls": [{"name": "a", "parameters": {"n": 2}}]}, "unknown key of a call"),
        ({"role": "assistant", "tool_call": {"function": {"name": "a"}, "arguments": {}}}, "unknown key of a call"),
        ({"role": "assistant", "tool_call": {"function": {"name": "a", "n": 2}}}, "unknown key of a call"),
        ({"role": "assistant", "tool_call": {"name": "a", "arguments": "n = 2"}}, "not JSON"),
        ({"role": "assistant", "tool_call": {"name": "a", "arguments": "[2]"}}, "not an object"),
        ({"role": "assistant", "tool_call": {"name": "a", "arguments": '{"n": 2, "n": 3}'}}, "key twice"),
        ({"role": "assistant", "tool_call": {"name": "a", "arguments": '{"n": NaN}'}}, "no plain JSON"),
        ({"role": "tool", "content": {"n": math.inf}}, "no plain JSON"),
        ({"role": "tool", "content": {"when": datetime.date(1794, 1, 1)}}, "no plain JSON"),
    ],
)  # fmt: skip
def test_nothing_of_a_message_is_lost_in_silence(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecordError) as raised:
        Fields(messages="said").document({"said": [message]}, "here")
    assert raised.value.reason == reason


def test_keys_without_a_value_are_none() -> None:
    """A row of a Parquet file has all keys that any of its rows has."""
    call = {"name": "find", "arguments": "{}", "parameters": None}
    said = [{"role": "user", "content": "Hello", "weight": None}, {"role": "assistant", "tool_call": call}]
    messages = Fields(messages="said").document({"said": said}, "here").messages
    assert messages is not None and messages[0] == {"role": "user", "content": "Hello"}


@pytest.mark.parametrize("tool", [{}, {"function": "find"}, {"function": {"description": "a"}}, {"name": 3}])
def test_a_tool_has_a_name(tool: dict[str, Any]) -> None:
    record = {"said": [{"role": "user", "content": "Hello"}], "tools": [tool]}
    with pytest.raises(BadRecordError, match="here: a tool must be an object with the `name` of a function"):
        Fields(messages="said", tools="tools").document(record, "here")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "got nothing"), ({"text": "a", "messages": "b"}, "got text, messages"), ({"user": "{a}"}, "got user"),
        ({"text": "a", "tools": "b"}, "`tools` belong to a conversation"), ({"text": "{a.b}"}, "'a.b' is not the name"),
        ({"text": "{a"}, "is no template"), ({"text": "{}"}, "'' is not the name"),
        ({"text": "{a!r}"}, "formats a field"), ({"text": "{a:{b}}"}, "formats a field"),
        ({"text": "two words"}, "'two words' is not the name"),
    ],
)  # fmt: skip
def test_field_maps_that_make_no_sense(fields: dict[str, str], message: str) -> None:
    with pytest.raises(AndromedaError, match=message):
        Fields(**fields)


@given(st.dictionaries(st.sampled_from("abc"), st.text(st.characters(codec="utf-8")), min_size=3))
def test_a_template_puts_each_field_where_it_stands(record: dict[str, str]) -> None:
    document = Fields(text="<{b}|{a}|{{c}}|{c}|{a}>").document(record, "here")
    assert document.text == f"<{record['b']}|{record['a']}|{{c}}|{record['c']}|{record['a']}>"


# ---- what cannot be read -------------------------------------------------------------------------

BAD_LINES = {
    "not UTF-8": b'{"text": "caf\xe9"}\n',
    "not JSON": b'{"text": \n',
    "not an object": b'["text"]\n',
    "no `text`": b'{"body": "b"}\n',
    "`text` is no text": b'{"text": ["a"]}\n',
    "bad fields": b'{"text": "a\\ud800"}\n',
    "too long": jsonl({"text": "x" * 5000}),
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_stops_or_is_counted(tmp_path: Path, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST", 1000)
    (tmp_path / "a.jsonl").write_bytes(jsonl(TIGER) + BAD_LINES[reason] + jsonl(WORM))
    first, bad, last = read(tmp_path, "a.jsonl", bad="skip")
    assert (first.where, last.where) == ("a.jsonl:1", "a.jsonl:3")
    assert isinstance(bad, Unread)
    assert (bad.where, bad.reason) == ("a.jsonl:2", reason)
    with pytest.raises(AndromedaError, match=r"^source verse: a\.jsonl:2: .*; or let the spec say `bad: skip`$"):
        read(tmp_path, "a.jsonl")


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_file_cut_short_gives_what_it_has_and_says_so(tmp_path: Path, compression: str) -> None:
    whole = jsonl(*({"text": f"{n} {n * n}"} for n in range(5000)))
    data = COMPRESS[compression](whole)
    (tmp_path / f"a.jsonl{compression}").write_bytes(data[: len(data) // 2])
    *documents, bad = read(tmp_path, "a*", bad="skip")
    assert isinstance(bad, Unread)
    assert bad.reason == "file cannot be read"
    assert len(documents) < 5000
    assert [document.where for document in documents] == [
        f"a.jsonl{compression}:{n + 1}" for n in range(len(documents))
    ]
    with pytest.raises(AndromedaError, match=r"source verse: .*cannot be decompressed"):
        read(tmp_path, "a*")


def test_a_stream_behind_others_that_is_damaged_is_not_their_end(tmp_path: Path) -> None:
    second = bytearray(lzma.compress(jsonl(WORM)))
    second[2] ^= 255
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(jsonl(TIGER)) + bytes(second))
    with pytest.raises(AndromedaError, match=r"a\.jsonl\.xz: cannot be decompressed .* leave it out of `files`"):
        read(tmp_path, "a*", bad="skip")


def test_zstd_that_looks_back_far(tmp_path: Path) -> None:
    """As `zstd --long=31` writes, and large public dumps are."""
    module: Any = pytest.importorskip("backports.zstd")
    compressor = module.ZstdCompressor(options={module.CompressionParameter.window_log: 31})
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(jsonl(TIGER)) + compressor.flush())
    assert read(tmp_path, "a*") == [Document("a.jsonl.zst:1", text=TIGER["text"])]


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".parquet"])
def test_a_package_that_is_missing_is_no_file_that_cannot_be_read(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the same spec and corpus would make another build on another machine."""
    (tmp_path / f"a{suffix}").write_bytes(b"something")
    for package in ("backports", "compression", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AndromedaError, match=r"^source verse: a\S* needs a package for .*; pip install"):
        read(tmp_path, "a*", bad="skip")


def test_parquet_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 or not")
    (bad,) = read(tmp_path, "*.parquet", bad="skip")
    assert isinstance(bad, Unread)
    assert "a.parquet, after row 0: cannot be read as Parquet" in bad.message


def test_an_error_names_its_place_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    with pytest.raises(AndromedaError) as raised:
        read(tmp_path, "a.jsonl")
    assert str(raised.value).count("source verse") == 1


@given(st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line), max_size=8), st.integers(1, 14))
def test_lines_are_split_as_they_stand_and_long_ones_passed_over(parts: list[bytes], longest: int) -> None:
    import io

    data = b"\n".join(parts)
    expected = [line if len(line) <= longest else None for line in io.BytesIO(data)]
    assert list(files.lines(io.BytesIO(data), longest)) == expected
