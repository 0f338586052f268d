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
from andromeda.commands.output import count, plain_console, plural, say
from andromeda.commands.start import Start
from andromeda.commands.training_data import TrainingData, build_data, check_text_key, text_data
from andromeda.data.stream import Stream
from andromeda.data.text import Corpus, load_corpus
from andromeda.data.windows import validation_batches
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
    data: TrainingData
    validation: Corpus | None
    _plotted: float = field(default_factory=time.monotonic)  # when the loss curve was drawn last

    def introduce(self) -> None:
        """Says what is trained on what."""
        recipe, run, data, step = self.recipe, self.directory, self.data, self.state.step
        parameters = count(self.model.config.num_parameters())
        say(f"{run.path}: {parameters} parameters on {self.objective.device.type}, {recipe.precision}")
        held_out = "no validation" if self.validation is None else f"validation on {len(self.validation.tokens):,}"
        tokens = data.steps.tokens
        passes = recipe.num_steps * tokens / data.num_tokens if data.num_tokens else None
        say(
            f"data: {data.described}, {held_out}; {plural(recipe.num_steps, 'step')} of {plural(tokens, 'token')}"
            + ("" if passes is None else f", {passes:.3g} times through the data")
        )
        if step:
            say(f"{run.path}: going on from step {step:,} of {recipe.num_steps:,}")

    def run(self, stop: Callable[[], bool]) -> None:
        """Trains to the end, or until asked to stop."""
        with closing(MetricsFile(self.directory.metrics, self.state.step)) as metrics:
            loop = Loop(
                self.recipe, self.model, self.optimizer, self.objective, self.state, self.data.steps,
                self._meter(), self._outside(metrics, stop),
            )  # fmt: skip
            with show_progress(self.recipe.num_steps, self.state.step, plain_console()) as progress:
                loop.run(progress)
        drawn = self._plot()
        say(f"loss curve: {self.directory.plot}" if drawn else NO_PLOT)

    def _meter(self) -> Meter:
        return Meter(
            bytes_per_token=self.data.bytes_per_token,
            flops_per_token=partial(training_flops_per_token, self.model),
            possible_flops_per_second=possible_flops_per_second(self.objective.device, self.objective.precision),
        )

    def _outside(self, metrics: MetricsFile, stop: Callable[[], bool]) -> Outside:
        return Outside(
            batches=self.data.batches,
            validate=None if self.validation is None else partial(self._validate, self.validation),
            save=partial(self._save, metrics),
            log=metrics.write,
            stop=stop,
        )

    def _validate(self, corpus: Corpus) -> float:
        batches = validation_batches(
            corpus.tokens,
            self.data.steps.longest,
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


def prepare(recipe: Recipe, run: RunDirectory, start: Start, stream: Stream | None) -> Session:
    """Reads the text, and moves the model to the device.

    Args:
        stream: the recipe's build, opened; None: it trains on text.

    Raises:
        AndromedaError: text files without text, damaged or not UTF-8.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = _data(recipe, run, start, stream)
    validation = None
    if recipe.data.validation_paths:
        validation = load_corpus(recipe.data.validation_paths, start.tokenizer, run.data / "validation")
    state = replace(start.state, data_key=data.key)
    model = start.model.to(device)
    optimizer = build_optimizer(model, recipe)
    if start.tensors is not None:
        restore(start.tensors, model, optimizer)
    objective = NextToken(model, device, getattr(torch, recipe.precision))
    return Session(recipe, run, model, start.tokenizer, optimizer, objective, state, data, validation)


def _data(recipe: Recipe, run: RunDirectory, start: Start, stream: Stream | None) -> TrainingData:
    if stream is not None:
        return build_data(recipe, stream)
    corpus = load_corpus(recipe.data.train_paths, start.tokenizer, run.data / "train")
    data = text_data(recipe, corpus, start.tokenizer, recipe.sequence_length(start.model.config))
    check_text_key(start.state, data)
    return data
