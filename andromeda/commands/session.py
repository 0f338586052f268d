"""One process of `andromeda train`: all that the training loop takes from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from andromeda.checkpoint import load_checkpoint, save_checkpoint
from andromeda.commands.output import count, plain_console, plural, say, warn
from andromeda.commands.reference import Compared, compare
from andromeda.commands.start import Start, model_to_train
from andromeda.commands.summary import About, summarise
from andromeda.commands.tasks import TaskData, prepare_tasks
from andromeda.commands.training_data import (
    TrainingData,
    build_data,
    check_text_key,
    held_out_pairs,
    no_text,
    pairs_data,
    text_data,
    validation_files,
)
from andromeda.data.stream import Stream
from andromeda.data.text import Corpus, load_corpus
from andromeda.data.windows import validation_batches
from andromeda.errors import AndromedaError
from andromeda.tokenizer import Tokenizer
from andromeda.training.diloco import Group, Replica
from andromeda.training.engines import Engine, build_engine
from andromeda.training.heads import certificates, entropies
from andromeda.training.loop import DivergedError, Loop, Outside, in_turns
from andromeda.training.lora import load_adapter, merged, save_adapter
from andromeda.training.metrics import Meter, possible_flops_per_second, training_flops_per_token
from andromeda.training.nebula.keep import load_tasks, save_tasks, split
from andromeda.training.nebula.objective import attached
from andromeda.training.objective import Batch, bits_per_byte, total_nats
from andromeda.training.preference import save_reference
from andromeda.training.processes import Processes
from andromeda.training.progress import Silent, show_progress
from andromeda.training.recipe import Recipe
from andromeda.training.records import Records
from andromeda.training.run import RunDirectory
from andromeda.training.state import FOLDER, TrainingState, load_state, save_state

LOOK_BACK_SECONDS = 60.0  # at least, between two summaries while training goes on,
LOOK_BACK_SHARE = 100  # and so many times what the last one took
NO_PLOT = "no pictures: matplotlib is not installed; pip install 'andromeda-lm[train]'"


@dataclass
class Session:
    """All that one process needs of a run, read and built."""

    recipe: Recipe
    directory: RunDirectory
    engine: Engine
    tokenizer: Tokenizer
    state: TrainingState
    data: TrainingData
    validation: Corpus | None
    tasks: TaskData | None = None
    compared: Compared | None = None
    group: Group = field(default_factory=Group)
    _look_back_at: float = field(default_factory=lambda: time.monotonic() + LOOK_BACK_SECONDS)

    def introduce(self) -> None:
        """Says what is trained on what."""
        recipe, run, data, step = self.recipe, self.directory, self.data, self.state.step
        parameters, processes = count(self.engine.model.config.num_parameters()), self.engine.processes
        many = "" if processes.ranks == 1 else f", {processes.ranks} processes, {recipe.engine}"
        many += "" if processes.together == 1 else f", {processes.together} to a sequence"
        some = "" if recipe.lora is None else f", of an adapter {count(self.engine.num_learned)} are trained"
        say(f"{run.path}: {parameters} parameters{some}, on {processes.device.type}, {recipe.precision}{many}")
        tokens = data.steps.tokens
        passes = recipe.num_steps * tokens / data.num_tokens if data.num_tokens else None
        say(
            f"data: {self._described}, {self._validated or 'no validation'}; {plural(recipe.num_steps, 'step')} of "
            f"{plural(tokens, 'token')}" + ("" if passes is None else f", {passes:.3g} times through the data")
        )
        if step:
            say(f"{run.path}: going on from step {step:,} of {recipe.num_steps:,}")

    def run(self, stop: Callable[[], bool]) -> None:
        """Trains to the end, or until asked to stop."""
        if not self.engine.processes.first:
            self._loop(None, stop).run(Silent())
            return
        with self.group.joined(say), closing(Records(self.directory, self.recipe, self.state.step, warn)) as records:
            loop = self._loop(records, stop)
            with show_progress(self.recipe.num_steps, self.state.step, plain_console()) as progress:
                try:
                    loop.run(progress)
                except DivergedError as error:
                    self._look_back(f"Ended by an error: {error}")
                    raise
        done = self.state.step == self.recipe.num_steps
        self._look_back("Finished." if done else f"Stopped at {self._reached()}; the same command goes on.", say)

    def _loop(self, records: Records | None, stop: Callable[[], bool]) -> Loop:
        """Args: records: None in a process that does not write."""
        nothing: Callable[[dict[str, Any]], object] = lambda _: None  # noqa: E731
        validates = self._validated or (self.tasks is not None and self.tasks.validation)
        outside = Outside(
            batches=self.data.batches,
            validate=self._validate if validates else None,
            save=(lambda _: self._gather()) if records is None else partial(self._save, records),
            log=nothing if records is None else records.metrics,
            stop=stop,
            go_back=self._go_back,
            warn=warn,
            watch=partial(self._watch, nothing if records is None else records.heads),
            after_step=self.group.after_step,
        )
        taken = (self.recipe, self.engine, self.state, self.data.steps, self._meter(), outside)
        return Loop(*taken) if self.tasks is None else self.tasks.loop(*taken)

    def _meter(self) -> Meter:
        processes = self.engine.processes
        possible = possible_flops_per_second(processes.device, self.recipe.activations)
        return Meter(
            bytes_per_token=self.data.bytes_per_token,
            flops_per_token=self._flops_per_token,
            possible_flops_per_second=processes.sum(torch.tensor(possible, dtype=torch.float64)).item(),
        )

    def _flops_per_token(self, seq_len: int) -> float:
        with self.engine.whole():
            return training_flops_per_token(self.engine.model, min(seq_len, self.data.longest))

    def _watch(self, write: Callable[[dict[str, Any]], object], state: TrainingState) -> None:
        """A line on the heads; all processes compute it, from the same text."""
        line: dict[str, Any] = {"step": state.step, "tokens": state.tokens}
        with self.engine.whole():
            line |= certificates(self.engine.model)
        if self.validation is not None:
            text = next(self._validation_batches(self.validation, 1))
            with self.engine.evaluating():
                line["entropies"] = entropies(self.engine.model, self.engine.objective, text, self.recipe.compile)
        write(line)

    def _validate(self) -> dict[str, float]:
        """Figures for a line of metrics."""
        values = {}
        if self.validation is not None:
            values["validation_bits_per_byte"] = self._bits_per_byte(self.validation)
        if self.compared is not None:
            values |= self.compared.validate(self.engine)
        return values if self.tasks is None else values | self.tasks.validate(self.engine)

    def _bits_per_byte(self, corpus: Corpus) -> float:
        """Processes take turns with the batches."""
        mine = in_turns(
            self._validation_batches(corpus, self.recipe.batch_size), self.engine.processes, self.data.longest
        )
        with self.engine.evaluating():
            nats = total_nats(self.engine.objective, mine)
        return bits_per_byte(self.engine.processes.sum(nats.cpu()).item(), corpus.num_bytes)

    def _validation_batches(self, corpus: Corpus, batch_size: int) -> Iterator[Batch]:
        return validation_batches(
            corpus.tokens, self.data.longest, batch_size, end_of_text=self.tokenizer.eos_id,
            packed_documents=self.recipe.data.packed_documents,
        )  # fmt: skip

    def _gather(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Weights and the optimizer's tensors, which all processes give to the first."""
        return self.engine.weights(), self.engine.optimizer_tensors()

    def _go_back(self) -> bool:
        """To the newest checkpoint that is whole, in every process."""
        for path in self.directory.checkpoints():
            try:
                weights, tensors = load_adapter(path) or load_checkpoint(path).state_dict(), load_state(path)[1]
                tasks = load_tasks(path).tensors
            except AndromedaError:
                continue
            self.engine.take({**weights, **tasks})
            self.engine.restore(tensors)
            return True
        return False

    def _save(self, records: Records, state: TrainingState) -> None:
        weights, tensors = self._gather()
        weights, of_tasks = split(weights)
        tasks = attached(self.engine.model)
        learned, lora = weights, self.recipe.lora
        if lora is not None:
            weights = merged(learned, lora)

        def add(folder: Path) -> None:
            self.tokenizer.save(folder)
            save_state(folder, state, tensors)
            if lora is not None:
                save_adapter(folder, learned, lora, str(self.recipe.model_from))
            if tasks is not None:
                save_tasks(folder, tasks, of_tasks)
            if self.compared is not None:
                save_reference(folder / FOLDER, self.compared.reference)
            self.group.save(folder / FOLDER)

        try:
            try:
                records.sync()
            finally:  # what was measured may have no room where weights have
                save_checkpoint(self.directory.checkpoint(state.step), self.engine.model, weights=weights, files=add)
                self.directory.keep(self.recipe.keep_last, self.recipe.keep_best)
        except AndromedaError as error:
            if self.recipe.failed_save == "stop" or state.step == self.recipe.num_steps:
                raise
            warn(f"{error}; training goes on")
            return
        if time.monotonic() > self._look_back_at and state.step < self.recipe.num_steps:
            self._look_back(f"Training stands at {self._reached()}.")

    @property
    def _described(self) -> str:
        return self.data.described if self.tasks is None else f"{self.data.described}, {self.tasks.described}"

    @property
    def _validated(self) -> str:
        """In words; nothing where nothing is, but tasks."""
        what = [] if self.validation is None else [plural(len(self.validation.tokens), "token")]
        what += [] if self.compared is None else self.compared.described
        return f"validation on {' and '.join(what)}" if what else ""

    def _reached(self) -> str:
        return f"step {self.state.step:,} of {self.recipe.num_steps:,}"

    def _look_back(self, status: str, tell: Callable[[str], object] = lambda _: None) -> None:
        """The summary and its pictures; training does not depend on them."""
        begin = time.monotonic()
        held_out = f"; {self._validated}" if self._validated else ""
        about = About(
            self.recipe, self.engine.model.config, self.engine.processes, status, self._described + held_out,
            self.data.longest,
        )  # fmt: skip
        try:
            drawn = summarise(self.directory, about)
            tell(f"summary: {self.directory.summary}" + ("" if drawn else f"; {NO_PLOT}"))
        except Exception as error:  # noqa: BLE001 - a full disk, or whatever hinders drawing
            warn(f"{self.directory.summary}: cannot be written: {' '.join(str(error).split())}; the run does without")
        seconds = time.monotonic() - begin
        self._look_back_at = begin + seconds + max(LOOK_BACK_SECONDS, LOOK_BACK_SHARE * seconds)


def prepare(recipe: Recipe, run: RunDirectory, start: Start, stream: Stream | None, processes: Processes) -> Session:
    """Reads the text, and moves the model to where it is trained.

    Args:
        stream: the recipe's build, opened; None: it trains on text.

    Raises:
        AndromedaError: text files without text, damaged or not UTF-8.
    """
    validation, tasks = None, None
    model = model_to_train(recipe, start)
    with processes.first_alone():
        data = _data(recipe, run, start, stream)
        if recipe.tasks:
            longest = min(data.steps.lengths)
            tasks = prepare_tasks(recipe, model, start.tokenizer, start.tasks, longest)
        texts, of_pairs = validation_files(recipe)
        if texts:
            validation = load_corpus(texts, start.tokenizer, run.data / "validation")
        held_out = held_out_pairs(recipe, of_pairs, run.data / "held-out", start.tokenizer, data.longest)
    engine = build_engine(recipe, model, processes)
    if start.tensors is not None:
        engine.restore(start.tensors)
    compared = None if data.pairs is None else compare(engine, data.pairs, held_out, start)
    state = replace(start.state, data_key=data.key)
    group = Group() if recipe.diloco is None else Replica(recipe, recipe.diloco, engine, state, start.shared, warn)
    return Session(recipe, run, engine, start.tokenizer, state, data, validation, tasks, compared, group)


def _data(recipe: Recipe, run: RunDirectory, start: Start, stream: Stream | None) -> TrainingData:
    if stream is not None:
        return build_data(recipe, stream)
    seq_len = recipe.sequence_length(start.model.config)
    if recipe.data.pairs:
        return pairs_data(recipe, run.data / "pairs", start.tokenizer, seq_len, start.state)
    if not recipe.reads_text:
        return no_text(recipe, seq_len)
    corpus = load_corpus(recipe.data.train_paths, start.tokenizer, run.data / "train")
    data = text_data(recipe, corpus, start.tokenizer, seq_len)
    check_text_key(start.state, data)
    return data
