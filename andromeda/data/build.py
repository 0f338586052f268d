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
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from andromeda.atomic import atomic_directory, locked, replace_file
from andromeda.data.across import Across, find_duplicates
from andromeda.data.augment import Augmenter
from andromeda.data.encode import Done, Encode, build_store, stay
from andromeda.data.encode import Work as Lines
from andromeda.data.generated import Generated
from andromeda.data.mix import Mix
from andromeda.data.pack import pack
from andromeda.data.sift import Advance, AnySource, Sift, sift
from andromeda.data.sift import Work as Items
from andromeda.data.spec import Spec
from andromeda.data.store import Store
from andromeda.data.texts import Batch, Texts, from_line
from andromeda.data.workers import Workers, cores
from andromeda.errors import AndromedaError
from andromeda.tokenizer import SPECIAL_TOKENS, Tokenizer

FORMAT = 2
MANIFEST, SPEC, OWNER = "manifest.json", "spec.yaml", "build.key"
LEARNED_FROM = 1 << 28  # bytes of text are plenty for a vocabulary
WORK, EVALUATIONS = ".work", "evaluations.json"
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
    if spec.tokenizer_path is not None:
        _augmenters(spec, Tokenizer.load(spec.tokenizer_path))
    keys = {source.name: _fingerprint(source, corpus) for source in spec.sources}
    evaluations = _files_digest(spec.decontaminate.paths(corpus), corpus) if spec.decontaminate else ""
    key = _digest(FORMAT, spec.sha256, _tokenizer_key(spec), *keys.values(), evaluations)
    _claim(out, key)
    with _alone(out):
        if not (out / MANIFEST).is_file():
            manifest = _made(spec, corpus, out, keys, evaluations, num_workers or cores(), advance)
            replace_file(out / MANIFEST, json.dumps({"format": FORMAT, "key": key, **manifest}, indent=1) + "\n")
    return read_manifest(out)


def _made(
    spec: Spec, corpus: Path, out: Path, keys: Mapping[str, str], evaluations: str, num_workers: int, advance: Advance
) -> dict[str, Any]:
    """Makes all but the manifest; what that says besides its format and key."""
    if not (out / SPEC).is_file():
        replace_file(out / SPEC, spec.text)
    stores = _stores(spec, corpus, out, keys, num_workers, advance)
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
        "files": {path.relative_to(out).as_posix(): _sha256(path) for path in _files(out)},
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
        found = threads.map(lambda name: _sha256(out / name) if (out / name).is_file() else None, manifest["files"])
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


def _stores(
    spec: Spec, corpus: Path, out: Path, keys: Mapping[str, str], num_workers: int, advance: Advance
) -> dict[str, Store]:
    folders = {source.name: out / "sources" / source.name for source in spec.sources}
    if not all(folder.is_dir() for folder in folders.values()):
        texts = _texts(spec, corpus, out, num_workers, advance)
        across = None
        if any(source.dedup != "off" for source in spec.sources):
            find_duplicates(spec.sources, texts, spec.near, out / WORK / "duplicates")
            across = Across(spec.sources, texts, out / WORK / "duplicates")
        tokenizer = _tokenizer(spec, out / "tokenizer", texts, across)
        bad = {source.name: "stop" if isinstance(source, Generated) else source.bad for source in spec.sources}
        encode = Encode(tokenizer, bad, _augmenters(spec, tokenizer))
        with Workers[Lines, Done](encode, num_workers) as workers:
            for source in spec.sources:
                facts = {"licence": source.licence, "priority": source.priority, "files_sha256": keys[source.name]}
                build_store(
                    source, texts[source.name], across, folders[source.name], tokenizer, workers, facts, advance
                )
    shutil.rmtree(out / WORK, ignore_errors=True)
    return {name: Store(folder) for name, folder in folders.items()}


def _texts(spec: Spec, corpus: Path, out: Path, num_workers: int, advance: Advance) -> dict[str, Texts]:
    folder, evaluations = out / WORK / "texts", None
    if spec.decontaminate and not all((folder / source.name).is_dir() for source in spec.sources):
        evaluations = spec.decontaminate.read(corpus)
        counts = {"texts": evaluations.num_texts, "too_short": len(evaluations.untested)}
        replace_file(out / EVALUATIONS, json.dumps(counts) + "\n")
    function = Sift({source.name: source for source in spec.sources}, evaluations, spec.near)
    with Workers[Items, Batch](function, num_workers) as workers:
        for source in spec.sources:
            sift(source, corpus, folder / source.name, workers, advance)
    return {source.name: Texts(folder / source.name) for source in spec.sources}


def _tokenizer(spec: Spec, folder: Path, texts: Mapping[str, Texts], across: Across | None) -> Tokenizer:
    if not folder.is_dir():
        if spec.tokenizer_path is None:
            assert spec.vocab_size is not None
            sentinels = dict.fromkeys(token for rules in spec.augments.values() for token in rules.sentinels)
            special = (*SPECIAL_TOKENS, *sentinels)
            made = Tokenizer.train(_said(texts, across), spec.vocab_size, special_tokens=special)
        else:
            made = Tokenizer.load(spec.tokenizer_path)
        with atomic_directory(folder, replaceable=lambda _: False) as new:
            made.save(new)
    return Tokenizer.load(folder)


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


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Only this process builds in `out`, where the file system has locks."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out / OWNER, wait=False))
        except BlockingIOError as error:
            raise AndromedaError(f"{out}: another process builds there; wait until it is done") from error
        yield


def _tokenizer_key(spec: Spec) -> str:
    return str(spec.vocab_size) if spec.tokenizer_path is None else Tokenizer.load(spec.tokenizer_path).sha256


def _build_pack(store: Store, folder: Path, seq_len: int) -> int:
    """The number of sequences."""
    if not folder.is_dir():
        packing = pack(store.lengths, seq_len)
        with atomic_directory(folder, replaceable=lambda _: False) as new:
            for name in PACK_ARRAYS:
                np.save(new / f"{name}.npy", getattr(packing, name))
    return len(np.load(folder / "offsets.npy", mmap_mode="r")) - 1


# ---- fingerprints --------------------------------------------------------------------------------


def _fingerprint(source: AnySource, corpus: Path) -> str:
    """Of its files; what is generated follows from the spec."""
    return "" if isinstance(source, Generated) else _files_digest(source.paths(corpus), corpus)


def _files_digest(paths: Iterable[Path], corpus: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
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
    """All of a build but the manifest, which names them, the report, and what a killed writer left."""
    others = {out / name for name in (MANIFEST, REPORT, PICTURE)}
    found = (path for path in out.rglob("*") if path.is_file() and path not in others)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(out).parts))
