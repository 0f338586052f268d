"""Text files -> documents -> token ids: one array in a file, memory-mapped.

Kinds of file: .txt and .md, where a file is a document, of any length; .jsonl, where a line is an object with the
document in `text`, read as a build of data reads it. Each may be compressed, with .gz, .xz or .zst behind the name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from andromeda.atomic import atomic_directory
from andromeda.data import files
from andromeda.data.fields import Fields
from andromeda.data.sources import raw_records
from andromeda.data.store import batched
from andromeda.errors import AndromedaError
from andromeda.tokenizer import Tokenizer

Tokens = NDArray[np.uint16] | NDArray[np.uint32]

WHOLE_FILE = (".txt", ".md")
KINDS = (*WHOLE_FILE, ".jsonl")
BATCH_CHARACTERS = 1 << 20  # documents that are tokenised together
TOKENS, FACTS = "tokens.npy", "corpus.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Corpus:
    """Tokens of all documents, each behind an end-of-text token: [end] document [end] document ...

    Attributes:
        tokens: (N,) ids, memory-mapped.
        num_bytes: UTF-8 bytes of the documents.
        key: fingerprint of the files and the tokenizer.
    """

    tokens: Tokens
    num_documents: int
    num_bytes: int
    key: str

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / len(self.tokens)


# ---- documents -----------------------------------------------------------------------------------


def check_paths(paths: Sequence[str | Path]) -> None:
    """Before any work: the files are there, and of a kind that can be read.

    Raises:
        AndromedaError: a file that is missing or of another kind.
    """
    for path in map(Path, paths):
        if path.is_dir():
            raise AndromedaError(f"{path}: is a directory; name the files")
        _kind(path)
        if not path.is_file():
            raise AndromedaError(
                f"{path}: no such file (looked for in {Path.cwd()}); "
                f"name text files ({', '.join(KINDS)}, or these with {_or(files.COMPRESSED)})"
            )


def check_text(paths: Sequence[str | Path]) -> None:
    """Reads up to the first document.

    Raises:
        AndromedaError: what `read_documents` raises so far, or there is no document.
    """
    if next(read_documents(paths), None) is None:
        raise AndromedaError(f"{', '.join(map(str, paths))}: no text; name files that hold some")


def read_documents(paths: Sequence[str | Path]) -> Iterator[str]:
    """The documents of the files in their order; those of nothing but white space are left out.

    Raises:
        AndromedaError: a file that is missing, of another kind, damaged or not UTF-8, or a line that is too long or not
            an object with a `text`.
    """
    check_paths(paths)
    for path in map(Path, paths):
        read = _whole if _kind(path) in WHOLE_FILE else _lines
        yield from (text for text in read(path) if text and not text.isspace())


def _whole(path: Path) -> Iterator[str]:
    with files.opened(path, str(path)) as file:
        yield files.decode(file.read(), str(path))


def _lines(path: Path) -> Iterator[str]:
    fields = Fields(text="text")
    for raw in raw_records(path, str(path), fields.needed()):
        yield fields.document(raw.record(), raw.where).text or ""


def _kind(path: Path) -> str:
    found = files.kind(path)
    if found not in KINDS:
        raise AndromedaError(
            f"{path}: unknown kind of file; use {', '.join(KINDS)}, or these with {_or(files.COMPRESSED)} behind"
        )
    return found


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


# ---- token ids -----------------------------------------------------------------------------------


def load_corpus(paths: Sequence[str | Path], tokenizer: Tokenizer, directory: str | Path) -> Corpus:
    """The files' tokens, kept in `directory` and used again while neither the files nor the tokenizer change.

    Memory does not grow with the corpus, but with its longest document.

    Raises:
        AndromedaError: what `read_documents` raises; no text in any file; the directory holds something else, or cannot
            be written.
    """
    check_paths(paths)
    directory = Path(directory)
    key = _fingerprint(paths, tokenizer)
    kept = _load(directory, key)
    if kept is not None:
        return kept
    with atomic_directory(directory, replaceable=lambda folder: (folder / FACTS).exists()) as folder:
        _write(folder, paths, tokenizer, key)
    corpus = _load(directory, key)
    if corpus is None:
        raise AndromedaError(
            f"{directory}: what was just written there is not there; does another process write to it?"
        )
    return corpus


def _fingerprint(paths: Sequence[str | Path], tokenizer: Tokenizer) -> str:
    digest = hashlib.blake2b(f"{FORMAT_VERSION} {tokenizer.sha256} {tokenizer.eos_id}".encode(), digest_size=16)
    for path in map(Path, paths):
        with path.open("rb") as file:
            digest.update(f" {_kind(path)} {path.suffix} {hashlib.file_digest(file, 'blake2b').hexdigest()}".encode())
    return digest.hexdigest()


def _load(directory: Path, key: str) -> Corpus | None:
    """What is kept there for this key; None where there is nothing, or something damaged, which is then made anew."""
    try:
        facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        if facts["key"] != key:
            return None
        tokens = np.load(directory / TOKENS, mmap_mode="r")
        if len(tokens) != facts["num_tokens"]:
            return None
        return Corpus(tokens, facts["num_documents"], facts["num_bytes"], key)
    except (EOFError, OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, paths: Sequence[str | Path], tokenizer: Tokenizer, key: str) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    num_tokens = num_documents = num_bytes = 0
    with (folder / TOKENS).open("wb") as file:
        _write_header(file, dtype, num_tokens)
        for texts in batched(read_documents(paths), BATCH_CHARACTERS, len):
            for ids in tokenizer.encode_batch(texts):
                file.write(np.array([tokenizer.eos_id, *ids], dtype).tobytes())
                num_tokens += 1 + len(ids)
            num_documents += len(texts)
            num_bytes += sum(len(text.encode()) for text in texts)
        if num_documents == 0:
            raise AndromedaError(f"{', '.join(map(str, paths))}: no text; a corpus needs at least one document")
        file.seek(0)
        _write_header(file, dtype, num_tokens)
    facts = {"key": key, "num_tokens": num_tokens, "num_documents": num_documents, "num_bytes": num_bytes}
    (folder / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def _write_header(file: IO[bytes], dtype: np.dtype[Any], length: int) -> None:
    """numpy leaves room in the header for the array to grow, so its size does not depend on the length."""
    npy.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": (length,)})
