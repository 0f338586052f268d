"""What a recipe with tasks makes small: the losses of text and of examples, through one model and a head a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from andromeda.model import IGNORED, Andromeda
from andromeda.training.nebula.heads import Head, HeadSpec
from andromeda.training.nebula.losses import (
    Classification,
    Distillation,
    LanguageModel,
    Loss,
    MultiLabel,
    Regression,
    Unprojected,
)
from andromeda.training.nebula.nebula import Balancing, Given, Nebula, Task
from andromeda.training.nebula.packing import Packed, pack
from andromeda.training.nebula.recipe import TaskRecipe, text_task
from andromeda.training.nebula.targets import THRESHOLD
from andromeda.training.objective import Batch, NextToken

ATTACHED = "tasks"  # the name under which a model has them
Examples = tuple[Sequence[Tensor], Tensor]  # ids of each input, and (E, ...) targets
Reader = Callable[[int, int], Examples]  # (first, count) -> that many, by number


class Tasks(nn.Module):
    """The heads of a recipe's tasks and their balance, which learn with the model that they are attached to.

    Attributes:
        text: the name of the language model among the tasks.
        teachers: of distillations, which are no part of this: they learn nothing, and lie in no checkpoint.

    Args:
        specs: of the heads, by task.
    """

    def __init__(
        self, dim: int, recipes: Mapping[str, TaskRecipe], balance: Balancing, specs: Mapping[str, HeadSpec],
        teachers: Mapping[str, Andromeda] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.text, self.teachers = text_task(recipes), dict(teachers or {})
        self.names = sorted(recipes)  # whatever their order in the recipe, so that all goes on with its own
        self.heads = nn.ModuleDict({f"to_{name}": Head(dim, specs[name]) for name in self.names if name in specs})
        tasks = {name: Task(_loss(recipes[name], specs.get(name)), recipes[name].weight) for name in self.names}
        self.nebula = Nebula(tasks, balance)

    @property
    def reads_text(self) -> bool:
        return self.text is not None or bool(self.teachers)

    def has_head(self, name: str) -> bool:
        return f"to_{name}" in self.heads

    def head(self, name: str) -> Head:
        head = self.heads[f"to_{name}"]
        assert isinstance(head, Head)
        return head


def attach(model: Andromeda, tasks: Tasks) -> None:
    """Heads and balance become parts of the model: what moves, clips or gathers its weights takes theirs too."""
    model.add_module(ATTACHED, tasks)
    if not tasks.reads_text and not model.config.tie_embeddings:
        model.to_logits.requires_grad_(False)  # nothing reads it, and of all that learns gradients are awaited


def attached(model: nn.Module) -> Tasks | None:
    tasks = getattr(model, ATTACHED, None)
    assert tasks is None or isinstance(tasks, Tasks)
    return tasks


def _loss(recipe: TaskRecipe, spec: HeadSpec | None) -> Loss:
    if recipe.stated_kind == "distillation":
        return Distillation(recipe.temperature, recipe.reverse)
    if spec is None:
        return LanguageModel(recipe.smoothing, recipe.z_loss)
    if spec.target.kind == "classification":
        return Classification(recipe.smoothing)
    return MultiLabel() if spec.target.kind == "multi_label" else Regression(recipe.huber)


@dataclass(frozen=True)
class Mixed:
    """Of a step, or the part of it that is computed at once: text, and examples of tasks.

    Attributes:
        targets: of the examples, by task, in the order in which they are packed.
        counts: (K,) elements of the whole step.
        share: of the step that this part is.
    """

    text: Batch | None
    packed: Packed | None
    targets: Mapping[str, Tensor]
    counts: Tensor
    share: float

    @property
    def examples_read(self) -> int:
        """Tokens of the examples that go through the model, padding too."""
        return 0 if self.packed is None else self.packed.ids.numel()


def mix(text: Batch | None, examples: Mapping[str, Examples], counts: Tensor, share: float, most: int) -> Mixed:
    """
    Args:
        most: tokens of a row of examples.
    """
    inputs = [ids for given, _ in examples.values() for ids in given]
    packed = pack(inputs, most) if inputs else None
    return Mixed(text, packed, {name: targets for name, (_, targets) in examples.items()}, counts, share)


class Multitask(NextToken):
    """(1 + 3K,) float64 of `Mixed`: the balanced loss, and a table of the tasks, (3, K), flat.

    The table has of each task the sum of its losses, their number, and the sum of what `_measure` counts. Of a batch of
    text alone the cross-entropy of its targets, as `NextToken`.
    """

    is_text: ClassVar[bool] = False

    def __init__(self, model: Andromeda, device: torch.device, precision: torch.dtype = torch.float32) -> None:
        super().__init__(model, device, precision)
        tasks = attached(model)
        assert tasks is not None
        for teacher in tasks.teachers.values():
            teacher.to(device).eval().requires_grad_(False)
        self.figures = tuple(f"{name}/{row}" for row in ("losses", "count", "measure") for name in tasks.names)

    def totals(self, losses: Tensor) -> Tensor:
        return losses

    def forward(self, batch: Batch | Mixed) -> Tensor:
        if not isinstance(batch, Mixed):
            return super().forward(batch)
        tasks = attached(self.model)
        assert tasks is not None
        lower = self.precision is not torch.float32
        with torch.autocast(self.device.type, self.precision if lower else torch.bfloat16, enabled=lower):
            given = self._given(batch, tasks)
            total = tasks.nebula(given, batch.counts.to(self.device), batch.share)
        measures = [
            _measure(tasks, name, given[name]) if name in given else total.sums.new_zeros(()) for name in tasks.names
        ]
        table = torch.stack([total.sums, total.counts, torch.stack(measures)])
        return torch.cat([total.loss[None].double(), table.flatten().double()])

    def _given(self, batch: Mixed, tasks: Tasks) -> dict[str, Given]:
        given: dict[str, Given] = {} if batch.text is None else self._given_text(batch.text, tasks)
        if batch.packed is None:
            return given
        packed = batch.packed.to(self.device)
        hidden = self.model.hidden(packed.ids, documents=packed.documents)
        first = 0
        for name, targets in batch.targets.items():
            own = slice(first, first + len(targets))
            head = tasks.head(name)
            scores = head.read(hidden, packed._replace(first=packed.first[own], last=packed.last[own]))
            given[name] = Given(
                scores[:, 0] if head.spec.target.kind == "regression" else scores, targets.to(self.device)
            )
            first += len(targets)
        return given

    def _given_text(self, text: Batch, tasks: Tasks) -> dict[str, Given]:
        ids, targets, documents = (None if x is None else x.to(self.device) for x in text)
        assert ids is not None and targets is not None
        told = Unprojected(self.model.hidden(ids, documents=documents), self.model.output_weight)
        given = {} if tasks.text is None else {tasks.text: Given(told, targets)}
        for name, teacher in tasks.teachers.items():
            with torch.no_grad():
                wanted = Unprojected(teacher.hidden(ids, documents=documents), teacher.output_weight)
            given[name] = Given(told, wanted, weights=targets != IGNORED)
        return given


def table_of(totals: Tensor) -> Tensor:
    """(3, K) of what `Multitask` gave, or of sums of such."""
    return totals[1:].view(3, -1)


def _measure(tasks: Tasks, name: str, given: Given) -> Tensor:
    """() how many targets were told right; of a regression the squared errors, in the target's own units."""
    if not tasks.has_head(name):
        return torch.zeros((), device=given.prediction.hidden.device)
    scores, target = given.prediction, given.target
    spec = tasks.head(name).spec.target
    if spec.kind == "classification":
        return (scores.argmax(-1) == target).sum()
    if spec.kind == "multi_label":
        return ((scores > THRESHOLD) == (target > 0.5)).all(-1)[~target.isnan().any(-1)].sum()
    return ((scores.detach() - target) * spec.scale).square().nansum()


def nothing(tasks: Tasks, name: str) -> Examples:
    """An example that counts nothing, for a process that has none left where others compute together."""
    return [torch.zeros(1, dtype=torch.int64)], tasks.head(name).spec.target.nothing()
