"""What `andromeda train` starts from: checked before any work, then made anew or taken from a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from andromeda.checkpoint import load_checkpoint, load_config, resolve
from andromeda.commands.output import binary_bytes, count, say
from andromeda.config import AndromedaConfig
from andromeda.data.text import check_paths, check_text, read_documents
from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer
from andromeda.training.recipe import Recipe, check_vocabulary
from andromeda.training.state import TrainingState, load_state


def check_start(recipe: Recipe) -> None:
    """What can be known of a new run without reading more of its corpora than the first document.

    Raises:
        AndromedaError: a missing file or one without text, a config that makes no sense, values that do not fit
            together, or a model that is larger than the machine.
    """
    check_paths([*recipe.data.train_paths, *recipe.data.validation_paths])
    config = starting_config(recipe)
    recipe.sequence_length(config)
    fixed = recipe.model_from is not None or "num_tokens" in recipe.model_keys
    vocab_size = recipe.tokenizer.vocab_size
    if recipe.tokenizer.path is not None:
        tokenizer = Tokenizer.load(_tokenizer_path(recipe.tokenizer.path))
        _ = tokenizer.eos_id  # documents end with it
        vocab_size = tokenizer.vocab_size
    if fixed and vocab_size is not None:
        check_vocabulary(config, vocab_size)
    _check_memory(starting_config(recipe, vocab_size))
    check_text(recipe.data.train_paths)
    if recipe.data.validation_paths:
        check_text(recipe.data.validation_paths)


def starting_config(recipe: Recipe, vocab_size: int | None = None) -> AndromedaConfig:
    """The config that training starts with: the recipe's, or with `model.from` that model's with the recipe's keys."""
    if recipe.model_from is None:
        return recipe.config(vocab_size)
    config = load_config(resolve(recipe.model_from))
    return AndromedaConfig.from_dict(config.to_dict() | recipe.model_keys)


def _tokenizer_path(path: str) -> Path:
    """Of a file, a model directory, or a run directory."""
    directory = Path(path)
    if not directory.is_dir() or (directory / "tokenizer.json").exists():
        return directory
    return resolve(directory)


@dataclass
class Start:
    """Where training starts from.

    Attributes:
        tensors: of the optimizer that goes on; None: a new one.
    """

    model: Andromeda
    tokenizer: Tokenizer
    state: TrainingState
    tensors: dict[str, Tensor] | None = None


def resume(checkpoint: Path) -> Start:
    """From a checkpoint of the run itself. Raises AndromedaError for one that is damaged."""
    state, tensors = load_state(checkpoint)
    return Start(load_checkpoint(checkpoint), Tokenizer.load(checkpoint), state, tensors)


def begin(recipe: Recipe) -> Start:
    """With new weights, or with those of `model.from`; the tokenizer is trained if the recipe names none."""
    tokenizer = _tokenizer(recipe)
    config = starting_config(recipe, tokenizer.vocab_size)
    check_vocabulary(config, tokenizer.vocab_size)
    torch.manual_seed(recipe.seed)
    model = _build(config)
    if recipe.model_from is not None:
        _take_weights(model, recipe.model_from)
    return Start(model, tokenizer, TrainingState())


def _check_memory(config: AndromedaConfig) -> None:
    """That the machine could hold the weights; how much of its memory is free is not asked."""
    if not hasattr(os, "sysconf"):  # Windows
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _weight_bytes(config) > there:
        raise _too_large(config, f"this machine has {binary_bytes(there)}")


def _build(config: AndromedaConfig) -> Andromeda:
    try:
        return Andromeda(config)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        raise _too_large(config, "less is free") from error


def _weight_bytes(config: AndromedaConfig) -> int:
    return 4 * config.num_parameters()  # float32


def _too_large(config: AndromedaConfig, what: str) -> AndromedaError:
    parameters, needed = count(config.num_parameters()), binary_bytes(_weight_bytes(config))
    return AndromedaError(
        f"recipe: a model of {parameters} parameters needs {needed} of memory for its weights alone, and {what}; "
        "take a smaller one: lower model.dim or model.depth"
    )


def _take_weights(model: Andromeda, directory: str) -> None:
    """Those of another model, whose config may differ in what leaves the weights as they are."""
    weights = load_checkpoint(resolve(directory)).state_dict()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        raise AndromedaError(
            f"recipe: the keys beside model.from={directory!r} ask for other weights than it has; "
            "keep to those that leave the weights as they are, such as position_interpolation"
        )
    model.load_state_dict(weights)


def _tokenizer(recipe: Recipe) -> Tokenizer:
    if recipe.tokenizer.path is not None:
        return Tokenizer.load(_tokenizer_path(recipe.tokenizer.path))
    if recipe.model_from is not None and recipe.tokenizer.vocab_size is None:
        return Tokenizer.load(resolve(recipe.model_from))
    vocab_size = recipe.tokenizer.vocab_size or starting_config(recipe).num_tokens
    tokenizer = Tokenizer.train(read_documents(recipe.data.train_paths), vocab_size)
    say(f"tokenizer: trained, {tokenizer.vocab_size:,} tokens")
    return tokenizer
