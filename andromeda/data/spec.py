"""What data is built of: a YAML file of a tokenizer, sources and stages, read into objects that check themselves.

    tokenizer: {vocab_size: 4096}             trained on the sources; or {path: tokenizer.json}, or of a model or a run;
                                              with `chat: true` the marks of our chat template are added to that one
    clean: true                               of all sources that do not say otherwise; rules: see `clean.Rules`
    dedup: near                               off, exact, near, or {threshold: 0.6}; a source may say otherwise
    decontaminate: {files: [gsm8k_test.jsonl], words: 13}    documents that share so many words in a row are removed
    sources:
      verse: {files: [poetry/*.jsonl.xz], licence: public domain, priority: high}
      sums: {files: [gsm8k.jsonl], user: question, assistant: answer, licence: MIT, bad: skip, clean: off}
      code: {files: [code/**/*.py], licence: MIT, augment: {fim_psm: 0.25, fim_spm: 0.25}}
      wiki: {hub: wikimedia/wikipedia, config: 20231101.en, split: train, revision: 40 hex digits, licence: CC BY-SA}
      recall: {synthetic: {task: recall, pairs: 8}, documents: 10000, dedup: exact}
    stages:
      short: {seq_len: 2048, proportions: {verse: 3, sums: 1}, max_epochs: {verse: 2, sums: 4}}
      long: {seq_len: 8192, epochs: {verse: 1}}

Keys of a source: see `sources.Source`, `fields.Fields` and `augment.Rules`, or `generated.Generated`; of a stage: see
`mix.Stage`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from andromeda.checkpoint import tokenizer_path
from andromeda.data.augment import Rules as AugmentRules
from andromeda.data.clean import Rules
from andromeda.data.decontaminate import Decontaminate
from andromeda.data.fields import Fields
from andromeda.data.fingerprint import AnySource
from andromeda.data.generated import Generated
from andromeda.data.hub import Hub
from andromeda.data.minhash import Near
from andromeda.data.mix import Stage, exact
from andromeda.data.sources import DEDUPS, PRIORITIES, Dedup, Source
from andromeda.data.synthetic import make_task
from andromeda.data.values import filled, hint, named, of, one_of, patterns, section
from andromeda.errors import AndromedaError
from andromeda.tokenizer import Tokenizer

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
FIELD_KEYS = tuple(field.name for field in fields(Fields))
HUB_KEYS = ("hub", "config", "split", "revision")
SOURCE_KEYS = ("files", *HUB_KEYS, "licence", "bad", "clean", "dedup", "priority", "augment", *FIELD_KEYS)
GENERATED_KEYS = ("synthetic", "documents", "dedup", "priority")
STAGE_KEYS = tuple(field.name for field in fields(Stage) if field.name != "name")
NEEDED = ("tokenizer", "sources", "stages")
TOP_KEYS = (*NEEDED, "clean", "dedup", "decontaminate", "seed")
TOKENIZER_KEYS = ("path", "vocab_size", "chat")


@dataclass(frozen=True)
class Spec:
    """All that a build depends on besides the corpus.

    Attributes:
        text: the YAML file, as it stands.
        tokenizer_path, vocab_size: one of them.
        chat: the tokenizer named gets our chat template and its control tokens.
        near: what near-duplicates are; None: no source asks for them to be removed.
        decontaminate: None: nothing is.
    """

    text: str
    tokenizer_path: str | None
    vocab_size: int | None
    sources: tuple[AnySource, ...]
    stages: tuple[Stage, ...]
    near: Near | None = None
    decontaminate: Decontaminate | None = None
    seed: int = 0
    chat: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The one that `tokenizer_path` names.

        Raises:
            AndromedaError: there is none, or it has a chat template and is to get ours.
        """
        assert self.tokenizer_path is not None
        tokenizer = Tokenizer.load(tokenizer_path(self.tokenizer_path))
        return tokenizer.for_chat() if self.chat else tokenizer

    @property
    def augments(self) -> dict[str, AugmentRules]:
        """Of the sources of which some documents are changed."""
        rules = {source.name: source.augment for source in self.sources if isinstance(source, Source)}
        return {name: rule for name, rule in rules.items() if rule.techniques}

    def longest(self, source: str) -> int:
        """Tokens of the longest sequence of a source; 0 where no stage takes it."""
        return max((stage.seq_len for stage in self.stages if source in stage.sources), default=0)


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
        values = yaml.load(text, _Loader)  # noqa: S506 - a safe one
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none, say
        raise AndromedaError(f"{name}: is not YAML: {' '.join(str(error).split())}") from error
    try:
        return _spec(text, section(values, "the spec", TOP_KEYS, NEEDED))
    except AndromedaError as error:
        raise AndromedaError(f"{name}: {error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a name that stands twice, of which the library would keep the last: a source would be lost in silence."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:  # type: ignore[override]
        node = super().compose_mapping_node(anchor)  # type: ignore[arg-type]
        found: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in found:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
            found.add(key.value)
        return node


def _spec(text: str, top: Mapping[str, Any]) -> Spec:
    tokenizer = section(top["tokenizer"], "tokenizer", TOKENIZER_KEYS)
    if len({"path", "vocab_size"} & tokenizer.keys()) != 1:
        raise AndromedaError("tokenizer: give either `path` or `vocab_size`")
    chat = of(bool, tokenizer.get("chat", False), "tokenizer.chat")
    if chat and "path" not in tokenizer:
        raise AndromedaError("tokenizer: a vocabulary that is trained has the marks of a chat; drop `chat`")
    path = of(str, tokenizer["path"], "tokenizer.path") if "path" in tokenizer else None
    vocab_size = of(int, tokenizer["vocab_size"], "tokenizer.vocab_size") if path is None else None
    near = _near(top.get("dedup", False))
    defaults = _Defaults(
        _clean(top.get("clean", False), "clean"), "near" if near else _dedup(top.get("dedup", False), "dedup"),
        of(int, top.get("seed", 0), "seed"),
    )  # fmt: skip
    sources = tuple(_source(*item, defaults) for item in named(top["sources"], "sources"))
    if any(source.dedup == "near" for source in sources):
        near = near or Near()
    return Spec(
        text, path, vocab_size, sources, _stages(top["stages"], {source.name for source in sources}),
        near, _decontaminate(top.get("decontaminate", False)), defaults.seed, chat,
    )  # fmt: skip


# ---- sources -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Defaults:
    """Of sources that do not say otherwise."""

    clean: Rules | None
    dedup: Dedup
    seed: int


def _source(name: str, values: Any, defaults: _Defaults) -> AnySource:
    where = f"sources.{name}"
    if not NAME.fullmatch(name):
        raise AndromedaError(f"{where}: {name!r} names a directory; use letters, digits, - and _")
    generated = isinstance(values, dict) and "synthetic" in values
    try:
        return (_generated if generated else _of_files)(name, where, values, defaults)
    except AndromedaError as error:
        message = str(error)
        raise AndromedaError(message if message.startswith(where) else f"{where}: {message}") from error


def _of_files(name: str, where: str, values: Any, defaults: _Defaults) -> Source:
    given = section(values, where, SOURCE_KEYS)
    section(given, where, SOURCE_KEYS, ("hub" if "hub" in given else "files", "licence"))
    chosen = {key: of(str, given[key], f"{where}.{key}") for key in FIELD_KEYS if key in given}
    return Source(
        name,
        patterns(given["files"], f"{where}.files") if "files" in given else (),
        of(str, given["licence"], f"{where}.licence"),
        Fields(**(chosen or {"text": "text"})),
        one_of(("stop", "skip"), given.get("bad", "stop"), f"{where}.bad"),
        _clean(given["clean"], f"{where}.clean") if "clean" in given else defaults.clean,
        _dedup(given["dedup"], f"{where}.dedup") if "dedup" in given else defaults.dedup,
        one_of(PRIORITIES, given.get("priority", "medium"), f"{where}.priority"),
        _augment(given["augment"], f"{where}.augment") if "augment" in given else AugmentRules(),
        _hub({key: of(str, given[key], f"{where}.{key}") for key in HUB_KEYS if key in given}, where),
    )


def _hub(given: Mapping[str, str], where: str) -> Hub | None:
    if not given:
        return None
    section(given, where, HUB_KEYS, ("hub", "split"))
    return Hub(given["hub"], given["split"], given.get("revision"), given.get("config"))


def _generated(name: str, where: str, values: Any, defaults: _Defaults) -> Generated:
    given = section(values, where, GENERATED_KEYS, ("synthetic", "documents"))
    parameters = dict(named(given["synthetic"], f"{where}.synthetic"))
    if "task" not in parameters:
        raise AndromedaError(f"{where}.synthetic: has no `task`, which it needs")
    task = make_task(of(str, parameters.pop("task"), f"{where}.synthetic.task"), **parameters)
    alike = "exact" if defaults.dedup == "near" else defaults.dedup  # as tasks are that differ by a number
    return Generated(
        name,
        task,
        of(int, given["documents"], f"{where}.documents"),
        defaults.seed,
        _dedup(given["dedup"], f"{where}.dedup") if "dedup" in given else alike,
        one_of(PRIORITIES, given.get("priority", "medium"), f"{where}.priority"),
    )


def _clean(value: Any, where: str) -> Rules | None:
    return None if value is False else filled(Rules, value, where)


def _dedup(value: Any, where: str) -> Dedup:
    chosen: Dedup = one_of(DEDUPS, "off" if value is False else value, where)  # YAML reads off as false
    return chosen


def _augment(values: Any, where: str) -> AugmentRules:
    given = section(values, where, [field.name for field in fields(AugmentRules)])
    return AugmentRules(**{name: exact(rate, f"{where}.{name}") for name, rate in given.items() if rate != 0})


def _near(value: Any) -> Near | None:
    """Of the spec itself, which alone says from where on documents are alike."""
    if value == "near":
        return Near()
    return filled(Near, value, "dedup") if isinstance(value, dict) else None


def _decontaminate(value: Any) -> Decontaminate | None:
    if value is False:
        return None
    given = section(value, "decontaminate", ("files", "words"), ("files",))
    chosen = {"words": of(int, given["words"], "decontaminate.words")} if "words" in given else {}
    return Decontaminate(patterns(given["files"], "decontaminate.files"), **chosen)


# ---- stages --------------------------------------------------------------------------------------


def _stages(values: Any, sources: set[str]) -> tuple[Stage, ...]:
    stages = tuple(_stage(*item) for item in named(values, "stages"))
    for stage in stages:
        for unknown in (used for used in stage.sources if used not in sources):
            raise AndromedaError(f"stages.{stage.name}: {unknown!r} is no source;{hint(unknown, sources)}")
    return stages


def _stage(name: str, values: Any) -> Stage:
    where = f"stages.{name}"
    given = section(values, where, STAGE_KEYS, ("seq_len",))
    numbers = {
        key: {source: exact(value, f"{where}.{key}.{source}") for source, value in named(given[key], f"{where}.{key}")}
        for key in ("epochs", "proportions", "max_epochs")
        if key in given
    }
    counts = {key: of(int, given[key], f"{where}.{key}") for key in ("seq_len", "num_sequences") if key in given}
    return Stage(name, **counts, **numbers)  # type: ignore[arg-type]
