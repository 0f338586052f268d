"""What is trained, on what, and how: a YAML file that checks itself, and overrides for single keys.

Paths in a recipe are those of the command line: relative to the current directory, wherever the recipe lies.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
import yaml

from andromeda.config import AndromedaConfig, preset
from andromeda.errors import AndromedaError
from andromeda.training import continued
from andromeda.training.lora_recipe import LoraRecipe
from andromeda.training.nebula.nebula import Balancing
from andromeda.training.nebula.recipe import OF_TEXT, Pooling, TaskKind, TaskRecipe, check_tasks

Schedule = Literal["cosine", "wsd", "constant"]
Precision = Literal["float32", "bfloat16", "float16", "fp8"]
OptimizerName = Literal["adamw", "adamw8bit", "muon"]
Checkpointing = Literal["none", "selective", "full"]
EngineName = Literal["ddp", "fsdp", "zero3"]
Offload = Literal["none", "cpu", "nvme"]
FailedSave = Literal["stop", "go_on"]
Tracker = Literal["tensorboard", "trackio"]
Method = Literal["diloco", "local_sgd"]
Scalar = int | float | bool | str | None

# `preset`, and keys of the config; or `from` (a model directory or a run to go on from), and some of `continued.KEYS`
ModelKeys = dict[str, Scalar]

DEFAULT_STEPS = 1000
NUM_TOKENS_MULTIPLE = 64  # a vocabulary of this multiple keeps the logits' matrix product aligned


@dataclass(frozen=True)
class DataRecipe:
    """Text files (.txt, .md, .jsonl, each also .gz, .xz or .zst), or a build of `andromeda data build` to train on."""

    train: list[str] | str = field(default_factory=list)
    build: str | None = None  # its directory, in place of `train`; it brings tokenizer, sequences and their order
    pairs: list[str] | str = field(default_factory=list)  # in place of `train`: `prompt`, `chosen`, `rejected` (DPO)
    validation: list[str] | str = field(default_factory=list)  # text; beside `pairs` also pairs that are held out
    packed_documents: bool = True  # documents that share a sequence do not see each other

    @property
    def train_paths(self) -> list[str]:
        return [self.train] if isinstance(self.train, str) else self.train

    @property
    def pairs_paths(self) -> list[str]:
        return [self.pairs] if isinstance(self.pairs, str) else self.pairs

    @property
    def validation_paths(self) -> list[str]:
        return [self.validation] if isinstance(self.validation, str) else self.validation


@dataclass(frozen=True)
class TokenizerRecipe:
    """A tokenizer that exists, or the size of one to train on the training files.

    With neither: that of the model that training goes on from, or a new one of the model's num_tokens.
    """

    vocab_size: int | None = None
    path: str | None = None  # a tokenizer.json, or the directory it lies in


@dataclass(frozen=True)
class DiLoCoRecipe:
    """Groups that train each by itself, with a seed of its own, and now and then take a step together."""

    lighthouse: str  # where torchft_lighthouse runs, as http://host:29510
    host: str | None = None  # name or address by which other groups reach this machine; its own name
    every: int = 100  # steps between two exchanges
    method: Method = "diloco"  # local_sgd: all go on from the mean of their weights, without an outer optimizer


@dataclass(frozen=True)
class Recipe:
    """All that a training run depends on.

    Raises:
        AndromedaError: a value out of range, or values that do not go together.
    """

    data: DataRecipe
    model: ModelKeys
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    lora: LoraRecipe | None = None  # of model.from an adapter is trained, and nothing else
    tasks: dict[str, TaskRecipe] = field(default_factory=dict)  # by name; none: the next token of `data` alone
    balance: Balancing = "fixed"  # of the tasks: by their weights alone, learned `uncertainty`, or `famo`
    output: str = ""  # the run directory; runs/NAME for NAME.yaml

    steps: int | None = None  # 1,000; with data.build as many as there are, which is also the most
    batch_size: int = 16  # sequences at once; with data.build of its longest, more of shorter ones, the same tokens;
    # with data.pairs of chosen answers, beside as many of rejected ones
    accumulate: int = 1  # batches a step
    seq_len: int | None = None  # tokens a sequence; the model's max_seq_len. A build has its own

    optimizer: OptimizerName = "adamw"  # adamw8bit: its moments in 8 bits; muon: matrices by Muon, all else by AdamW
    learning_rate: float = 1e-3  # at its highest; one that suits adamw suits the others
    schedule: Schedule = "cosine"  # wsd: constant, then linear decay in the last decay_fraction of the steps
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_ratio: float = 0.1  # of the learning rate, at the last step
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    dpo_beta: float | None = None  # with data.pairs, how dear it is to leave model.from; 0.1
    clip_norm: float | None = 1.0  # of the whole gradient
    spike: float | None = None  # a step whose gradient is so many times as large as usual is left out
    precision: Precision = "float32"  # of activations, weights are float32; fp8: bfloat16, products of blocks in 8 bits
    checkpointing: Checkpointing = "none"  # of activations: selective keeps products and attention; full, block inputs
    compile: bool = False  # blocks by torch.compile: minutes before the first step, then faster
    engine: EngineName = "ddp"  # of several processes: each has all weights; fsdp and zero3: each has a part of them
    offload: Offload = "none"  # with zero3: where weights and the optimizer's state lie while they are not needed
    nvme_path: str | None = None  # with offload: nvme, a directory on a fast disk of each machine
    context_parallel: int = 1  # so many processes share each sequence; a multiple of them share the sequences
    diloco: DiLoCoRecipe | None = None  # groups far from each other; null: there is one
    seed: int = 0

    log_every: int = 10  # steps; so are the next two
    validate_every: int = 200
    save_every: int = 200
    track: list[Tracker] = field(default_factory=list)  # dashboards to fill, beside metrics.jsonl: tensorboard, trackio
    keep_last: int = 2  # checkpoints
    keep_best: bool = False  # that of the lowest validation too
    patience: float = 1800.0  # seconds; of several processes, when none gets on for so long, all stop
    failed_save: FailedSave = "stop"  # go_on: of a full disk, say, it is told, and training goes on

    def __post_init__(self) -> None:
        counts = ("batch_size", "accumulate", "context_parallel", "keep_last")
        for name in (*counts, "log_every", "validate_every", "save_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _require(self.steps is None or self.steps >= 1, "steps", self.steps, "must be at least 1")
        _require(self.seq_len is None or self.seq_len >= 2, "seq_len", self.seq_len, "must be at least 2")
        for name in ("learning_rate", "weight_decay"):
            _require(math.isfinite(getattr(self, name)), name, getattr(self, name), "must be finite")
        for name in ("warmup_steps", "weight_decay"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "must lie between 0 and 2^63 - 1")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be positive")
        _require(0 < self.decay_fraction <= 1, "decay_fraction", self.decay_fraction, "must lie in (0, 1]")
        _require(0 <= self.final_ratio <= 1, "final_ratio", self.final_ratio, "must lie in [0, 1]")
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", list(self.betas), "must lie in [0, 1)")
        _require(
            self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "must be positive; null for none"
        )
        _require(self.patience > 0, "patience", self.patience, "must be positive")
        _require(self.spike is None or self.spike > 1, "spike", self.spike, "must be more than 1; null for none")
        _require(
            self.precision != "fp8" or self.lora is None,
            "precision", self.precision, "is for whole weights, not for the thin ones of lora; take bfloat16",
        )  # fmt: skip
        if self.context_parallel > 1:
            self._check_context()
        self._check_engine()
        if self.diloco is not None:
            self._check_diloco(self.diloco)
        if self.data.build is not None:
            self._check_build()
        if self.data.pairs:
            self._check_pairs()
        what = "is for data.pairs; leave it out"
        _require(self.dpo_beta is None or bool(self.data.pairs), "dpo_beta", self.dpo_beta, what)
        if self.reads_text and not (self.data.build or self.data.pairs or self.data.train_paths):
            _require(False, "data.train", self.data.train, "must name at least one file, or data.build a build")
        _require(all(self.data.train_paths), "data.train", self.data.train, "is empty; name text files")
        _require(
            all(self.data.validation_paths), "data.validation", self.data.validation,
            "is empty; name text files, or [] for no validation",
        )  # fmt: skip
        _require(
            self.tokenizer.path is None or self.tokenizer.vocab_size is None,
            "tokenizer.vocab_size", self.tokenizer.vocab_size, "is for a new tokenizer; leave it out or tokenizer.path",
        )  # fmt: skip
        _require(
            "from" not in self.model or "preset" not in self.model,
            "model.preset", self.model.get("preset"), "cannot change the model of model.from; leave one out",
        )  # fmt: skip
        for name in ("from", "preset"):
            value = self.model.get(name, "")
            _require(isinstance(value, str), f"model.{name}", value, "must be a name")
        if self.lora is not None:
            self.lora.check()
            if self.model_from is None:
                raise AndromedaError("recipe: lora needs model.from, a model to adapt")
        if self.model_from is not None:
            self._check_from()
        self._check_tasks()

    def _check_from(self) -> None:
        for key, value in self.model_keys.items():
            what = f"cannot change the model of model.from; of that, only {', '.join(continued.KEYS)} can"
            _require(key in continued.KEYS, f"model.{key}", value, what)
        _require(
            self.tokenizer.vocab_size is None, "tokenizer.vocab_size", self.tokenizer.vocab_size,
            "is for a new tokenizer, and the model of model.from has its own; leave it out",
        )  # fmt: skip

    def _check_context(self) -> None:
        key, value = "context_parallel", self.context_parallel
        _require(not self.data.pairs, key, value, "does not go with data.pairs yet: an answer's tokens stay together")
        _require(not self.tasks, key, value, "does not go with tasks yet, whose heads see whole texts; leave one out")
        _require(not self.compile, key, value, "does not go with compile yet; leave one out")

    def _check_engine(self) -> None:
        _require(
            self.engine != "fsdp" or self.optimizer != "adamw8bit",
            "optimizer", self.optimizer, "cannot be gathered from engine='fsdp' yet; take adamw, or engine='ddp'",
        )  # fmt: skip
        _require(
            self.engine != "zero3" or self.optimizer == "adamw",
            "optimizer", self.optimizer, "is not exact with engine='zero3', which holds parts of matrices; take adamw",
        )  # fmt: skip
        if self.engine == "zero3":
            what = "does not go with engine='zero3', where a weight that a batch leaves out keeps an old gradient"
            _require(not self.tasks, "tasks", list(self.tasks), what)
            # Of DeepSpeed's own loss scale, and where modules that it watches are taken apart: not tried.
            _require(
                self.precision in ("float32", "bfloat16"),
                "precision", self.precision, "does not go with engine='zero3'; take bfloat16",
            )  # fmt: skip
            _require(not self.compile, "compile", True, "does not go with engine='zero3'; take another, or false")
            what = "does not go with engine='zero3' yet; take another"
            _require(self.context_parallel == 1, "context_parallel", self.context_parallel, what)
        _require(
            self.engine == "zero3" or self.offload == "none",
            "offload", self.offload, f"is for engine='zero3', not {self.engine!r}; change one of them",
        )  # fmt: skip
        _require(
            (self.nvme_path is not None) == (self.offload == "nvme"),
            "nvme_path", self.nvme_path, "goes with offload='nvme', and names a directory; give both or none",
        )  # fmt: skip

    def _check_diloco(self, diloco: DiLoCoRecipe) -> None:
        _require(diloco.every >= 1, "diloco.every", diloco.every, "must be at least 1")
        _require(
            self.data.build is None, "data.build", self.data.build, "is the same for all groups of diloco; name texts"
        )
        alone = self.lora is None and not self.tasks and self.engine != "zero3" and self.context_parallel == 1
        _require(alone, "diloco", diloco.lighthouse, "does not go with lora, tasks, zero3 or context_parallel yet")

    def _check_build(self) -> None:
        _require(bool(self.data.build), "data.build", self.data.build, "is empty; name the directory of a build")
        _require(not self.data.train, "data.train", self.data.train, "cannot be read beside data.build; leave one out")
        _require(self.data.packed_documents, "data.packed_documents", False, "is for data.train; drop it")
        _require(self.seq_len is None, "seq_len", self.seq_len, "is for data.train; a build has lengths of its own")
        for name, value in asdict(self.tokenizer).items():
            _require(value is None, f"tokenizer.{name}", value, "is for data.train; a build has its tokenizer")

    def _check_pairs(self) -> None:
        _require(all(self.data.pairs_paths), "data.pairs", self.data.pairs, "is empty; name files of pairs")
        for name in ("train", "build"):
            value = getattr(self.data, name)
            _require(not value, f"data.{name}", value, "cannot be read beside data.pairs; leave one out")
        _require(self.data.packed_documents, "data.packed_documents", False, "is for data.train; drop it")
        _require(self.dpo_beta is None or self.dpo_beta > 0, "dpo_beta", self.dpo_beta, "must be positive")
        what = "needs model.from, the model whose answers they are about"
        _require(self.model_from is not None, "data.pairs", self.data.pairs, what)

    def _check_tasks(self) -> None:
        check_tasks(self.tasks, self.balance)
        _require(not (self.tasks and self.data.pairs), "data.pairs", self.data.pairs, "cannot be read beside `tasks`")
        if not self.reads_text:
            _require(
                self.data.build is None,
                "data.build",
                self.data.build,
                "needs a task of kind language_model or distillation",
            )
            _require(
                bool(self.data.train_paths or self.tokenizer.path or self.model_from), "data.train", self.data.train,
                "must name text to train a tokenizer on, or tokenizer.path or model.from one that exists",
            )  # fmt: skip

    @property
    def reads_text(self) -> bool:
        """Whether `data` is learned; else a tokenizer is trained on it, if on anything."""
        return not self.tasks or any(task.stated_kind in OF_TEXT for task in self.tasks.values())

    @property
    def beta(self) -> float:
        """`dpo_beta`; 0.1, as Rafailov et al. (2023) have it, where the recipe says nothing."""
        return 0.1 if self.dpo_beta is None else self.dpo_beta

    @property
    def activations(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "fp8" else getattr(torch, self.precision)

    @property
    def num_steps(self) -> int:
        """Of the whole run; with data.build, of what `within` returns."""
        return DEFAULT_STEPS if self.steps is None else self.steps

    def within(self, most: int) -> Recipe:
        """The recipe on a build of so many steps. Raises AndromedaError where it asks for more."""
        if self.steps is not None:
            what = f"is more than the {most:,} that {self.data.build} has for this batch_size; leave it out for all"
            _require(self.steps <= most, "steps", self.steps, what)
        return replace(self, steps=most if self.steps is None else self.steps)

    @property
    def model_from(self) -> str | None:
        """Directory of the model to go on from."""
        value = self.model.get("from")
        return None if value is None else str(value)

    @property
    def model_keys(self) -> dict[str, Any]:
        """What the recipe says of the config itself."""
        return {key: value for key, value in self.model.items() if key not in ("from", "preset")}

    def config(self, vocab_size: int | None = None, longest: int | None = None) -> AndromedaConfig:
        """The config of a new model. Its num_tokens, where the recipe names none, is the tokenizer's, rounded up.

        Args:
            vocab_size: of the tokenizer; None while it is not known.
            longest: tokens of the longest sequence of a build: max_seq_len where the recipe names none.

        Raises:
            AndromedaError: a key or value that the config refuses.
        """
        keys = self.model_keys
        if vocab_size is not None:
            keys.setdefault("num_tokens", -(-vocab_size // NUM_TOKENS_MULTIPLE) * NUM_TOKENS_MULTIPLE)
        if longest is not None:
            keys.setdefault("max_seq_len", longest)
        name = self.model.get("preset")
        return AndromedaConfig.from_dict(keys) if name is None else preset(str(name), **keys)

    def sequence_length(self, config: AndromedaConfig, longest: int | None = None) -> int:
        """Of training on text; of a build the longest, which is given.

        Raises:
            AndromedaError: it is more than the model's max_seq_len.
        """
        most = config.max_seq_len
        if longest is not None:
            what = f"has sequences of {longest:,} tokens, more than the model's max_seq_len={most}; raise that"
            _require(longest <= most, "data.build", self.data.build, what)
            return longest
        if self.seq_len is None:
            return most
        what = f"is more than the model's max_seq_len={most}; raise that too"
        _require(self.seq_len <= most, "seq_len", self.seq_len, what)
        return self.seq_len

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"betas": list(self.betas)}


def check_vocabulary(config: AndromedaConfig, vocab_size: int) -> None:
    """Raises AndromedaError where the model has no row for some token."""
    if vocab_size > config.num_tokens:
        raise AndromedaError(
            f"recipe: the tokenizer has {vocab_size:,} tokens, more than the model's num_tokens={config.num_tokens:,}; "
            "raise model.num_tokens or leave it out, or take a smaller tokenizer"
        )


def _require(holds: bool, key: str, value: object, what: str) -> None:
    if not holds:
        raise AndromedaError(f"recipe: {key}={value!r} {what}")


# ---- reading -------------------------------------------------------------------------------------


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file.

    Args:
        overrides: `key=value` or `section.key=value`, with values as in YAML.

    Raises:
        AndromedaError: no such file, no YAML, an unknown key, a missing one, or a value of the wrong type or range.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    path = Path(path)
    _check_keys(_read_yaml(path), Recipe, str(path))
    arguments = [f"--{_check_override(override)}" for override in overrides]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, None)
    parser.add_argument("--config", action="config")
    try:
        values = parser.instantiate(parser.parse_args([f"--config={path}", *arguments]))
    except ArgumentError as error:
        raise AndromedaError(f"{path}: {_one_line(str(error))}") from error
    given = {item.name: values[item.name] for item in fields(Recipe)}
    given["output"] = given["output"] or f"runs/{path.stem}"
    try:
        return Recipe(**given)
    except AndromedaError as error:
        raise AndromedaError(f"{path}: {error}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AndromedaError(f"{path}: no such file; give the path of a recipe, such as recipes/verse.yaml") from error
    except OSError as error:
        raise AndromedaError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AndromedaError(f"{path}: is not YAML: {_one_line(str(error))}") from error
    if not isinstance(values, dict):
        raise AndromedaError(f"{path}: holds no keys; a recipe needs at least `data` and `model`")
    return values


def _keys(section: Any) -> dict[str, Any]:
    """What a section of a recipe may hold, and of which types; nothing where it is no section."""
    if section == dict[str, TaskRecipe]:
        return _AnyName(TaskRecipe)
    if section == ModelKeys:
        return {"preset": str, "from": str, **get_type_hints(AndromedaConfig)}
    section = next((choice for choice in get_args(section) if is_dataclass(choice)), section)  # X of X | None
    if is_dataclass(section):
        return {item.name: get_type_hints(section)[item.name] for item in fields(section)}
    return {}


class _AnyName(dict[str, Any]):
    """Keys of a section whose names are the reader's to choose."""

    def __init__(self, section: Any) -> None:
        self.section = section

    def __bool__(self) -> bool:
        return True

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: str) -> Any:
        return self.section


def _check_keys(values: Mapping[str, Any], section: Any, where: str, prefix: str = "") -> None:
    known = _keys(section)
    for key, value in values.items():
        if key not in known:
            raise _unknown(f"{prefix}{key}", f"{prefix}{_closest(str(key), known)}", known, where)
        if _keys(known[key]) and isinstance(value, Mapping):
            _check_keys(value, known[key], where, f"{prefix}{key}.")


def _check_override(override: str) -> str:
    key, equals, value = override.partition("=")
    key = key.removeprefix("--")
    if not equals:
        raise AndromedaError(f"{override!r}: an override is key=value, such as steps=100 or model.dim=64")
    section: Any = Recipe
    names = key.split(".")
    for depth, name in enumerate(names):
        known = _keys(section)
        if not known:
            break
        if name not in known:
            before = "".join(f"{parent}." for parent in names[:depth])
            raise _unknown(key, before + _closest(name, known), known, repr(override))
        section = known[name]
    with suppress(yaml.YAMLError):  # told when it is read
        if _keys(section) and isinstance(keys := yaml.safe_load(value), Mapping):
            _check_keys(keys, section, repr(override), f"{key}.")
    return f"{key}={value}"


def _closest(name: str, known: Mapping[str, Any]) -> str:
    return next(iter(difflib.get_close_matches(name, known, n=1)), "")


def _unknown(key: str, close: str, known: Mapping[str, Any], where: str) -> AndromedaError:
    hint = f"did you mean {close!r}?" if close and not close.endswith(".") else f"keys: {', '.join(known)}"
    return AndromedaError(f"{where}: no key {key!r} in a recipe; {hint}")


KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null",
    "list": "a list", "list[str]": "a list of texts",
    **dict.fromkeys(("tuple", "tuple with 2 elements"), "a list of two numbers"),
    **dict.fromkeys(("dict", "LoraRecipe", "DiLoCoRecipe"), "keys with values"),
}  # fmt: skip
WRONG_TYPE = re.compile(
    r"(?P<key>\S+): (Expected (an? )?(?P<one>.+)\. Got|Does not .* Subtypes: \[(?P<any>.+)\] Errors: .* Given)"
    r" value: (?P<value>.*)"
)
CHOICES = (
    Schedule,
    Precision,
    OptimizerName,
    EngineName,
    Offload,
    FailedSave,
    Tracker,
    Method,
    Balancing,
    Pooling,
    TaskKind,
    Checkpointing,
)
OPTIONAL = re.compile(  # section that may be null, in which something is wrong
    r"(?P<section>\w+): Does not validate .*? Problem with given class_path '\S+': (?P<what>(?P<key>\w+: )?.*)"
    r" - Expected a <class 'NoneType'> Given value.*"
)


def _one_line(message: str) -> str:
    """What YAML or jsonargparse says, in a reader's words."""
    message = re.sub(r'Parser key "([^"]*)":', r"\1:", " ".join(message.split()))
    if within := OPTIONAL.fullmatch(message):
        message = f"{within['section']}{'.' if within['key'] else ': '}{within['what']}"
    message = re.sub(r"tasks: Problem with given class_path '\S+': (\w+):", r"tasks.*.\1:", message)
    message = message.replace("tasks: Expected a dot import path string:", "tasks.*: must be keys with values; got")
    for choices in CHOICES:
        message = message.replace(f"a {choices}", f"one of {', '.join(get_args(choices))}")
        message = message.replace(str(choices), f"one of {' | '.join(get_args(choices))}")
    wrong = WRONG_TYPE.fullmatch(re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message))
    if wrong is None:
        return message
    kinds = [wrong["one"]] if wrong["one"] else wrong["any"].split(", ")
    return f"{wrong['key']}: must be {' or '.join(KINDS.get(kind, kind) for kind in kinds)}; got {wrong['value']!r}"
