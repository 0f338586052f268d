"""What is trained, on what, and how: a YAML file that checks itself, and overrides for single keys.

Paths in a recipe are those of the command line: relative to the current directory, wherever the recipe lies.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
import yaml

from andromeda.config import AndromedaConfig, preset
from andromeda.errors import AndromedaError
from andromeda.training.lora_recipe import LoraRecipe
from andromeda.training.nebula.nebula import Balancing
from andromeda.training.nebula.recipe import OF_TEXT, Pooling, TaskKind, TaskRecipe
from andromeda.training.recipe_checks import check_recipe, require
from andromeda.training.recipe_files import Files, Names, listed

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
class DataRecipe(Files):
    """Text files (.txt, .md, .jsonl, each also .gz, .xz or .zst), or a build of `andromeda data build` to train on.

    Beside `pairs` files of `validation` may be pairs, too.
    """

    build: str | None = None  # its directory, in place of `train`; it brings tokenizer, sequences and their order
    pairs: Names = field(default_factory=list)  # in place of `train`: `prompt`, `chosen`, `rejected` (DPO)
    packed_documents: bool = True  # documents that share a sequence do not see each other

    @property
    def pairs_paths(self) -> list[str]:
        return listed(self.pairs)


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
        check_recipe(self)

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
            require(self.steps <= most, "steps", self.steps, what)
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
            require(longest <= most, "data.build", self.data.build, what)
            return longest
        if self.seq_len is None:
            return most
        what = f"is more than the model's max_seq_len={most}; raise that too"
        require(self.seq_len <= most, "seq_len", self.seq_len, what)
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
        return {"preset": str, "from": str, **_types(AndromedaConfig)}
    section = next((choice for choice in get_args(section) if is_dataclass(choice)), section)  # X of X | None
    if isinstance(section, type) and is_dataclass(section):
        return {item.name: _types(section)[item.name] for item in fields(section)}
    return {}


@cache
def _types(section: Any) -> dict[str, Any]:
    """What its annotations say, which Python evaluates anew at each question."""
    return get_type_hints(section)


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
