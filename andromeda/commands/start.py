"""What `andromeda train` starts from: checked before any work, then made anew or taken from a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from andromeda.checkpoint import load_checkpoint, load_config, resolve, tokenizer_path
from andromeda.commands.output import binary_bytes, count, say, warn
from andromeda.commands.tasks import check_teachers, read_tasks
from andromeda.commands.training_data import validation_files, within_build
from andromeda.config import AndromedaConfig
from andromeda.data.pairs import check_pairs
from andromeda.data.stream import Stream
from andromeda.data.text import check_paths, check_text, read_documents
from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer
from andromeda.training.continued import continued
from andromeda.training.diloco import Shared, load_shared
from andromeda.training.fp8 import check_fp8
from andromeda.training.lora import adapt, check_base, load_adapter
from andromeda.training.nebula.keep import KeptTasks, load_tasks
from andromeda.training.new_tokens import with_new_tokens, with_room
from andromeda.training.optimizer import check_optimizer
from andromeda.training.preference import Reference, load_reference
from andromeda.training.processes import Processes
from andromeda.training.recipe import Recipe, check_vocabulary
from andromeda.training.run import RunDirectory
from andromeda.training.state import FOLDER, TrainingState, load_state


def check_start(recipe: Recipe, stream: Stream | None) -> None:
    """What can be known of a new run without reading more of its texts than the first document.

    Args:
        stream: the recipe's build, opened; None: it trains on text.

    Raises:
        AndromedaError: a missing file or one without text, a config that makes no sense, values that do not fit
            together, a package that is not installed, or a model that is larger than the machine.
    """
    check_optimizer(recipe)
    if recipe.precision == "fp8":
        check_fp8()
    read_tasks(recipe)
    validation, held_out = validation_files(recipe)
    check_paths([*recipe.data.train_paths, *validation])
    config = starting_config(recipe, stream=stream)
    recipe.sequence_length(config, longest(stream))
    tokenizer = _given_tokenizer(recipe, stream)
    vocab_size = recipe.tokenizer.vocab_size if tokenizer is None else tokenizer.vocab_size
    if "num_tokens" in recipe.model_keys and vocab_size is not None:
        check_vocabulary(config, vocab_size)
    config = starting_config(recipe, vocab_size, stream)
    _check_memory(config)
    if tokenizer is None and recipe.model_from is not None:
        tokenizer = Tokenizer.load(resolve(recipe.model_from))
    check_teachers(recipe, config.num_tokens, tokenizer)
    if stream is not None:
        within_build(recipe, stream, TrainingState())
    if recipe.data.pairs:
        check_pairs(recipe.data.pairs_paths)
    if held_out:
        check_pairs(held_out, whole=True)
    for paths in (recipe.data.train_paths, validation):
        if paths:
            check_text(paths)


def starting_config(recipe: Recipe, vocab_size: int | None = None, stream: Stream | None = None) -> AndromedaConfig:
    """The config that training starts with: the recipe's, or with `model.from` that model's with the recipe's keys."""
    if recipe.model_from is None:
        return recipe.config(vocab_size, longest(stream))
    return with_room(continued(load_config(resolve(recipe.model_from)), recipe.model_keys), vocab_size)


def longest(stream: Stream | None) -> int | None:
    """Tokens of a build's longest sequence."""
    return None if stream is None else max(stage.seq_len for stage in stream.mix.stages)


def _given_tokenizer(recipe: Recipe, stream: Stream | None) -> Tokenizer | None:
    """The one that exists and that the recipe names, or that of its build; None: one is trained, or the model's taken.

    Raises:
        AndromedaError: it has no token to end documents with, or a model is to go on with another one.
    """
    if stream is not None:
        tokenizer, what = stream.tokenizer, f"the build {stream.folder}"
        remedy = "build the data with `tokenizer: {path: ...}` of that model"
    elif recipe.tokenizer.path is not None:
        tokenizer = Tokenizer.load(tokenizer_path(recipe.tokenizer.path))
        what, remedy = f"tokenizer.path={recipe.tokenizer.path!r}", "leave tokenizer.path out"
        _ = tokenizer.eos_id  # documents end with it
    else:
        return None
    if recipe.model_from is not None:
        own = Tokenizer.load(resolve(recipe.model_from))
        if not tokenizer.extends(own):
            raise AndromedaError(
                f"recipe: model.from={recipe.model_from!r} has another tokenizer than {what}; {remedy}"
            )
        if recipe.lora is not None and tokenizer.vocab_size != own.vocab_size:
            raise AndromedaError(
                f"recipe: {what} has tokens that are new to model.from={recipe.model_from!r}, and an adapter leaves "
                "the embedding as it is; drop `lora`, or fine-tune with them first"
            )
    return tokenizer


@dataclass
class Start:
    """Where training starts from.

    Attributes:
        tensors: of the optimizer that goes on; None: a new one.
        reference: of a run that trains on pairs; None: there is none, or it is yet to be measured.
        adapter: weights of the one that goes on, which `model` has merged; None: there is none, or a new one.
        tasks: heads and balance that go on; None: new ones.
        shared: what this group has in common with others; None: nothing yet.
    """

    model: Andromeda
    tokenizer: Tokenizer
    state: TrainingState
    tensors: dict[str, Tensor] | None = None
    reference: Reference | None = None
    adapter: dict[str, Tensor] | None = None
    tasks: KeptTasks | None = None
    shared: Shared | None = None


def find_start(recipe: Recipe, run: RunDirectory, stream: Stream | None, processes: Processes) -> Start:
    """Where the run is, or a new beginning. The first process looks for it, and the others take the same.

    Raises:
        AndromedaError: no checkpoint is whole, or another process does not find the one that the first has found.
    """
    start = None
    if processes.first:
        start = run.load_newest(resume, warn) or begin(recipe, stream, run.data / "tokenizer")
    step = int(processes.sum(torch.tensor(start.state.step if start else 0)))
    if start is not None:
        return start
    return resume(run.checkpoint(step)) if step else begin(recipe, stream, run.data / "tokenizer", first=False)


def resume(checkpoint: Path) -> Start:
    """From a checkpoint of the run itself. Raises AndromedaError for one that is damaged."""
    state, tensors = load_state(checkpoint)
    return Start(
        load_checkpoint(checkpoint), Tokenizer.load(checkpoint), state, tensors,
        load_reference(checkpoint / FOLDER), load_adapter(checkpoint), load_tasks(checkpoint),
        load_shared(checkpoint / FOLDER),
    )  # fmt: skip


def model_to_train(recipe: Recipe, start: Start) -> Andromeda:
    """The model, with the recipe's adapter in it where there is one.

    Raises:
        AndromedaError: the model that an adapter goes on with is gone, or is another one.
    """
    if recipe.lora is None:
        return start.model
    assert recipe.model_from is not None
    base = start.model
    if start.adapter is None and start.state.step:
        raise AndromedaError(
            f"{recipe.output}: its checkpoint has no adapter/ any more; copy the whole directory again"
        )
    if start.adapter is not None:
        base = _build(starting_config(recipe))
        _take_weights(base, recipe.model_from, start.tokenizer.vocab_size)
        check_base(base, start.model, recipe.model_from)
    adapt(base, recipe.lora, start.adapter)
    return base


def begin(recipe: Recipe, stream: Stream | None, trained: Path, first: bool = True) -> Start:
    """With new weights, or with those of `model.from`; the tokenizer is trained if the recipe names none.

    Args:
        trained: directory for a tokenizer that the first of several processes trains and the others take.
    """
    tokenizer = _given_tokenizer(recipe, stream) or _tokenizer(recipe, trained, first)
    config = starting_config(recipe, tokenizer.vocab_size, stream)
    check_vocabulary(config, tokenizer.vocab_size)
    torch.manual_seed(recipe.seed)
    model = _build(config)
    if recipe.model_from is not None:
        _take_weights(model, recipe.model_from, tokenizer.vocab_size)
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


def _take_weights(model: Andromeda, directory: str, vocab_size: int) -> None:
    """Those of another model, whose config may differ in what `continued` and `with_room` change."""
    weights, known = load_checkpoint(resolve(directory)).state_dict(), Tokenizer.load(resolve(directory)).vocab_size
    model.load_state_dict(with_new_tokens(weights, known, vocab_size, model.config.num_tokens))


def _tokenizer(recipe: Recipe, trained: Path, first: bool) -> Tokenizer:
    if recipe.model_from is not None and recipe.tokenizer.vocab_size is None:
        return Tokenizer.load(resolve(recipe.model_from))
    if not first:
        return Tokenizer.load(trained)
    vocab_size = recipe.tokenizer.vocab_size or starting_config(recipe).num_tokens
    tokenizer = Tokenizer.train(read_documents(recipe.data.train_paths), vocab_size)
    trained.mkdir(parents=True, exist_ok=True)
    tokenizer.save(trained)
    say(f"tokenizer: trained, {tokenizer.vocab_size:,} tokens")
    return tokenizer
