"""Reading text and keeping its tokens: what is read, what is refused, and when what is kept is used again."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from andromeda.data import text as text_module
from andromeda.data.text import Corpus, load_corpus, read_documents
from andromeda.errors import AndromedaError
from andromeda.tokenizer import Tokenizer

POEMS = ["Tyger Tyger, burning bright,\n", "In the forests of the night;\n", "ünïcödé — 虎\n"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(POEMS * 3, 300)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.md.xz", "a.b.txt"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    compress: Any = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(compress("".join(POEMS).encode()))
    assert list(read_documents([path])) == ["".join(POEMS)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
def test_a_line_of_jsonl_is_one_document(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    lines = "\n\n".join(json.dumps({"title": "?", "text": poem}) for poem in POEMS)  # blank lines between, none after
    compress: Any = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(lines.encode()))
    assert list(read_documents([path, path])) == POEMS * 2


def test_line_ends_stay_and_a_byte_order_mark_goes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert list(read_documents([tmp_path / "a.txt"])) == ["one\r\ntwo\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt: not UTF-8 \(byte 0xe9 at offset 3\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"a\.jsonl:2: has no `text` .there are: body"),
        ("a.jsonl", b'["a"]\n', r"a\.jsonl:1: is a list; it must be an object"),
        ("a.jsonl", b'{"text": []}\n', r"a\.jsonl:1: `text` is a list; it must be text or a number"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', r"a\.jsonl:1: has 'text' twice; leave one"),
        ("a.jsonl", b'{"text": "' + b"a" * (1 << 23) + b'"}\n', r"a\.jsonl:1: the line is longer than 8,388,608 bytes"),
        ("a.txt.xz", lzma.compress(b"a") + b"b" * 32, r"a\.txt\.xz: cannot be decompressed"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', r"a\.jsonl:1: .*lone surrogate at character 1"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz: cannot be decompressed"),
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-9], r"a\.txt\.gz: cannot be decompressed"),
        ("a.txt.xz", b"plain", r"a\.txt\.xz: cannot be decompressed"),
        ("a.csv", b"a,b", r"a\.csv: unknown kind of file"),
        ("a.gz", gzip.compress(b"text", mtime=0), r"a\.gz: unknown kind of file"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AndromedaError, match=message) as raised:
        list(read_documents([tmp_path / name]))
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    (tmp_path / "d.txt").mkdir()
    (tmp_path / "poems").mkdir()
    directory = "is a directory; name the files"
    for name, what in (("none.txt", "no such file"), ("d.txt", directory), ("poems", directory)):
        with pytest.raises(AndromedaError, match=rf"{name}: {what}"):
            list(read_documents([tmp_path / name]))


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_a_corpus_without_text(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    write_jsonl(tmp_path / "b.jsonl", [content])
    with pytest.raises(AndromedaError, match=r"a\.txt, .*b\.jsonl: no text"):
        load_corpus([tmp_path / "a.txt", tmp_path / "b.jsonl"], tokenizer, tmp_path / "kept")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.jsonl"]


def test_tokens_are_those_of_each_document_behind_an_end_of_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [POEMS[0], " ", POEMS[1] + "<|endoftext|>", POEMS[2]])
    corpus = load_corpus([path], tokenizer, tmp_path / "kept")
    documents = [POEMS[0], POEMS[1] + "<|endoftext|>", POEMS[2]]
    expected = [token for text in documents for token in (tokenizer.eos_id, *tokenizer.encode(text))]
    assert corpus.tokens.tolist() == expected
    assert corpus.tokens.tolist().count(tokenizer.eos_id) == 3  # a spelt-out control token is text
    assert isinstance(corpus.tokens, np.memmap)
    assert corpus.tokens.dtype == np.uint16
    assert corpus.num_documents == 3
    assert corpus.num_bytes == sum(len(text.encode()) for text in documents)
    assert corpus.bytes_per_token == corpus.num_bytes / len(expected)


def test_many_batches_are_one_array(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", POEMS * 20)
    whole = load_corpus([path], tokenizer, tmp_path / "whole")
    monkeypatch.setattr(text_module, "BATCH_CHARACTERS", 50)
    parts = load_corpus([path], tokenizer, tmp_path / "parts")
    assert np.array_equal(whole.tokens, parts.tokens)
    assert (whole.num_documents, whole.num_bytes) == (parts.num_documents, parts.num_bytes)


def test_kept_tokens_serve_until_something_changes(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write = text_module._write

    def counted(folder: Path, *arguments: Any) -> None:
        written.append(folder)
        write(folder, *arguments)

    monkeypatch.setattr(text_module, "_write", counted)
    path = write_jsonl(tmp_path / "a.jsonl", POEMS)

    def load(tokenizer: Tokenizer = tokenizer) -> Corpus:
        return load_corpus([path], tokenizer, tmp_path / "kept")

    first, second = load(), load()
    assert len(written) == 1
    assert np.array_equal(first.tokens, second.tokens) and first.key == second.key
    write_jsonl(path, [*POEMS[:2], POEMS[2][:-2] + "a\n"])
    changed = load()
    assert len(written) == 2 and changed.key != first.key
    assert not np.array_equal(changed.tokens, first.tokens)  # and the old array can still be read
    other = Tokenizer.train(POEMS * 3, 270)
    assert len(load(other).tokens) != len(changed.tokens)
    assert len(written) == 3
    for content in (b"cut short", b""):
        (tmp_path / "kept" / "tokens.npy").write_bytes(content)
        assert np.array_equal(load(other).tokens, load(other).tokens)
    assert len(written) == 5
    tokens = np.load(tmp_path / "kept" / "tokens.npy")
    np.save(tmp_path / "kept" / "tokens.npy", tokens[: len(tokens) // 2])  # whole, but not all
    assert np.array_equal(load(other).tokens, tokens)
    assert len(written) == 6
    (tmp_path / "kept" / "corpus.json").write_text(json.dumps({"key": load(other).key}))
    assert load(other).num_documents == 3


def test_the_order_of_files_counts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paths = [write_jsonl(tmp_path / f"{number}.jsonl", [poem]) for number, poem in enumerate(POEMS)]
    forwards = load_corpus(paths, tokenizer, tmp_path / "kept")
    backwards = load_corpus(paths[::-1], tokenizer, tmp_path / "kept")
    assert forwards.key != backwards.key
    assert forwards.tokens.tolist() != backwards.tokens.tolist()


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    class Words:
        vocab_size, eos_id, sha256 = 70_000, 69_999, "words"

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [[int(word) for word in text.split()] for text in texts]

    (tmp_path / "a.txt").write_text("65536 0 65535")
    words: Any = Words()
    corpus = load_corpus([tmp_path / "a.txt"], words, tmp_path / "kept")
    assert corpus.tokens.dtype == np.uint32
    assert corpus.tokens.tolist() == [69_999, 65_536, 0, 65_535]


def test_other_files_are_not_replaced(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", POEMS)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("important")
    with pytest.raises(AndromedaError, match="holds other files"):
        load_corpus([path], tokenizer, tmp_path / "kept")
    assert (tmp_path / "kept" / "thesis.txt").read_text() == "important"
