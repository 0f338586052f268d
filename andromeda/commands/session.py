"""One process of `andromeda train`: all that the training loop takes from outside."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from andromeda.checkpoint import save_checkpoint
from andromeda.commands.output import count, plain_console, plural, say, warn
from andromeda.commands.start import Start
from andromeda.data.text import Corpus, load_corpus
from andromeda.data.windows import TokenWindows, validation_batches
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer
from andromeda.training.loop import Loop, Outside
from andromeda.training.metrics import (
    Meter,
    MetricsFile,
    possible_flops_per_second,
    read_metrics,
    training_flops_per_token,
)
from andromeda.training.objective import NextToken, bits_per_byte
from andromeda.training.optimizer import build_optimizer
from andromeda.training.plot import plot_losses
from andromeda.training.progress import show_progress
from andromeda.training.recipe import Recipe
from andromeda.training.run import RunDirectory
from andromeda.training.state import TrainingState, restore, save_state

PLOT_SECONDS = 60.0  # between two drawings of the loss curve, while training goes on
NO_PLOT = "no loss curve: matplotlib is not installed; pip install 'andromeda-lm[train]'"


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

    def introduce(self) -> None:
        """Says what is trained on what."""
        recipe, run, corpus, step = self.recipe, self.directory, self.corpus, self.state.step
        parameters = count(self.model.config.num_parameters())
        say(f"{run.path}: {parameters} parameters on {self.objective.device.type}, {recipe.precision}")
        held_out = "no validation" if self.validation is None else f"validation on {len(self.validation.tokens):,}"
        tokens_a_step = recipe.batch_size * recipe.accumulate * self.seq_len
        passes = recipe.steps * tokens_a_step / len(corpus.tokens)
        say(
            f"data: {plural(len(corpus.tokens), 'token')} of {corpus.bytes_per_token:.2f} bytes, {held_out}; "
            f"{plural(recipe.steps, 'step')} of {plural(tokens_a_step, 'token')}, {passes:.3g} times through the data"
        )
        if step:
            say(f"{run.path}: going on from step {step:,} of {recipe.steps:,}")

    def run(self, stop: Callable[[], bool]) -> None:
        """Trains to the end, or until asked to stop."""
        with closing(MetricsFile(self.directory.metrics, self.state.step)) as metrics:
            loop = Loop(
                self.recipe, self.model, self.optimizer, self.objective, self.state, self._meter(),
                self._outside(metrics, stop),
            )  # fmt: skip
            with show_progress(self.recipe.steps, self.state.step, plain_console()) as progress:
                loop.run(progress)
        drawn = self._plot()
        say(f"loss curve: {self.directory.plot}" if drawn else NO_PLOT)

    def _meter(self) -> Meter:
        return Meter(
            bytes_per_token=self.corpus.bytes_per_token,
            flops_per_token=partial(training_flops_per_token, self.model, self.seq_len),
            possible_flops_per_second=possible_flops_per_second(self.objective.device, self.objective.precision),
        )

    def _outside(self, metrics: MetricsFile, stop: Callable[[], bool]) -> Outside:
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
        batches = validation_batches(
            corpus.tokens,
            self.seq_len,
            self.recipe.batch_size,
            end_of_text=self.tokenizer.eos_id,
            packed_documents=self.recipe.data.packed_documents,
        )
        return bits_per_byte(self.objective, batches, corpus.num_bytes)

    def _save(self, metrics: MetricsFile, state: TrainingState) -> None:
        def add(folder: Path) -> None:
            self.tokenizer.save(folder)
            save_state(folder, state, self.model, self.optimizer)

        metrics.sync()
        save_checkpoint(self.directory.checkpoint(state.step), self.model, files=add)
        self.directory.keep(self.recipe.keep_last)
        if time.monotonic() - self._plotted > PLOT_SECONDS:
            self._plot()

    def _plot(self) -> bool:
        self._plotted = time.monotonic()
        return plot_losses(read_metrics(self.directory.metrics), self.directory.plot, str(self.directory.path))


def prepare(recipe: Recipe, run: RunDirectory, start: Start) -> Session:
    """Reads the corpora and moves the model to the device.

    Raises:
        AndromedaError: a corpus without text, damaged or not UTF-8.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus, validation = _corpora(recipe, run, start.tokenizer)
    if start.state.data_key not in ("", corpus.key):
        warn("the training data is not what this run began with; it goes on with what is there now")
    state = replace(start.state, data_key=corpus.key)
    model = start.model.to(device)
    optimizer = build_optimizer(model, recipe)
    if start.tensors is not None:
        restore(start.tensors, model, optimizer)
    objective = NextToken(model, device, getattr(torch, recipe.precision))
    return Session(
        recipe, run, model, start.tokenizer, optimizer, objective, state, corpus, validation,
        recipe.sequence_length(model.config),
    )  # fmt: skip


def _corpora(recipe: Recipe, run: RunDirectory, tokenizer: Tokenizer) -> tuple[Corpus, Corpus | None]:
    corpus = load_corpus(recipe.data.train_paths, tokenizer, run.data / "train")
    if not recipe.data.validation_paths:
        return corpus, None
    return corpus, load_corpus(recipe.data.validation_paths, tokenizer, run.data / "validation")
