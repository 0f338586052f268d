"""What is wrong with files, records, or the disk: told in one line, or counted, and never lost in silence."""

from __future__ import annotations

import errno
import gzip
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.cli import main
from andromeda.data import files, fingerprint, sources
from andromeda.data.clean import Rules
from andromeda.data.decontaminate import Decontaminate
from andromeda.data.encode import Encode
from andromeda.data.fields import Fields
from andromeda.data.json_object import DEEPEST, BadRecordError
from andromeda.data.minhash import Near
from andromeda.data.sift import Sift
from andromeda.data.sources import Raw, Source
from andromeda.data.stream import Stream
from andromeda.data.texts import listed_removed, listed_unread
from andromeda.errors import AndromedaError
from andromeda.tokenizer import Tokenizer

zstd = pytest.importorskip("backports.zstd")
pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

GOOD = [{"text": f"Tyger Tyger, burning bright, number {n}"} for n in range(40)]
STRICT = """
tokenizer: {vocab_size: 300}
sources:
  good: {files: [good.jsonl], licence: none}
  tested: {files: ['tested*'], licence: none}
stages: {all: {seq_len: 32, epochs: {good: 1}}}
"""
LENIENT = STRICT.replace("['tested*'], licence: none", "['tested*'], licence: none, bad: skip")


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def as_parquet(columns: dict[str, Any]) -> bytes:
    buffer = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), buffer)
    return bytes(buffer.getvalue())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "good.jsonl").write_bytes(lines(*GOOD))
    (tmp_path / "strict.yaml").write_text(STRICT)
    (tmp_path / "lenient.yaml").write_text(LENIENT)
    return tmp_path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`andromeda data build`: an error's one line, or nothing."""

    def build(spec: str, out: str = "out") -> str:
        code = main(["data", "build", str(folder / spec), str(folder / out), "--corpus", str(folder / "corpus")])
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if "error" in line]
        assert "Traceback" not in said
        assert (code, len(errors)) in ((0, 0), (2, 1))
        return errors[0] if errors else ""

    return build


def unread(folder: Path, out: str = "out") -> dict[str, int]:
    """What was left out of the source, by reason; each has its line in the list."""
    counts: dict[str, int] = Stream(folder / out, check=True).manifest["sources"]["tested"]["unread"]
    listed = (folder / out / "sources" / "tested" / "unread.txt").read_text().splitlines()
    assert Counter(line.split("\t")[0] for line in listed) == counts
    return counts


def documents(folder: Path, out: str = "out") -> list[str]:
    stream = Stream(folder / out)
    store = stream.stores["tested"]
    return [
        stream.tokenizer.decode(store.piece(number, 0, int(length))[0][1:].tolist())
        for number, length in enumerate(store.lengths)
    ]


# ---- whole files ---------------------------------------------------------------------------------

WHOLE = lines(*({"text": f"{number} {number * number}"} for number in range(4000)))
PACKED = {".gz": gzip.compress(WHOLE), ".xz": lzma.compress(WHOLE), ".zst": zstd.compress(WHOLE)}
TABLE = as_parquet({"text": [f"{number} {number * number}" for number in range(4000)]})


def damaged(data: bytes, place: float) -> bytes:
    start = int(len(data) * place)
    return data[:start] + bytes(255 - byte for byte in data[start : start + 64]) + data[start + 64 :]


FILES = {
    **{f"cut{suffix}": (f".jsonl{suffix}", data[: len(data) // 2]) for suffix, data in PACKED.items()},
    **{f"cut at the last byte{suffix}": (f".jsonl{suffix}", data[:-1]) for suffix, data in PACKED.items()},
    **{f"of no bytes{suffix}": (f".jsonl{suffix}", b"") for suffix in PACKED},
    **{f"not compressed{suffix}": (f".jsonl{suffix}", WHOLE) for suffix in PACKED},
    "Parquet cut": (".parquet", TABLE[: len(TABLE) // 2]),
    "Parquet cut at the last byte": (".parquet", TABLE[:-1]),
    "Parquet of no bytes": (".parquet", b""),
    "Parquet with a damaged footer": (".parquet", TABLE[:-8] + b"\xff\xff\xff\x7fPAR1"),
    "Parquet without the column": (".parquet", as_parquet({"body": ["a"] * 7})),
}


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_file_stops_the_build_or_is_counted(case: str, folder: Path, run: Callable[..., str]) -> None:
    suffix, data = FILES[case]
    (folder / "corpus" / f"tested{suffix}").write_bytes(data)
    said = run("strict.yaml", "strict")
    assert f"tested{suffix}" in said and "source tested: " in said and "; or let the spec say `bad: skip`" in said
    assert not (folder / "strict" / "manifest.json").exists()
    assert run("lenient.yaml") == ""
    reason = "no `text`" if "column" in case else "file cannot be read"
    assert unread(folder) == {reason: 1}
    whole = [record["text"] for record in map(json.loads, WHOLE.splitlines())]
    read = documents(folder)
    assert read == whole[: len(read)], "what is kept is what stands before the damage"


@pytest.mark.parametrize("suffix", PACKED)
def test_of_a_damaged_file_nothing_is_taken(suffix: str, folder: Path, run: Callable[..., str]) -> None:
    """Its checksum stands at the end: what was read until then may be anything, and `bad: skip` does not help."""
    (folder / "corpus" / f"tested.jsonl{suffix}").write_bytes(damaged(PACKED[suffix], 0.6))
    (folder / "big.yaml").write_text(LENIENT)
    said = run("big.yaml")
    if said:
        assert f"tested.jsonl{suffix}: cannot be decompressed" in said and "leave it out of `files`" in said
        assert not (folder / "out" / "manifest.json").exists()
    else:  # it was told of before anything was read
        assert (unread(folder), documents(folder)) == ({"file cannot be read": 1}, [])


def test_after_an_error_the_same_directory_takes_the_repaired_corpus_or_says_why_not(
    folder: Path, run: Callable[..., str]
) -> None:
    path = folder / "corpus" / "tested.jsonl.gz"
    path.write_bytes(PACKED[".gz"][:-40])
    assert "cannot be decompressed" in run("strict.yaml")
    assert "cannot be decompressed" in run("strict.yaml"), "the same again, and not a lock or a leftover"
    path.write_bytes(PACKED[".gz"])
    assert "was begun with another spec, tokenizer or corpus; name a new directory, or delete it" in run("strict.yaml")
    shutil.rmtree(folder / "out")
    assert run("strict.yaml") == ""
    assert (unread(folder), len(documents(folder))) == ({}, 4000)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere.jsonl")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


UNREADABLE: dict[str, Callable[[Path], Any]] = {
    "Is a directory": Path.mkdir, "No such file": link_to_nothing, "symbolic links": link_to_itself,
    "a pipe": os.mkfifo,
}  # fmt: skip


@pytest.mark.parametrize("problem", UNREADABLE)
def test_what_is_no_file_is_told_of(problem: str, folder: Path, run: Callable[..., str]) -> None:
    UNREADABLE[problem](folder / "corpus" / "tested.jsonl")
    (folder / "corpus" / "tested-too.jsonl").write_bytes(lines(*GOOD))
    said = run("strict.yaml", "strict")
    assert "tested.jsonl: cannot be read" in said and problem in said
    assert run("lenient.yaml") == ""
    assert (unread(folder), len(documents(folder))) == ({"file cannot be read": 1}, 40)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_a_file_that_may_not_be_read(
    code: int, folder: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's answer is put in, as permissions do not stop the superuser."""
    (folder / "corpus" / "tested.jsonl").write_bytes(lines(*GOOD))
    size = files._checked_size

    def refusing(path: Path) -> int:
        if path.name == "tested.jsonl":
            raise OSError(code, os.strerror(code), str(path))
        return size(path)

    monkeypatch.setattr(files, "_checked_size", refusing)
    assert os.strerror(code) in run("strict.yaml", "strict")
    assert run("lenient.yaml") == ""
    assert unread(folder) == {"file cannot be read": 1}


def test_a_folder_that_cannot_be_listed_is_no_empty_one(
    folder: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tested.jsonl", "secret/tested.jsonl"):
        (folder / "corpus" / name).parent.mkdir(exist_ok=True)
        (folder / "corpus" / name).write_bytes(lines(*GOOD))
    (folder / "deep.yaml").write_text(LENIENT.replace("'tested*'", "'**/tested*'"))
    scandir = os.scandir

    def refusing(path: Any = ".") -> Any:
        if not isinstance(path, int) and Path(path).name == "secret":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert "secret: cannot be listed: Permission denied" in run("deep.yaml")
    (folder / "corpus" / "secret" / "inner").mkdir()
    (folder / "corpus" / "open" / "inner").mkdir(parents=True)
    (folder / "corpus" / "open" / "inner" / "tested.jsonl").write_bytes(lines(*GOOD))
    for number, pattern in enumerate(("*/*/tested*", "**/inner/tested*")):
        (folder / "deep.yaml").write_text(LENIENT.replace("tested*", pattern))
        assert "secret: cannot be listed: Permission denied" in run("deep.yaml", f"deep-{number}")
    (folder / "deep.yaml").write_text(LENIENT.replace("tested*", "secret/tested.jsonl"))
    assert run("deep.yaml", "named") == "", "what is named needs no list"


def test_folders_are_passed_over_where_all_is_asked_for(folder: Path) -> None:
    (folder / "corpus" / "code" / "inner").mkdir(parents=True)
    (folder / "corpus" / "code" / "inner" / "a.py").write_text("a = 1")
    found = Source("code", ("code/**/*",), "none").paths(folder / "corpus")
    assert [path.name for path in found] == ["a.py"]


def test_a_name_that_is_not_utf8(folder: Path, run: Callable[..., str]) -> None:
    try:
        Path(os.fsdecode(os.fsencode(folder / "corpus") + b"/tested-\xe9.jsonl")).write_bytes(lines(*GOOD))
    except OSError:
        pytest.skip("this file system takes no such names")
    assert r"tested-\udce9.jsonl': its name is not UTF-8; rename the file" in run("strict.yaml")


def test_a_line_end_in_a_name_breaks_no_list(folder: Path, run: Callable[..., str]) -> None:
    (folder / "corpus" / "tested\n\r2.jsonl").write_bytes(lines({"text": "tiger"}, {"body": "worm"}))
    assert run("lenient.yaml") == ""
    assert unread(folder) == {"no `text`": 1}
    assert Stream(folder / "out").stores["tested"].where(0) == "tested \r2.jsonl:1"


# ---- files that change ---------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["changes", "vanishes", "appears"])
@pytest.mark.parametrize("spec", ["strict.yaml", "lenient.yaml"])
def test_a_file_that_changes_while_it_is_read_makes_no_build(
    change: str, spec: str, folder: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = folder / "corpus" / "tested.jsonl", lines(*GOOD)
    path.write_bytes(data)
    raw_records = sources.raw_records

    def disturbed(which: Path, *arguments: Any) -> Iterator[Raw]:
        if which == path and change == "vanishes":
            path.unlink()
        if which == path and change == "changes":
            path.write_bytes(data.replace(b"bright", b"blight"))
        if change == "appears":
            path.with_name("tested-later.jsonl").write_bytes(data)
        yield from raw_records(which, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "raw_records", disturbed)
        said = run(spec)
    missing = "No such file" if spec == "strict.yaml" else "no file matches"
    assert (missing if change == "vanishes" else "source tested: its files changed while they were read") in said
    assert not (folder / "out" / ".work" / "texts" / "tested").exists()
    path.write_bytes(data)
    path.with_name("tested-later.jsonl").unlink(missing_ok=True)
    assert run(spec) == "", "with what it was begun with it goes on"
    assert (unread(folder), len(documents(folder))) == ({}, 40)


def test_evaluation_texts_that_change_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "corpus" / "test.txt").write_text("one two three four five six seven eight")
    plan = Decontaminate(("test.txt",))
    key = fingerprint.fingerprint(plan, folder / "corpus")
    fingerprint.check_unchanged(plan, folder / "corpus", key)
    (folder / "corpus" / "test.txt").write_text("one two three four five six seven nine")
    with pytest.raises(AndromedaError, match=r"^decontaminate: its files changed while they were read"):
        fingerprint.check_unchanged(plan, folder / "corpus", key)


# ---- records -------------------------------------------------------------------------------------

DEEP = '{"text": "a", "more": ' + "[" * 200 + "]" * 200 + "}\n"
BOMB = '{"text": ' + "[" * 200_000 + "]" * 200_000 + "}\n"
RECORDS = {
    "key twice": b'{"text": "tiger", "text": "worm"}\n',
    "not UTF-8": b'{"text": "caf\xe9"}\n',
    "not JSON": b'{"text": "tig\x00er"}\n',
    "bad fields": b'{"text": "tiger \\ud800"}\n',
    "no `text`": b'{"\\ud800": "a name that no file can hold"}\n',
    "`text` is no text": b'{"text": true}\n{"text": {}}\n{"text": 1e999}\n{"text": NaN}\n',
    "nested too deep": (DEEP + BOMB).encode(),
    "not an object": b'"tiger"\n1\nnull\n',
    "empty": b'{"text": ""}\n{"text": " \\n"}\n',
}


@pytest.mark.parametrize("reason", RECORDS)
def test_a_bad_record_stops_the_build_or_is_counted(reason: str, folder: Path, run: Callable[..., str]) -> None:
    data = RECORDS[reason]
    (folder / "corpus" / "tested.jsonl").write_bytes(lines({"text": "tiger"}) + data + lines({"text": "worm"}))
    if reason != "empty":  # which is no mistake
        assert "source tested: tested.jsonl:2: " in (said := run("strict.yaml", "strict"))
        assert len(said) < 400
    assert run("lenient.yaml") == ""
    assert unread(folder) == {reason: data.count(b"\n")}
    assert documents(folder) == ["tiger", "worm"]


def test_a_message_says_the_key_that_stands_twice() -> None:
    for line, key in ((b'{"a": 1, "b": 2, "a": 1}', "'a'"), (b'{"a": [{"text": 1, "text": 1}]}', "'text'")):
        with pytest.raises(BadRecordError, match=f"here: has {key} twice; leave one"):
            Raw("here", "line", line).record()


def test_a_key_that_stands_twice_is_found_at_once() -> None:
    """Each record's keys are looked at once: a line of 8 MiB took hours."""
    pairs = [b'"%d": 1' % number for number in range(300_000)]
    start = time.process_time()
    with pytest.raises(BadRecordError, match="has '299999' twice"):
        Raw("here", "line", b"{" + b", ".join([*pairs, pairs[-1]]) + b"}").record()
    assert time.process_time() - start < 10


def test_depth_is_counted_alike_wherever_it_is_counted() -> None:
    """A limit of the stack would leave other documents out with other numbers of processes."""
    for depth in (DEEPEST - 2, DEEPEST - 1, DEEPEST):
        raw = Raw("here", "line", b'{"a": ' + b"[" * depth + b"]" * depth + b"}")
        if depth < DEEPEST:
            raw.record()
            continue
        with pytest.raises(BadRecordError, match="more than 64 deep"):
            raw.record()


def test_marks_and_line_ends_of_other_systems(folder: Path, run: Callable[..., str]) -> None:
    """A byte order mark goes, line ends of JSON lines too; a text's own stay unless it is cleaned, NUL as well."""
    (folder / "corpus" / "tested.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b'{"text": "tiger"}\r\n\r\n{"text": "in \\u0000 the\\r\\nnight"}\r\n'
    )
    (folder / "corpus" / "tested.txt").write_bytes(b"\xef\xbb\xbfa\x00b\r\nc")
    (folder / "clean.yaml").write_text(STRICT + "clean: true\n")
    assert run("strict.yaml") == run("clean.yaml", "clean") == ""
    assert documents(folder) == ["tiger", "in \0 the\r\nnight", "a\0b\r\nc"]
    assert documents(folder, "clean") == ["tiger", "in  the\nnight", "ab\nc"]
    changes = Stream(folder / "clean").manifest["sources"]["tested"]["changes"]
    assert changes == {"control characters": 2, "line ends": 2}


def test_empty_files_are_counted(folder: Path, run: Callable[..., str]) -> None:
    for name in ("tested.jsonl", "tested.txt", "tested-2.jsonl"):
        (folder / "corpus" / name).write_bytes(b"\n\n" if "2" in name else b"")
    (folder / "corpus" / "tested.jsonl.gz").write_bytes(gzip.compress(b""))
    (folder / "corpus" / "tested.parquet").write_bytes(as_parquet({"text": pa.array([], pa.string())}))
    assert run("strict.yaml") == ""
    assert unread(folder) == {"empty": 5}


def test_an_empty_corpus_is_an_error(folder: Path, run: Callable[..., str]) -> None:
    (folder / "corpus" / "tested.jsonl").write_bytes(b"")
    (folder / "empty.yaml").write_text(STRICT.replace("epochs: {good: 1}", "epochs: {tested: 1}"))
    assert "tested" in run("empty.yaml")


def test_a_wrong_field_is_told_with_those_that_are_there(folder: Path, run: Callable[..., str]) -> None:
    (folder / "corpus" / "tested.jsonl").write_bytes(lines({f"column {n}": n for n in range(1000)}))
    said = run("strict.yaml")
    assert "tested.jsonl:1: has no `text` (there are: column 0, column 1, " in said and "and 970 more" in said
    (folder / "corpus" / "tested.jsonl").unlink()
    (folder / "corpus" / "tested.parquet").write_bytes(as_parquet({"body": ["a"] * 7, "title": ["b"] * 7}))
    expected = "tested.parquet: has no column `text` (there are: body, title), so none of its 7 rows is read"
    assert expected in run("strict.yaml", "other")


def test_columns_of_other_types(folder: Path, run: Callable[..., str]) -> None:
    """Numbers are texts; what is neither is counted, row by row."""
    import datetime

    columns = {
        "int": [1, 2], "float": [0.5, None], "binary": [b"a", b"\xff"], "list": [["a"], []], "struct": [{"a": 1}] * 2,
        "date": [datetime.date(1794, 1, 1)] * 2, "time": pa.array([2**62, 1], pa.timestamp("us")),
        "bytes that are no text": pa.array([b"fine", b"caf\xe9"]).view(pa.string()),
    }  # fmt: skip
    for name, column in columns.items():
        path = folder / "corpus" / f"tested-{name}.parquet"
        path.write_bytes(as_parquet({"text": column}))
    assert run("lenient.yaml") == ""
    assert sorted(documents(folder)) == ["0.5", "1", "2", "fine"]
    counts = unread(folder)
    assert counts == {"`text` is no text": 9, "bad fields": 1, "no `text`": 1, "not UTF-8": 1}


def test_what_is_listed_does_not_say_where_the_corpus_lies(folder: Path, run: Callable[..., str]) -> None:
    """Two builds of one corpus are the same, wherever it is."""
    (folder / "corpus" / "tested.jsonl.gz").write_bytes(PACKED[".gz"][:-40])
    assert run("lenient.yaml", "here") == ""
    (folder / "corpus").rename(folder / "moved")
    (folder / "corpus").symlink_to("moved")
    code = main(
        ["data", "build", str(folder / "lenient.yaml"), str(folder / "there"), "--corpus", str(folder / "moved")]
    )
    assert code == 0 and unread(folder, "here") == unread(folder, "there") == {"file cannot be read": 1}
    assert (folder / "here" / "manifest.json").read_bytes() == (folder / "there" / "manifest.json").read_bytes()


DAMAGE = {"source.json": (b"", b"{", b"{}", b"[]", b"\xff"), "where.txt": (b"", b"a:1\n"), "documents.npy": (b"",)}


@pytest.mark.parametrize(("name", "data"), [(name, data) for name, found in DAMAGE.items() for data in found])
def test_a_damaged_build_is_told_of(
    name: str, data: bytes, folder: Path, run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "corpus" / "tested.jsonl").write_bytes(lines(*GOOD))
    assert run("strict.yaml") == ""
    (folder / "out" / "sources" / "good" / name).write_bytes(data)
    assert main(["data", "show", str(folder / "out"), "--sequence", "0"]) == 2
    assert f"good/{name}: is " in (said := capsys.readouterr().err) and "; build the data again" in said


def test_a_column_twice_is_no_choice_of_ours(folder: Path, run: Callable[..., str]) -> None:
    buffer = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), buffer)
    (folder / "corpus" / "tested.parquet").write_bytes(buffer.getvalue())
    assert "has several columns `text`" in run("strict.yaml")


# ---- any record at all ---------------------------------------------------------------------------

NAMES = st.sampled_from(["role", "content", "tool_calls", "tool_call", "name", "arguments", "function", "x", "\ud800"])
ROLES = st.sampled_from(["user", "assistant", "tool", "system", "\ud800", 3, None, ["user"]])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\udfff")
ANYTHING = st.recursive(
    SCALARS | ROLES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": ANYTHING}, optional={"tool_calls": ANYTHING, "x": ANYTHING})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the tiger"] * 3, 300)


@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from(["text", "said", "tools"]) | NAMES, ANYTHING, max_size=3)
    | st.fixed_dictionaries({"said": st.lists(MESSAGE, max_size=3), "tools": ANYTHING})
)
def test_whatever_a_record_holds_it_is_a_document_or_counted(tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    raw = Raw("a.jsonl:1", "line", json.dumps(record).encode())
    rules = Rules(redact=("keys", "emails"))
    for fields in (Fields(text="text"), Fields(messages="said", tools="tools"), Fields(user="text", assistant="said")):
        for bad in ("skip", "stop"):
            source = Source("any", ("a.jsonl",), "none", fields, bad, rules, "near")
            sift = Sift({"any": source}, None, Near())
            try:
                batch = sift(("any", [raw]))
                done = Encode(tokenizer, {"any": bad}, {})(("any", batch.lines))
            except AndromedaError as error:
                assert bad == "stop" and str(error).startswith("source any: a.jsonl:1: ")
                continue
            assert len(batch.unread) + len(batch.removed) + len(done) == 1
            listed = [*listed_unread(batch.unread), *listed_removed(batch.removed)]
            assert all(line.encode().count(b"\n") == 1 for line in listed)


# ---- a line of a gigabyte ------------------------------------------------------------------------

GIBIBYTE = 1 << 30
OPEN: dict[str, Callable[[Path], Any]] = {
    ".gz": lambda path: gzip.GzipFile(path, "wb", 1), ".xz": lambda path: lzma.LZMAFile(path, "wb", preset=0),  # noqa: SIM115
    ".zst": lambda path: zstd.ZstdFile(path, "wb"),
}  # fmt: skip
KINDS = (".jsonl", ".txt", ".txt.gz", ".jsonl.xz", ".jsonl.zst")


def command(folder: Path, spec: str, out: Path) -> list[str]:
    script = "import sys; from andromeda.cli import main; sys.exit(main(sys.argv[1:]))"
    return [
        sys.executable, "-c", script, "data", "build", str(folder / spec), str(out),
        "--corpus", str(folder / "corpus"), "--workers", "1",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("suffix", KINDS)
def test_a_line_of_a_gigabyte_is_passed_over_in_bounded_memory(suffix: str, folder: Path) -> None:
    block = b"the tiger and the night " * 4096
    path = folder / "corpus" / f"tested{suffix}"
    with OPEN.get(path.suffix, lambda path: path.open("wb"))(path) as file:
        if "jsonl" in suffix:
            file.write(b'{"text": "')
        for _ in range(GIBIBYTE // len(block) + 1):
            file.write(block)
        if "jsonl" in suffix:
            file.write(b'"}\n{"text": "tiger"}\n')
    arguments = command(folder, "strict.yaml", folder / "strict")
    strict = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert strict.returncode == 2
    assert "is longer than 8,388,608 bytes; split the document; or let the spec say" in strict.stderr
    measured = [sys.executable, "-c", MEASURE, *command(folder, "lenient.yaml", folder / "out")]
    done = subprocess.run(measured, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 600 << 10, "KiB at the peak, torch and all"
    assert unread(folder) == {"too long": 1}
    assert documents(folder) == (["tiger"] if "jsonl" in suffix else [])


MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


# ---- a full disk ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and a spec that go through every stage."""
    folder, draw = tmp_path_factory.mktemp("rich"), random.Random(0)
    (folder / "corpus").mkdir()
    poems = [{"text": " ".join(draw.choices(["tiger", "night", "forests", "of", "the"], k=60))} for _ in range(400)]
    (folder / "corpus" / "good.jsonl").write_bytes(lines(*poems))
    (folder / "corpus" / "tested.jsonl").write_bytes(lines(*poems[:30], *GOOD) + b"no JSON\n")
    (folder / "corpus" / "test.txt").write_text("one two three four five six seven eight")
    text = LENIENT.replace("epochs: {good: 1}", "epochs: {good: 1, tested: 2}")
    (folder / "rich.yaml").write_text(text + "clean: true\ndedup: near\ndecontaminate: {files: [test.txt]}\n")
    return folder


@pytest.fixture(scope="module")
def whole(rich: Path) -> dict[str, bytes]:
    """What a build of them holds."""
    assert subprocess.run(command(rich, "rich.yaml", rich / "whole"), check=False).returncode == 0
    return contents(rich / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of so many KiB: made, and then resized."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def sized(kibibytes: int) -> Path:
        nonlocal mounted
        options = f"size={kibibytes}k" + (",remount" if mounted else "")
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if made.returncode:
            pytest.skip("a small file system is mounted by the superuser alone")
        mounted = True
        return place

    yield sized
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def failed_for_space(arguments: list[str]) -> bool:
    """Whether a build failed, as it may: in one line."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return False
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert "Traceback" not in done.stderr
    assert (done.returncode, len(errors)) == (2, 1)
    assert "No space left on device" in errors[0] or "written" in errors[0]
    assert "free space" in errors[0] or "run it again" in errors[0] or "takes about" in errors[0]
    return True


def fill_up(rich: Path, whole: dict[str, bytes], disk: Callable[[int], Path], sizes: range) -> None:
    """The disk is full; it grows a little, and the same command goes on, until it comes to its end."""
    failures = 0
    for size in sizes:
        if not failed_for_space(command(rich, "rich.yaml", disk(size) / "out")):
            break
        failures += 1
    else:
        raise AssertionError("it never came to an end")
    assert failures > 3
    assert contents(disk(sizes[-1]) / "out") == whole


@pytest.mark.slow
def test_a_disk_that_is_full_again_and_again(rich: Path, whole: dict[str, bytes], disk: Callable[[int], Path]) -> None:
    fill_up(rich, whole, disk, range(100, 4000, 300))


@pytest.mark.slow
def test_a_disk_that_is_full_at_every_page_or_two(
    rich: Path, whole: dict[str, bytes], disk: Callable[[int], Path]
) -> None:
    fill_up(rich, whole, disk, range(4, 4000, 40))


def test_a_full_disk_at_any_flush(rich: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where allocation is delayed, a full disk shows only when files are flushed: at each of them, in every stage."""
    arguments = command(rich, "rich.yaml", tmp_path / "out")[3:]
    left = 0

    def failing(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if left < 0:
            raise AssertionError("after an error nothing more is flushed")

    def counting(descriptor: int) -> None:
        nonlocal left
        left += 1

    monkeypatch.setattr(os, "fsync", counting)
    assert main(arguments) == 0
    whole, flushes, draw = contents(tmp_path / "out"), left, random.Random(0)
    assert flushes > 40
    for number in sorted(draw.sample(range(1, flushes), 5)):
        shutil.rmtree(tmp_path / "out")
        left = number
        monkeypatch.setattr(os, "fsync", failing)
        assert main(arguments) == 2
        monkeypatch.setattr(os, "fsync", counting)
        assert main(arguments) == 0
        assert contents(tmp_path / "out") == whole
