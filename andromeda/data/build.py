"""A spec and a corpus folder -> a directory that training reads: documents as tokens, packed, and a manifest of it all.

    manifest.json          written last: without it there is no build
    spec.yaml, build.key   the spec as it was given, and what this is a build of
    tokenizer/             tokenizer.json and its like
    sources/NAME/          see `store`; what could not be read stands in unread.txt
    packs/NAME-LENGTH/     see `pack`: offsets.npy, documents.npy, starts.npy, lengths.npy

Each source and each pack appears whole, so a build that was killed goes on where it was. Two builds of one spec and
corpus are the same byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from andromeda.atomic import atomic_directory, replace_file
from andromeda.data.fields import Document
from andromeda.data.mix import Mix
from andromeda.data.pack import pack
from andromeda.data.sources import Source, Unread
from andromeda.data.spec import Spec
from andromeda.data.store import FACTS, Encoded, Store, batched, write_store
from andromeda.errors import AndromedaError
from andromeda.tokenizer import Tokenizer

FORMAT = 1
MANIFEST, SPEC, OWNER = "manifest.json", "spec.yaml", "build.key"
BATCH_CHARACTERS = 1 << 20  # documents that are tokenised together
UNREAD = "unread.txt"
PACK_ARRAYS = ("offsets", "documents", "starts", "lengths")

Advance = Callable[[str, int, int], None]  # source, documents and bytes more than before


@dataclass
class _Read:
    """A source's documents as they come, and what did not become one: counted, and a line each in `log`."""

    source: Source
    folder: Path
    log: IO[str] | None = None
    unread: Counter[str] = field(default_factory=Counter)

    def documents(self) -> Iterator[Document]:
        for path in self.source.paths(self.folder):
            for item in self.source.read(self.folder, path):
                if isinstance(item, Unread):
                    self.leave_out(item)
                elif item.text is not None and (not item.text or item.text.isspace()):
                    self.leave_out(Unread(item.where, "empty", f"{item.where}: no text"))
                else:
                    yield item

    def leave_out(self, item: Unread) -> None:
        self.unread[item.reason] += 1
        if self.log is not None:
            self.log.write(f"{item.reason}\t{' '.join(item.message.split())}\n")


def build(spec: Spec, corpus: Path, out: Path, advance: Advance) -> dict[str, Any]:
    """Builds what is not yet there.

    Args:
        spec: what.
        corpus: the folder in which the sources' files lie.
        out: a new directory, or one of an earlier build of the same spec and corpus.
        advance: called as documents are tokenised.

    Returns:
        The manifest.

    Raises:
        AndromedaError: a source cannot be read, a stage cannot be made of it, `out` holds something else, or writing
            failed.
    """
    keys = {source.name: _fingerprint(source, corpus) for source in spec.sources}
    key = _digest(FORMAT, spec.sha256, _tokenizer_key(spec), *keys.values())
    _claim(out, key)
    manifest_path = out / MANIFEST
    if manifest_path.is_file():
        return read_manifest(out)
    if not (out / SPEC).is_file():
        replace_file(out / SPEC, spec.text)
    tokenizer = _tokenizer(spec, corpus, out)
    for source in spec.sources:
        _build_source(source, corpus, out / "sources" / source.name, tokenizer, keys[source.name], advance)
    stores = {source.name: Store(out / "sources" / source.name) for source in spec.sources}
    sizes = {}
    for name, seq_len in dict.fromkeys((name, stage.seq_len) for stage in spec.stages for name in stage.sources):
        sizes[name, seq_len] = _build_pack(stores[name], out / "packs" / f"{name}-{seq_len}", seq_len)
    mix = Mix(spec.stages, sizes, spec.seed)
    manifest = {
        "format": FORMAT,
        "key": key,
        "spec_sha256": spec.sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "sources": {name: store.facts for name, store in stores.items()},
        "stages": {
            stage.name: {"seq_len": stage.seq_len, "sequences": dict(zip(mix.sources, counts.tolist(), strict=True))}
            for stage, counts in zip(mix.stages, mix.counts, strict=True)
        },
        "num_sequences": len(mix),
        "files": {path.relative_to(out).as_posix(): _sha256(path) for path in _files(out)},
    }
    replace_file(manifest_path, json.dumps(manifest, indent=1) + "\n")
    return manifest


def read_manifest(out: Path) -> dict[str, Any]:
    """
    Raises:
        AndromedaError: there is none, or one of another format.
    """
    try:
        manifest: dict[str, Any] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AndromedaError(f"{out}: holds no {MANIFEST}; build it with `andromeda data build`, to the end") from error
    except (OSError, ValueError) as error:
        raise AndromedaError(f"{out / MANIFEST}: cannot be read: {error}; build it again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise AndromedaError(f"{out / MANIFEST}: is of format {found}, this reads {FORMAT}; build it again")
    return manifest


def verify(out: Path) -> list[str]:
    """What is wrong with the files of a build, a line each; nothing: they are what was built."""
    manifest, problems = read_manifest(out), []
    for name, expected in manifest["files"].items():
        path = out / name
        if not path.is_file():
            problems.append(f"{name}: is missing")
        elif _sha256(path) != expected:
            problems.append(f"{name}: is not what was built")
    known = set(manifest["files"])
    problems += [
        f"{name}: was not built" for path in _files(out) if (name := path.relative_to(out).as_posix()) not in known
    ]
    return problems


# ---- parts ---------------------------------------------------------------------------------------


def _claim(out: Path, key: str) -> None:
    """Makes `out` the directory of this build."""
    owner = out / OWNER
    if out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
        if not owner.is_file():
            raise AndromedaError(f"{out}: holds something else; name a new directory")
        if owner.read_text(encoding="utf-8").strip() != key:
            raise AndromedaError(
                f"{out}: was begun with another spec, tokenizer or corpus; name a new directory, or delete it"
            )
    out.mkdir(parents=True, exist_ok=True)
    if not owner.is_file():
        replace_file(owner, key + "\n")


def _tokenizer_key(spec: Spec) -> str:
    return str(spec.vocab_size) if spec.tokenizer_path is None else Tokenizer.load(spec.tokenizer_path).sha256


def _tokenizer(spec: Spec, corpus: Path, out: Path) -> Tokenizer:
    folder = out / "tokenizer"
    if not folder.is_dir():
        if spec.tokenizer_path is None:
            assert spec.vocab_size is not None
            made = Tokenizer.train(_texts(spec.sources, corpus), spec.vocab_size)
        else:
            made = Tokenizer.load(spec.tokenizer_path)
        with atomic_directory(folder, replaceable=lambda _: False) as new:
            made.save(new)
    return Tokenizer.load(folder)


def _texts(sources: Sequence[Source], corpus: Path) -> Iterator[str]:
    for source in sources:
        for document in _Read(source, corpus).documents():
            if document.text is not None:
                yield document.text
            else:
                yield from (str(message.get("content") or "") for message in document.messages or ())


def _build_source(source: Source, corpus: Path, folder: Path, tokenizer: Tokenizer, key: str, advance: Advance) -> None:
    if folder.is_dir():
        return
    conversations = source.fields.text is None
    with atomic_directory(folder, replaceable=lambda _: False) as new:
        with (new / UNREAD).open("w", encoding="utf-8", newline="\n") as log:
            read = _Read(source, corpus, log)
            facts = write_store(
                new, _encoded(read, tokenizer, advance),
                eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size, conversations=conversations,
            )  # fmt: skip
        facts |= {
            "licence": source.licence, "conversations": conversations, "unread": dict(sorted(read.unread.items())),
            "files_sha256": key,
        }  # fmt: skip
        (new / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _encoded(read: _Read, tokenizer: Tokenizer, advance: Advance) -> Iterator[Encoded]:
    for batch in batched(read.documents(), BATCH_CHARACTERS, _characters):
        texts = iter(tokenizer.encode_batch([document.text for document in batch if document.text is not None]))
        num_documents = num_bytes = 0
        for document in batch:
            done = _text(document, next(texts)) if document.text is not None else _chat(document, tokenizer, read)
            if done is not None:
                num_documents, num_bytes = num_documents + 1, num_bytes + done.num_bytes
                yield done
        advance(read.source.name, num_documents, num_bytes)


def _text(document: Document, ids: list[int]) -> Encoded:
    return Encoded(document.where, ids, None, len((document.text or "").encode()))


def _chat(document: Document, tokenizer: Tokenizer, read: _Read) -> Encoded | None:
    """None where the chat template refuses it and such documents are left out."""
    try:
        ids, learned = tokenizer.encode_chat_with_mask(document.messages or (), document.tools)
    except AndromedaError as error:
        if read.source.bad == "stop":
            raise AndromedaError(f"source {read.source.name}: {document.where}: {error}") from error
        read.leave_out(Unread(document.where, "no conversation", f"{document.where}: {error}"))
        return None
    return Encoded(document.where, ids, learned, len(tokenizer.decode(ids).encode()))


def _characters(document: Document) -> int:
    if document.text is not None:
        return len(document.text)
    return sum(len(str(message.get("content"))) for message in document.messages or ())


def _build_pack(store: Store, folder: Path, seq_len: int) -> int:
    """The number of sequences."""
    if not folder.is_dir():
        packing = pack(store.lengths, seq_len)
        with atomic_directory(folder, replaceable=lambda _: False) as new:
            for name in PACK_ARRAYS:
                np.save(new / f"{name}.npy", getattr(packing, name))
    return len(np.load(folder / "offsets.npy", mmap_mode="r")) - 1


# ---- fingerprints --------------------------------------------------------------------------------


def _fingerprint(source: Source, corpus: Path) -> str:
    digest = hashlib.sha256()
    for path in source.paths(corpus):
        digest.update(f"{path.relative_to(corpus).as_posix()}\0{_sha256(path)}\n".encode())
    return digest.hexdigest()


def _digest(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AndromedaError(f"{path}: cannot be read: {error.strerror}") from error


def _files(out: Path) -> Iterable[Path]:
    """All of a build but the manifest, which names them, and what a killed writer left."""
    found = (path for path in out.rglob("*") if path.is_file() and path != out / MANIFEST)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(out).parts))
