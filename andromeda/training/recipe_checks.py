"""What a recipe may hold: ranges, and keys that do not go together. Told by the first key that is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from andromeda.errors import AndromedaError
from andromeda.training import continued
from andromeda.training.nebula.recipe import check_tasks

if TYPE_CHECKING:
    from andromeda.training.recipe import Recipe


class Rule(NamedTuple):
    """A mistake that a recipe may have.

    Attributes:
        key: that is told, as in `data.train`. holds: whether it is made.
        what: is wrong, and what to do.
    """

    key: str
    holds: bool
    what: str


def check_recipe(recipe: Recipe) -> None:
    """
    Raises:
        AndromedaError: a value out of range, or values that do not go together.
    """
    for rules in (_ranges, _processes, _data, _model):
        for rule in rules(recipe):
            if rule.holds:
                require(False, rule.key, _value(recipe, rule.key), rule.what)
    if recipe.lora is not None:
        recipe.lora.check()
    check_tasks(recipe.tasks, recipe.balance)


def require(holds: bool, key: str, value: object, what: str) -> None:
    """Raises AndromedaError where it does not hold."""
    if not holds:
        raise AndromedaError(f"recipe: {key}={value!r} {what}")


def _value(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
    return list(value) if isinstance(value, dict | tuple) else value


def _ranges(r: Recipe) -> Iterator[Rule]:
    counts = ("batch_size", "accumulate", "context_parallel", "keep_last", "log_every", "validate_every", "save_every")
    for key in counts:
        yield Rule(key, getattr(r, key) < 1, "must be at least 1")
    yield Rule("steps", r.steps is not None and r.steps < 1, "must be at least 1")
    yield Rule("seq_len", r.seq_len is not None and r.seq_len < 2, "must be at least 2")
    for key in ("learning_rate", "weight_decay"):
        yield Rule(key, not math.isfinite(getattr(r, key)), "must be finite")
    for key in ("warmup_steps", "weight_decay"):
        yield Rule(key, getattr(r, key) < 0, "must not be negative")
    yield Rule("seed", not 0 <= r.seed < 2**63, "must lie between 0 and 2^63 - 1")
    yield Rule("learning_rate", not r.learning_rate > 0, "must be positive")
    yield Rule("decay_fraction", not 0 < r.decay_fraction <= 1, "must lie in (0, 1]")
    yield Rule("final_ratio", not 0 <= r.final_ratio <= 1, "must lie in [0, 1]")
    yield Rule("betas", not all(0 <= beta < 1 for beta in r.betas), "must lie in [0, 1)")
    yield Rule("clip_norm", r.clip_norm is not None and not r.clip_norm > 0, "must be positive; null for none")
    yield Rule("patience", not r.patience > 0, "must be positive")
    yield Rule("spike", r.spike is not None and not r.spike > 1, "must be more than 1; null for none")
    yield Rule("dpo_beta", r.dpo_beta is not None and not r.dpo_beta > 0, "must be positive")
    yield Rule("diloco.every", r.diloco is not None and r.diloco.every < 1, "must be at least 1")


def _processes(r: Recipe) -> Iterator[Rule]:
    """Of precision and optimizer, too, which not every engine has."""
    shared, pairs, tasks = r.context_parallel > 1, bool(r.data.pairs), bool(r.tasks)
    what = "does not go with"
    yield Rule("context_parallel", shared and pairs, f"{what} data.pairs yet: an answer's tokens stay together")
    yield Rule("context_parallel", shared and tasks, f"{what} tasks yet, whose heads see whole texts; leave one out")
    yield Rule("context_parallel", shared and r.compile, f"{what} compile yet; leave one out")

    fsdp, zero3 = r.engine == "fsdp", r.engine == "zero3"
    what = "cannot be gathered from engine='fsdp' yet; take adamw, or engine='ddp'"
    yield Rule("optimizer", fsdp and r.optimizer == "adamw8bit", what)
    what = "is not exact with engine='zero3', which holds parts of matrices; take adamw"
    yield Rule("optimizer", zero3 and r.optimizer != "adamw", what)
    what = "does not go with engine='zero3'"
    yield Rule("tasks", zero3 and tasks, f"{what}, where a weight that a batch leaves out keeps an old gradient")
    # Of DeepSpeed's own loss scale, and where modules that it watches are taken apart: not tried.
    yield Rule("precision", zero3 and r.precision in ("float16", "fp8"), f"{what}; take bfloat16")
    yield Rule("compile", zero3 and r.compile, f"{what}; take another, or false")
    yield Rule("context_parallel", zero3 and shared, f"{what} yet; take another")
    what = f"is for engine='zero3', not {r.engine!r}; change one of them"
    yield Rule("offload", r.offload != "none" and not zero3, what)
    what = "goes with offload='nvme', and names a directory; give both or none"
    yield Rule("nvme_path", (r.nvme_path is None) == (r.offload == "nvme"), what)

    groups, what = r.diloco is not None, "does not go with diloco yet; leave one out"
    yield Rule("data.build", groups and r.data.build is not None, "is the same for all groups of diloco; name texts")
    yield Rule("lora.rank", groups and r.lora is not None, what)
    yield Rule("tasks", groups and tasks, what)
    yield Rule("engine", groups and zero3, what)
    yield Rule("context_parallel", groups and shared, what)


def _data(r: Recipe) -> Iterator[Rule]:
    data, build, pairs = r.data, r.data.build is not None, bool(r.data.pairs)
    yield Rule("data.build", data.build == "", "is empty; name the directory of a build")
    yield Rule("data.build", pairs and build, "cannot be read beside data.pairs; leave one out")
    for key, other in (("data.build", build), ("data.pairs", pairs)):
        yield Rule("data.train", other and bool(data.train), f"cannot be read beside {key}; leave one out")
    what = "is for data.train; drop it"
    yield Rule("data.packed_documents", (build or pairs) and not data.packed_documents, what)
    what = "is for data.train; a build has lengths of its own"
    yield Rule("seq_len", build and r.seq_len is not None, what)
    for name, value in asdict(r.tokenizer).items():
        what = "is for data.train; a build has its tokenizer"
        yield Rule(f"tokenizer.{name}", build and value is not None, what)
    yield Rule("data.build", build and not r.reads_text, "needs a task of kind language_model or distillation")
    yield Rule("dpo_beta", not pairs and r.dpo_beta is not None, "is for data.pairs; leave it out")
    yield Rule("data.pairs", pairs and bool(r.tasks), "cannot be read beside `tasks`")

    what = "must name at least one file, or data.build a build"
    yield Rule("data.train", r.reads_text and not (build or pairs or data.train_paths), what)
    what = "must name text to train a tokenizer on, or tokenizer.path or model.from one that exists"
    yield Rule("data.train", not (r.reads_text or data.train_paths or r.tokenizer.path or r.model_from), what)
    yield Rule("data.train", not all(data.train_paths), "is empty; name text files")
    yield Rule("data.pairs", not all(data.pairs_paths), "is empty; name files of pairs")
    what = "is empty; name text files, or [] for no validation"
    yield Rule("data.validation", not all(data.validation_paths), what)


def _model(r: Recipe) -> Iterator[Rule]:
    for name in ("from", "preset"):
        yield Rule(f"model.{name}", not isinstance(r.model.get(name, ""), str), "must be a name")
    goes_on, vocab_size = r.model_from is not None, r.tokenizer.vocab_size is not None
    what = "cannot change the model of model.from"
    yield Rule("model.preset", goes_on and "preset" in r.model, f"{what}; leave one out")
    for name in r.model_keys:
        what_can = f"{what}; of that, only {', '.join(continued.KEYS)} can"
        yield Rule(f"model.{name}", goes_on and name not in continued.KEYS, what_can)
    what = "is for a new tokenizer"
    yield Rule("tokenizer.vocab_size", vocab_size and bool(r.tokenizer.path), f"{what}; leave it out or tokenizer.path")
    what += ", and the model of model.from has its own; leave it out"
    yield Rule("tokenizer.vocab_size", vocab_size and goes_on, what)
    what = "needs model.from, the model whose answers they are about"
    yield Rule("data.pairs", bool(r.data.pairs) and not goes_on, what)
    yield Rule("lora.rank", r.lora is not None and not goes_on, "needs model.from, a model to adapt")
    what = "is for whole weights, not for the thin ones of lora; take bfloat16"
    yield Rule("precision", r.lora is not None and r.precision == "fp8", what)
