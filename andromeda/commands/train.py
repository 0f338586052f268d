"""`andromeda train`: from a recipe to a run directory, and on from where it stopped."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from andromeda.commands.output import count, plain_console
from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from andromeda.data.text import Corpus
    from andromeda.model import Andromeda
    from andromeda.tokenizer import Tokenizer
    from andromeda.training.loop import Outside
    from andromeda.training.metrics import Meter, MetricsFile
    from andromeda.training.objective import NextToken
    from andromeda.training.recipe import Recipe
    from andromeda.training.run import RunDirectory
    from andromeda.training.state import TrainingState

PLOT_SECONDS = 60.0  # between two drawings of the loss curve, while training goes on
NO_PLOT = "no loss curve: matplotlib is not installed; pip install 'andromeda-lm[train]'"


def train(recipe: str, overrides: list[str]) -> None:
    """Trains a model as a recipe says, or goes on with the run where it stopped.

    Stop it with Ctrl-C and start it again: it goes on exactly as if it had not been stopped. Paths in the recipe are
    relative to the current directory.

    Args:
        recipe: YAML file, such as recipes/verse.yaml.
        overrides: key=value for single keys, such as steps=100 or model.dim=64.
    """
    from andromeda.training.recipe import read_recipe

    plan = read_recipe(recipe, overrides)
    from andromeda.training.run import RunDirectory, open_run
    from andromeda.training.signals import stop_request

    if not RunDirectory(Path(plan.output)).checkpoints():
        check_start(plan)
    with open_run(plan) as run:
        start = run.load_newest(_resume, warn=lambda text: _say(f"warning: {text}"))
        if start is not None and start.state.step >= plan.steps:
            _say(f"{run.path}: finished already, at step {start.state.step:,}; raise steps to go on")
            return
        session = prepare(plan, run, start or _begin(plan))
        with stop_request() as stop:
            session.run(stop)
    if stop.received is not None and session.state.step < plan.steps:
        _say(f"{run.path}: stopped by {stop.received.name} at step {session.state.step:,}; the same command goes on")
        raise SystemExit(128 + stop.received)
    _say(f"{run.path}: finished {plan.steps:,} steps; the model is {run.checkpoint(plan.steps)}")


def _say(line: str) -> None:
    print(line, flush=True)


# ---- before any work -----------------------------------------------------------------------------


def check_start(recipe: Recipe) -> None:
    """What can be known of a new run without reading its corpora.

    Raises:
        AndromedaError: a missing file, a config that makes no sense, or values that do not fit together.
    """
    from andromeda.data.text import check_paths
    from andromeda.tokenizer import Tokenizer
    from andromeda.training.recipe import check_vocabulary

    check_paths([*recipe.data.train_paths, *recipe.data.validation_paths])
    config = starting_config(recipe)
    recipe.sequence_length(config)
    fixed = recipe.model_from is not None or "num_tokens" in recipe.model_keys
    if recipe.tokenizer.path is not None:
        tokenizer = Tokenizer.load(_tokenizer_path(recipe.tokenizer.path))
        _ = tokenizer.eos_id  # documents end with it
        if fixed:
            check_vocabulary(config, tokenizer.vocab_size)
    elif recipe.tokenizer.vocab_size is not None and fixed:
        check_vocabulary(config, recipe.tokenizer.vocab_size)


def starting_config(recipe: Recipe, vocab_size: int | None = None) -> AndromedaConfig:
    """The config that training starts with: the recipe's, or with `model.from` that model's with the recipe's keys."""
    if recipe.model_from is None:
        return recipe.config(vocab_size)
    from andromeda.checkpoint import load_config, resolve

    config = load_config(resolve(recipe.model_from))
    return AndromedaConfig.from_dict(config.to_dict() | recipe.model_keys)


def _tokenizer_path(path: str) -> Path:
    """Of a file, a model directory, or a run directory."""
    directory = Path(path)
    if not directory.is_dir() or (directory / "tokenizer.json").exists():
        return directory
    from andromeda.checkpoint import resolve

    return resolve(directory)


# ---- model, tokenizer and state: new ones, or those of a checkpoint ------------------------------


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


def _resume(checkpoint: Path) -> Start:
    from andromeda.checkpoint import load_checkpoint
    from andromeda.tokenizer import Tokenizer
    from andromeda.training.state import load_state

    state, tensors = load_state(checkpoint)
    return Start(load_checkpoint(checkpoint), Tokenizer.load(checkpoint), state, tensors)


def _begin(recipe: Recipe) -> Start:
    import torch

    from andromeda.model import Andromeda
    from andromeda.training.recipe import check_vocabulary
    from andromeda.training.state import TrainingState

    tokenizer = _tokenizer(recipe)
    config = starting_config(recipe, tokenizer.vocab_size)
    check_vocabulary(config, tokenizer.vocab_size)
    torch.manual_seed(recipe.seed)
    model = Andromeda(config)
    if recipe.model_from is not None:
        _take_weights(model, recipe.model_from)
    return Start(model, tokenizer, TrainingState())


def _take_weights(model: Andromeda, directory: str) -> None:
    """Those of another model, whose config may differ in what leaves the weights as they are."""
    from andromeda.checkpoint import load_checkpoint, resolve

    weights = load_checkpoint(resolve(directory)).state_dict()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        raise AndromedaError(
            f"recipe: the keys beside model.from={directory!r} ask for other weights than it has; "
            "keep to those that leave the weights as they are, such as position_interpolation"
        )
    model.load_state_dict(weights)


def _tokenizer(recipe: Recipe) -> Tokenizer:
    from andromeda.data.text import read_documents
    from andromeda.tokenizer import Tokenizer

    if recipe.tokenizer.path is not None:
        return Tokenizer.load(_tokenizer_path(recipe.tokenizer.path))
    if recipe.model_from is not None and recipe.tokenizer.vocab_size is None:
        from andromeda.checkpoint import resolve

        return Tokenizer.load(resolve(recipe.model_from))
    documents = read_documents(recipe.data.train_paths)
    first = next(documents, None)
    if first is None:
        raise AndromedaError(f"{', '.join(map(str, recipe.data.train_paths))}: no text; name files that hold some")
    vocab_size = recipe.tokenizer.vocab_size or starting_config(recipe).num_tokens
    tokenizer = Tokenizer.train(itertools.chain([first], documents), vocab_size)
    _say(f"tokenizer: trained, {tokenizer.vocab_size:,} tokens")
    return tokenizer


# ---- the run -------------------------------------------------------------------------------------


@dataclass
class Session:
    """All that one process needs of a run, read and built."""

    recipe: Recipe
    directory: RunDirectory
    model: Andromeda
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    objective: NextToken
    state: TrainingState
    corpus: Corpus
    validation: Corpus | None
    seq_len: int
    _plotted: float = field(default_factory=time.monotonic)  # when the loss curve was drawn last

    def run(self, stop: Callable[[], bool]) -> None:
        """Trains to the end, or until asked to stop."""
        from andromeda.training.loop import Loop
        from andromeda.training.metrics import open_metrics
        from andromeda.training.progress import show_progress

        with open_metrics(self.directory.metrics, self.state.step) as metrics:
            loop = Loop(
                self.recipe, self.model, self.optimizer, self.objective, self.state, self._meter(),
                self._outside(metrics, stop),
            )  # fmt: skip
            with show_progress(self.recipe.steps, self.state.step, plain_console()) as progress:
                loop.run(progress)
        drawn = self._plot()
        _say(f"loss curve: {self.directory.plot}" if drawn else NO_PLOT)

    def _meter(self) -> Meter:
        from andromeda.training.metrics import Meter, possible_flops_per_second, training_flops_per_token

        return Meter(
            bytes_per_token=self.corpus.bytes_per_token,
            flops_per_token=partial(training_flops_per_token, self.model, self.seq_len),
            possible_flops_per_second=possible_flops_per_second(self.objective.device, self.objective.precision),
        )

    def _outside(self, metrics: MetricsFile, stop: Callable[[], bool]) -> Outside:
        from andromeda.data.windows import TokenWindows
        from andromeda.training.loop import Outside

        windows = TokenWindows(
            self.corpus.tokens,
            self.seq_len,
            seed=self.recipe.seed,
            end_of_text=self.tokenizer.eos_id,
            packed_documents=self.recipe.data.packed_documents,
        )
        return Outside(
            batches=windows.batch,
            validate=None if self.validation is None else partial(self._validate, self.validation),
            save=partial(self._save, metrics),
            log=metrics.write,
            stop=stop,
        )

    def _validate(self, corpus: Corpus) -> float:
        from andromeda.data.windows import validation_batches
        from andromeda.training.objective import bits_per_byte

        batches = validation_batches(
            corpus.tokens,
            self.seq_len,
            self.recipe.batch_size,
            end_of_text=self.tokenizer.eos_id,
            packed_documents=self.recipe.data.packed_documents,
        )
        return bits_per_byte(self.objective, batches, corpus.num_bytes)

    def _save(self, metrics: MetricsFile, state: TrainingState) -> None:
        from andromeda.checkpoint import save_checkpoint
        from andromeda.training.state import save_state

        def add(folder: Path) -> None:
            self.tokenizer.save(folder)
            save_state(folder, state, self.model, self.optimizer)

        metrics.sync()
        save_checkpoint(self.directory.checkpoint(state.step), self.model, files=add)
        self.directory.keep(self.recipe.keep_last)
        if time.monotonic() - self._plotted > PLOT_SECONDS:
            self._plot()

    def _plot(self) -> bool:
        from andromeda.training.metrics import read_metrics
        from andromeda.training.plot import plot_losses

        self._plotted = time.monotonic()
        return plot_losses(read_metrics(self.directory.metrics), self.directory.plot, str(self.directory.path))


def prepare(recipe: Recipe, run: RunDirectory, start: Start) -> Session:
    """Reads the corpora and moves the model to the device.

    Raises:
        AndromedaError: a corpus without text, damaged or not UTF-8.
    """
    import torch

    from andromeda.training.objective import NextToken
    from andromeda.training.optimizer import build_optimizer
    from andromeda.training.state import restore

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus, validation = _corpora(recipe, run, start.tokenizer)
    if start.state.data_key not in ("", corpus.key):
        _say("warning: the training data is not what this run began with; it goes on with what is there now")
    state = replace(start.state, data_key=corpus.key)
    model = start.model.to(device)
    optimizer = build_optimizer(model, recipe)
    if start.tensors is not None:
        restore(start.tensors, model, optimizer)
    objective = NextToken(model, device, getattr(torch, recipe.precision))
    _introduce(recipe, run, model, corpus, validation, device)
    if state.step:
        _say(f"{run.path}: going on from step {state.step:,} of {recipe.steps:,}")
    return Session(
        recipe, run, model, start.tokenizer, optimizer, objective, state, corpus, validation,
        recipe.sequence_length(model.config),
    )  # fmt: skip


def _corpora(recipe: Recipe, run: RunDirectory, tokenizer: Tokenizer) -> tuple[Corpus, Corpus | None]:
    from andromeda.data.text import load_corpus

    corpus = load_corpus(recipe.data.train_paths, tokenizer, run.data / "train")
    if not recipe.data.validation_paths:
        return corpus, None
    return corpus, load_corpus(recipe.data.validation_paths, tokenizer, run.data / "validation")


def _introduce(
    recipe: Recipe,
    run: RunDirectory,
    model: Andromeda,
    corpus: Corpus,
    validation: Corpus | None,
    device: torch.device,
) -> None:
    tokens_a_step = recipe.batch_size * recipe.accumulate * recipe.sequence_length(model.config)
    passes = recipe.steps * tokens_a_step / len(corpus.tokens)
    held_out = "no validation" if validation is None else f"validation on {len(validation.tokens):,}"
    _say(f"{run.path}: {count(model.config.num_parameters())} parameters on {device.type}, {recipe.precision}")
    _say(
        f"data: {len(corpus.tokens):,} tokens of {corpus.bytes_per_token:.2f} bytes, {held_out}; "
        f"{recipe.steps:,} steps of {tokens_a_step:,} tokens, {passes:.3g} times through the data"
    )
