"""Tasks of a recipe: their examples, read and checked, and as what the training loop takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from andromeda.checkpoint import load_checkpoint, load_config, resolve
from andromeda.commands.output import plural, warn
from andromeda.data.examples import Example, read_examples
from andromeda.data.permutation import shuffled
from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer
from andromeda.training.engines import Engine
from andromeda.training.loop import Loop, Outside
from andromeda.training.metrics import BACKWARD_AND_FORWARD, Meter
from andromeda.training.nebula.heads import HeadSpec
from andromeda.training.nebula.keep import KeptTasks, restore_tasks
from andromeda.training.nebula.loop import MultitaskLoop, Source, described
from andromeda.training.nebula.objective import Examples, Tasks, attach, attached, mix, nothing, table_of
from andromeda.training.nebula.packing import encode_inputs
from andromeda.training.nebula.recipe import OF_TEXT, TaskRecipe
from andromeda.training.nebula.targets import build_target, found_kind
from andromeda.training.recipe import Recipe
from andromeda.training.state import TrainingState
from andromeda.training.steps import Step, Steps

VALIDATED = 32  # examples at once


@dataclass(frozen=True)
class TaskFiles:
    """A task's records, and the head that tells their targets."""

    recipe: TaskRecipe
    spec: HeadSpec
    train: list[Example]
    validation: list[Example]


def read_tasks(recipe: Recipe, specs: Mapping[str, HeadSpec] | None = None) -> dict[str, TaskFiles]:
    """The tasks with examples.

    Args:
        specs: of the heads of a run that goes on; None: they follow from the training targets.

    Raises:
        AndromedaError: what `read_examples` raises, targets that may mean several kinds or none, a key that is not the
            kind's, a label without an example, or one that only the validation has.
    """
    read: dict[str, TaskFiles] = {}
    for name, task in recipe.tasks.items():
        if task.stated_kind not in OF_TEXT:
            train, validation = (
                read_examples(paths, task.input, task.target) for paths in (task.train_paths, task.validation_paths)
            )
            if specs is not None and name not in specs:
                raise AndromedaError(f"{recipe.output}: this run has no task {name!r}; choose another output")
            spec = _spec(name, task, train) if specs is None else specs[name]
            for examples in (train, validation):
                _encode(spec, examples)
            read[name] = TaskFiles(task, spec, train, validation)
    return read


def _spec(name: str, task: TaskRecipe, examples: Sequence[Example]) -> HeadSpec:
    values = [example.target for example in examples]
    kind = found_kind(values, name) if task.kind is None else task.kind
    task.check(name, kind)
    assert kind != "language_model" and kind != "distillation"
    return HeadSpec(build_target(kind, values, lambda i: examples[i].where, task.labels, name), task.pooling)


def _encode(spec: HeadSpec, examples: Sequence[Example]) -> Tensor:
    return spec.target.encode([example.target for example in examples], lambda i: examples[i].where)


def check_teachers(recipe: Recipe, num_tokens: int, tokenizer: Tokenizer | None) -> None:
    """
    Args:
        num_tokens: of the model that learns.
        tokenizer: its own; None: one that is yet to be trained.

    Raises:
        AndromedaError: a teacher is no model directory, or has other tokens.
    """
    for name, task in recipe.tasks.items():
        if task.teacher is not None:
            folder = resolve(task.teacher)
            theirs = load_config(folder).num_tokens
            if tokenizer is None or Tokenizer.load(folder).sha256 != tokenizer.sha256 or theirs != num_tokens:
                raise task.wrong(
                    name, "teacher",
                    f"has other tokens than the model ({theirs:,}, and {num_tokens:,}); let tokenizer.path name it",
                )  # fmt: skip


class TaskExamples:
    """Examples by number, without end: in each epoch all of them, in another order.

    Args:
        inputs, targets: of all examples, in the order of the files.
        key: that the order follows from.
    """

    def __init__(self, inputs: Sequence[Tensor], targets: Tensor, key: str) -> None:
        self.inputs, self.targets, self.key = inputs, targets, key

    def read(self, first: int, count: int) -> Examples:
        """Those of the training, shuffled."""
        epochs = (divmod(number, len(self.inputs)) for number in range(first, first + count))
        return self._taken([shuffled(index, len(self.inputs), f"{self.key} {epoch}") for epoch, index in epochs])

    def in_order(self, first: int, count: int) -> Examples:
        """Those of the validation."""
        return self._taken(list(range(first, first + count)))

    def _taken(self, places: list[int]) -> Examples:
        return [self.inputs[place] for place in places], self.targets[torch.tensor(places)]


@dataclass(frozen=True)
class TaskData:
    """What training reads of tasks, whose heads and balance are attached to the model.

    Attributes:
        recipes: of the tasks with examples.
        longest: tokens of an input, and of a row of them.
        train, validation: a task need not have any of the latter.
    """

    recipes: Mapping[str, TaskRecipe]
    longest: int
    train: Mapping[str, TaskExamples]
    validation: Mapping[str, TaskExamples]

    @property
    def described(self) -> str:
        return ", ".join(f"{name} {plural(len(examples.inputs), 'example')}" for name, examples in self.train.items())

    def loop(
        self, recipe: Recipe, engine: Engine, state: TrainingState, steps: Steps, meter: Meter, outside: Outside
    ) -> Loop:
        sources = {name: Source(self.train[name].read, task.batch_size) for name, task in self.recipes.items()}
        sizes = [len(ids) for examples in self.train.values() for ids in examples.inputs]
        config = engine.model.config
        vocabulary = BACKWARD_AND_FORWARD * 2 * config.dim * config.num_tokens  # which examples do not go through
        flops = meter.flops_per_token(round(sum(sizes) / len(sizes))) - vocabulary if sizes else 0.0
        taken = (recipe, engine, state, steps, meter, outside)
        return MultitaskLoop(*taken, sources=sources, longest=self.longest, trunk_flops=flops)

    def validate(self, engine: Engine) -> dict[str, float]:
        """Figures for a line of metrics; each process takes its share of the examples."""
        tasks, processes = attached(engine.model), engine.processes
        assert tasks is not None
        figures: dict[str, float] = {}
        for name, examples in self.validation.items():
            totals = torch.zeros(1 + 3 * len(tasks.names), dtype=torch.float64)
            together = VALIDATED * processes.ranks
            for first in range(0, len(examples.inputs), together):
                step = Step(first, min(together, len(examples.inputs) - first), self.longest, VALIDATED)
                own = step.share(processes.rank, processes.ranks)
                taken = examples.in_order(own.first, own.count) if own.count else nothing(tasks, name)
                with engine.evaluating(), torch.no_grad():
                    part = mix(None, {name: taken}, torch.ones(len(tasks.names)), 0.0, self.longest)
                    totals += engine.objective(part).cpu()
            column = table_of(processes.sum(totals))[:, tasks.names.index(name)]
            figures |= described(tasks, name, column, "validation_")
        return figures


def prepare_tasks(
    recipe: Recipe, model: Andromeda, tokenizer: Tokenizer, kept: KeptTasks | None, longest: int
) -> TaskData:
    """Reads the examples, as token ids in memory, and attaches heads and balance to the model.

    Args:
        kept: of the checkpoint that training goes on from.
        longest: tokens of an input; says how many are cut.

    Raises:
        AndromedaError: what `read_tasks` raises, or the checkpoint has other tasks.
    """
    files = read_tasks(recipe, None if kept is None else kept.specs)
    specs = {name: task.spec for name, task in files.items()}
    teachers = {
        name: load_checkpoint(resolve(task.teacher)) for name, task in recipe.tasks.items() if task.teacher is not None
    }
    tasks = Tasks(model.config.dim, recipe.tasks, recipe.balance, specs, teachers)
    if kept is not None:
        restore_tasks(tasks, kept)
    attach(model, tasks)
    train, validation = (
        {
            name: _encoded(f"tasks.{name}", examples, task.spec, tokenizer, longest, f"{name} {recipe.seed}")
            for name, task in files.items()
            if (examples := getattr(task, part))
        }
        for part in ("train", "validation")
    )
    return TaskData({name: task.recipe for name, task in files.items()}, longest, train, validation)


def _encoded(
    name: str, examples: Sequence[Example], spec: HeadSpec, tokenizer: Tokenizer, longest: int, key: str
) -> TaskExamples:
    inputs, cut = encode_inputs(tokenizer, [example.text for example in examples], longest)
    if cut:
        warn(
            f"{name}: {cut} of {plural(len(inputs), 'input')} have more than {longest} tokens and lose their beginning"
        )
    return TaskExamples(inputs, _encode(spec, examples), key)
