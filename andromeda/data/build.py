"""A spec and a corpus folder -> a directory that training reads: documents as tokens, packed, and a manifest of it all.

    manifest.json          written last: without it there is no build
    spec.yaml, build.key   the spec as it was given, and what this is a build of
    tokenizer/             tokenizer.json and its like
    evaluations.json       how many evaluation texts documents were compared with, where the spec names some
    sources/NAME/          see `store`; what could not be read stands in unread.txt, what was removed in removed.txt
    packs/NAME-LENGTH/     see `pack`: offsets.npy, documents.npy, starts.npy, lengths.npy
    report.md, report.png  see `report`; not part of the manifest, since other releases draw other pictures
    .work/                 while it is built: what is kept of each source, see `texts`, and the duplicates, see `across`

Each source, each pack and each part of .work appears whole, so a build that was killed goes on where it was. Two builds
of one spec and corpus are the same byte for byte, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from andromeda.atomic import atomic_directory, locked, replace_file
from andromeda.data import files
from andromeda.data.across import Across, find_duplicates
from andromeda.data.augment import Augmenter
from andromeda.data.encode import Encode, build_store, stay
from andromeda.data.encode import Work as Lines
from andromeda.data.fingerprint import check_unchanged, fingerprint
from andromeda.data.generated import Generated
from andromeda.data.mix import Mix
from andromeda.data.pack import pack
from andromeda.data.parts import Done, folders_of_parts, join_texts
from andromeda.data.sift import Advance, Sift, sift
from andromeda.data.sift import Work as Items
from andromeda.data.spec import Spec
from andromeda.data.store import Store
from andromeda.data.texts import Batch, Texts, from_line
from andromeda.data.workers import Workers, apart, cores
from andromeda.errors import AndromedaError
from andromeda.tokenizer import SPECIAL_TOKENS, Tokenizer

FORMAT = 2
MANIFEST, SPEC, OWNER = "manifest.json", "spec.yaml", "build.key"
LEARNED_FROM = 1 << 28  # bytes of text are plenty for a vocabulary
WORK, EVALUATIONS = ".work", "evaluations.json"
TEXT_PARTS, TOKEN_PARTS = f"{WORK}/parts/texts", f"{WORK}/parts/tokens"
REPORT, PICTURE = "report.md", "report.png"
PACK_ARRAYS = ("offsets", "documents", "starts", "lengths")


def build(spec: Spec, corpus: Path, out: Path, advance: Advance, num_workers: int | None = None) -> dict[str, Any]:
    """Builds what is not yet there.

    Args:
        spec: what.
        corpus: the folder in which the sources' files lie.
        out: a new directory, or one of an earlier build of the same spec and corpus.
        advance: called as documents are read and tokenised.
        num_workers: processes; None: one for each core. They are started where there is much to do, and import the
            main module again, so a script calls this below `if __name__ == "__main__"`.

    Returns:
        The manifest.

    Raises:
        AndromedaError: a source cannot be read, a stage cannot be made of it, the spec's tokenizer lacks a token that
            `augment` needs, `out` holds something else, another process builds there, or writing failed.
    """
    job = begin(spec, corpus, out, num_workers, advance)
    with _explained(out), alone(out):
        if not (out / MANIFEST).is_file():
            manifest = {"format": FORMAT, "key": job.key, **_made(job)}
            replace_file(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return read_manifest(out)


@dataclass(frozen=True)
class Job:
    """What is built, of what, where, and how.

    Attributes:
        fingerprints: of each source.
        evaluations: fingerprint of the evaluation texts; empty where there are none.
    """

    spec: Spec
    corpus: Path
    out: Path
    fingerprints: Mapping[str, str]
    evaluations: str
    num_workers: int
    advance: Advance

    @property
    def key(self) -> str:
        spec = self.spec
        return _digest(FORMAT, spec.sha256, _tokenizer_key(spec), *self.fingerprints.values(), self.evaluations)


def begin(spec: Spec, corpus: Path, out: Path, num_workers: int | None, advance: Advance) -> Job:
    """Makes `out` the directory of this build, if it is not. Arguments and errors are those of `build`."""
    if spec.tokenizer_path is not None:
        _augmenters(spec, spec.tokenizer())
    keys = {source.name: fingerprint(source, corpus) for source in spec.sources}
    evaluations = fingerprint(spec.decontaminate, corpus) if spec.decontaminate else ""
    job = Job(spec, corpus, out, keys, evaluations, num_workers or cores(), advance)
    with _explained(out):
        _claim(out, job.key)
    return job


def _made(job: Job) -> dict[str, Any]:
    """Makes all but the manifest; what that says besides its format and key."""
    spec, out, evaluations = job.spec, job.out, job.evaluations
    if not (out / SPEC).is_file():
        replace_file(out / SPEC, spec.text)
    stores = _stores(job)
    sizes = {}
    for name, seq_len in dict.fromkeys((name, stage.seq_len) for stage in spec.stages for name in stage.sources):
        sizes[name, seq_len] = _build_pack(stores[name], out / "packs" / f"{name}-{seq_len}", seq_len)
    mix = Mix(spec.stages, sizes, spec.seed)
    return {
        "spec_sha256": spec.sha256,
        "tokenizer_sha256": Tokenizer.load(out / "tokenizer").sha256,
        "evaluations": {"sha256": evaluations, **json.loads((out / EVALUATIONS).read_bytes())} if evaluations else None,
        "sources": {name: store.facts for name, store in stores.items()},
        "stages": {
            stage.name: {"seq_len": stage.seq_len, "sequences": dict(zip(mix.sources, counts.tolist(), strict=True))}
            for stage, counts in zip(mix.stages, mix.counts, strict=True)
        },
        "num_sequences": len(mix),
        "files": {path.relative_to(out).as_posix(): files.sha256(path) for path in _files(out)},
    }


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
    with ThreadPoolExecutor(cores()) as threads:
        found = threads.map(
            lambda name: files.sha256(out / name) if (out / name).is_file() else None, manifest["files"]
        )
    for (name, expected), digest in zip(manifest["files"].items(), found, strict=True):
        if digest is None:
            problems.append(f"{name}: is missing")
        elif digest != expected:
            problems.append(f"{name}: is not what was built")
    known = set(manifest["files"])
    problems += [
        f"{name}: was not built" for path in _files(out) if (name := path.relative_to(out).as_posix()) not in known
    ]
    return problems


# ---- the sources ---------------------------------------------------------------------------------


def _stores(job: Job) -> dict[str, Store]:
    spec, out = job.spec, job.out
    folders = {source.name: out / "sources" / source.name for source in spec.sources}
    if not all(folder.is_dir() for folder in folders.values()):
        found = compare(job)
        with Workers[Lines, Done](found.encode, job.num_workers) as workers:
            for source in spec.sources:
                facts = {
                    "licence": source.licence, "priority": source.priority,
                    "files_sha256": job.fingerprints[source.name],
                }  # fmt: skip
                parts = folders_of_parts(out / TOKEN_PARTS, source.name)
                build_store(
                    source, found.texts[source.name], found.across, folders[source.name], found.encode.tokenizer,
                    workers, parts, facts, job.advance,
                )  # fmt: skip
    shutil.rmtree(out / WORK, ignore_errors=True)
    return {name: Store(folder) for name, folder in folders.items()}


@dataclass(frozen=True)
class Compared:
    """What is known when all sources are read: their texts, which of them are duplicates, and how they are encoded."""

    texts: Mapping[str, Texts]
    across: Across | None
    encode: Encode


def compare(job: Job) -> Compared:
    """Reads the sources, or joins what tasks read of them; finds duplicates; trains the vocabulary.

    Raises:
        AndromedaError: as `build`.
    """
    texts = _texts(job)
    folder = job.out / WORK / "duplicates"
    if any(source.dedup != "off" for source in job.spec.sources):
        find_duplicates(job.spec.sources, texts, job.spec.near, folder)
    _tokenizer(job.spec, job.out, job.num_workers)
    return compared(job.spec, job.out)


def compared(spec: Spec, out: Path) -> Compared:
    """What `compare` has found."""
    texts = _kept(spec, out)
    tokenizer = Tokenizer.load(out / "tokenizer")
    bad = {source.name: "stop" if isinstance(source, Generated) else source.bad for source in spec.sources}
    return Compared(texts, _across(spec, texts, out), Encode(tokenizer, bad, _augmenters(spec, tokenizer)))


def _kept(spec: Spec, out: Path) -> dict[str, Texts]:
    return {source.name: Texts(out / WORK / "texts" / source.name) for source in spec.sources}


def _across(spec: Spec, texts: Mapping[str, Texts], out: Path) -> Across | None:
    if all(source.dedup == "off" for source in spec.sources):
        return None
    return Across(spec.sources, texts, out / WORK / "duplicates")


def _texts(job: Job) -> dict[str, Texts]:
    spec, corpus, folder = job.spec, job.corpus, job.out / WORK / "texts"
    evaluations = None
    if spec.decontaminate and not all((folder / source.name).is_dir() for source in spec.sources):
        evaluations = spec.decontaminate.read(corpus)
        check_unchanged(spec.decontaminate, corpus, job.evaluations)
        counts = {"texts": evaluations.num_texts, "too_short": len(evaluations.untested)}
        replace_file(job.out / EVALUATIONS, json.dumps(counts) + "\n")
    function = Sift({source.name: source for source in spec.sources}, evaluations, spec.near)
    with Workers[Items, Batch](function, job.num_workers) as workers:
        for source in spec.sources:
            done = folder / source.name
            if done.is_dir():  # and of its parts perhaps some are left
                continue
            if parts := folders_of_parts(job.out / TEXT_PARTS, source.name):
                join_texts(parts, done)
            else:
                sift(source, corpus, done, workers, job.advance, key=job.fingerprints[source.name])
    return _kept(spec, job.out)


def _tokenizer(spec: Spec, out: Path, num_workers: int) -> None:
    folder = out / "tokenizer"
    if not folder.is_dir():
        if spec.tokenizer_path is None:
            size = sum(texts.facts["num_bytes"] for texts in _kept(spec, out).values())
            made = apart(partial(_trained, spec, out), size, num_workers)  # the library gives no memory back
        else:
            made = spec.tokenizer()
        with atomic_directory(folder, replaceable=lambda _: False) as new:
            made.save(new)


def _trained(spec: Spec, out: Path) -> Tokenizer:
    assert spec.vocab_size is not None
    sentinels = dict.fromkeys(token for rules in spec.augments.values() for token in rules.sentinels)
    texts = _kept(spec, out)
    said = _said(texts, _across(spec, texts, out))
    return Tokenizer.train(said, spec.vocab_size, special_tokens=(*SPECIAL_TOKENS, *sentinels))


def _augmenters(spec: Spec, tokenizer: Tokenizer) -> dict[str, Augmenter]:
    """By source. A document fills a sequence with the end-of-text token before it."""
    return {
        name: Augmenter(rules, tokenizer, spec.seed, name, spec.longest(name) - 1)
        for name, rules in spec.augments.items()
    }


def _said(texts: Mapping[str, Texts], across: Across | None) -> Iterator[str]:
    """What a vocabulary is trained on: all texts that stay, and the messages of conversations.

    Of a corpus above LEARNED_FROM every second document, or third, and so on: training keeps each different word.
    """
    step = -(-sum(source.facts["num_bytes"] for source in texts.values()) // LEARNED_FROM) or 1
    for name, source in texts.items():
        for line in islice(stay(name, source, across), 0, None, step):
            document = from_line(line)
            if document.text is not None:
                yield document.text
            else:
                yield from (str(message.get("content") or "") for message in document.messages or ())


# ---- other parts ---------------------------------------------------------------------------------


def _claim(out: Path, key: str) -> None:
    """Makes `out` the directory of this build."""
    owner = out / OWNER
    if out.exists() and not out.is_dir():
        raise AndromedaError(f"{out}: is a file; name a new directory")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):  # of several that begin here at the same time, one is the first
        if owner.is_file():
            if owner.read_text(encoding="utf-8").strip() != key:
                raise AndromedaError(
                    f"{out}: was begun with another spec, tokenizer or corpus; name a new directory, or delete it"
                )
        elif any(not path.name.startswith(".") for path in out.iterdir()):
            raise AndromedaError(f"{out}: holds something else; name a new directory")
        else:
            replace_file(owner, key + "\n")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Only this process builds in `out`, where the file system has locks."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out / OWNER, wait=False))
        except BlockingIOError as error:
            raise AndromedaError(f"{out}: another process builds there; wait until it is done") from error
        yield


def _tokenizer_key(spec: Spec) -> str:
    return str(spec.vocab_size) if spec.tokenizer_path is None else spec.tokenizer().sha256


def _build_pack(store: Store, folder: Path, seq_len: int) -> int:
    """The number of sequences."""
    if not folder.is_dir():
        packing = pack(store.lengths, seq_len)
        with atomic_directory(folder, replaceable=lambda _: False) as new:
            for name in PACK_ARRAYS:
                np.save(new / f"{name}.npy", getattr(packing, name))
    return len(np.load(folder / "offsets.npy", mmap_mode="r")) - 1


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AndromedaError(
            f"{out}: cannot be written: {error.strerror or error}; if the disk is full, free space, and run the same "
            "command again to go on"
        ) from error


def _digest(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _files(out: Path) -> Iterable[Path]:
    """All of a build but the manifest, which names them, the report, and what a killed writer left."""
    others = {out / name for name in (MANIFEST, REPORT, PICTURE)}
    found = (path for path in out.rglob("*") if path.is_file() and path not in others)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(out).parts))
