"""What data is built of: a YAML file of a tokenizer, sources and stages, read into objects that check themselves.

    tokenizer: {vocab_size: 4096}             trained on the sources; or {path: tokenizer.json}
    sources:
      verse: {files: [poetry/*.jsonl.xz], licence: public domain}
      sums: {files: [gsm8k.jsonl], user: question, assistant: answer, licence: MIT, bad: skip}
    stages:
      short: {seq_len: 2048, proportions: {verse: 3, sums: 1}, max_epochs: {verse: 2, sums: 4}}
      long: {seq_len: 8192, epochs: {verse: 1}}

Keys of a source: see `sources.Source` and `fields.Fields`; of a stage: see `mix.Stage`.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from andromeda.data.fields import Fields
from andromeda.data.mix import Stage, exact
from andromeda.data.sources import Source
from andromeda.errors import AndromedaError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
FIELD_KEYS = tuple(field.name for field in fields(Fields))
SOURCE_KEYS = ("files", "licence", "bad", *FIELD_KEYS)
STAGE_KEYS = tuple(field.name for field in fields(Stage) if field.name != "name")
TOP_KEYS = ("tokenizer", "sources", "stages")
TOKENIZER_KEYS = ("path", "vocab_size")


@dataclass(frozen=True)
class Spec:
    """All that a build depends on besides the corpus.

    Attributes:
        text: the YAML file, as it stands.
        tokenizer_path, vocab_size: one of them.
    """

    text: str
    tokenizer_path: str | None
    vocab_size: int | None
    sources: tuple[Source, ...]
    stages: tuple[Stage, ...]
    seed: int = 0

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_spec(path: str | Path) -> Spec:
    """
    Raises:
        AndromedaError: no such file, no YAML, an unknown key, a missing one, or a value that makes no sense; the file
            and the key are named.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise AndromedaError(
            f"{path}: cannot be read: {error.strerror}; name a spec, such as recipes/data/small.yaml"
        ) from error
    except UnicodeDecodeError as error:
        raise AndromedaError(f"{path}: is not UTF-8") from error
    return parse_spec(text, str(path))


def parse_spec(text: str, name: str) -> Spec:
    """`read_spec` of a file's text; `name` is what messages call it."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise AndromedaError(f"{name}: is not YAML: {' '.join(str(error).split())}") from error
    try:
        top = _section(
            values, "the spec", ("tokenizer", "sources", "stages", "seed"), ("tokenizer", "sources", "stages")
        )
        tokenizer = _section(top["tokenizer"], "tokenizer", TOKENIZER_KEYS)
        if len(tokenizer) != 1:
            raise AndromedaError("tokenizer: give either `path` or `vocab_size`")
        sources = tuple(_source(*item) for item in _named(top["sources"], "sources"))
        stages = tuple(_stage(*item) for item in _named(top["stages"], "stages"))
        known = {source.name for source in sources}
        for stage in stages:
            for unknown in (used for used in stage.sources if used not in known):
                raise AndromedaError(f"stages.{stage.name}: {unknown!r} is no source;{_hint(unknown, known)}")
        vocab_size = tokenizer.get("vocab_size")
        return Spec(
            text, _of(str, tokenizer.get("path"), "tokenizer.path"), _of(int, vocab_size, "tokenizer.vocab_size"),
            sources, stages, _of(int, top.get("seed", 0), "seed") or 0,
        )  # fmt: skip
    except AndromedaError as error:
        raise AndromedaError(f"{name}: {error}") from error


def _source(name: str, values: Any) -> Source:
    where = f"sources.{name}"
    given = _section(values, where, SOURCE_KEYS, ("files", "licence"))
    if not NAME.fullmatch(name):
        raise AndromedaError(f"{where}: {name!r} names a directory; use letters, digits, - and _")
    patterns = [given["files"]] if isinstance(given["files"], str) else given["files"]
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise AndromedaError(f"{where}.files: must be a list of patterns")
    chosen = {key: _of(str, given[key], f"{where}.{key}") for key in FIELD_KEYS if key in given}
    if given.get("bad", "stop") not in ("stop", "skip"):
        raise AndromedaError(f"{where}.bad: must be stop or skip; got {given['bad']!r}")
    licence = _of(str, given["licence"], f"{where}.licence") or ""
    try:
        return Source(name, tuple(patterns), licence, Fields(**(chosen or {"text": "text"})), given.get("bad", "stop"))
    except AndromedaError as error:
        raise AndromedaError(f"{where}: {error}") from error


def _stage(name: str, values: Any) -> Stage:
    where = f"stages.{name}"
    given = _section(values, where, STAGE_KEYS, ("seq_len",))
    numbers = {
        key: {
            str(source): exact(value, f"{where}.{key}.{source}")
            for source, value in _named(given[key], f"{where}.{key}")
        }
        for key in ("epochs", "proportions", "max_epochs")
        if key in given
    }
    counts = {key: _of(int, given[key], f"{where}.{key}") for key in ("seq_len", "num_sequences") if key in given}
    return Stage(name, **counts, **numbers)  # type: ignore[arg-type]


def _section(values: Any, where: str, known: Iterable[str], needed: Iterable[str] = ()) -> Mapping[str, Any]:
    known = tuple(known)
    if not isinstance(values, dict):
        raise AndromedaError(f"{where}: must hold keys; there are {', '.join(known)}")
    for key in values:
        if key not in known:
            raise AndromedaError(f"{where}: no key {key!r};{_hint(str(key), known)}")
    for key in needed:
        if key not in values:
            raise AndromedaError(f"{where}: has no `{key}`, which it needs")
    return values


def _named(values: Any, where: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(values, dict) or not values:
        raise AndromedaError(f"{where}: must hold names and what they stand for")
    return [(str(name), value) for name, value in values.items()]


def _of(kind: type, value: Any, where: str) -> Any:
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise AndromedaError(f"{where}: must be {'text' if kind is str else 'a whole number'}; got {value!r}")
    return value


def _hint(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f" did you mean {close[0]!r}?" if close else f" there are {', '.join(known)}"
