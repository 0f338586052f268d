"""The loop of a recipe with tasks: each step takes some of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from andromeda.errors import AndromedaError
from andromeda.model import IGNORED
from andromeda.training.loop import Loop
from andromeda.training.nebula.objective import Examples, Mixed, Reader, Tasks, attached, mix, nothing, table_of
from andromeda.training.objective import Batch
from andromeda.training.steps import Step


@dataclass(frozen=True)
class Source:
    """Where a task's examples come from.

    Attributes:
        read: by number, without end.
        batch_size: examples a step.
    """

    read: Reader
    batch_size: int


class MultitaskLoop(Loop):
    """`Loop` whose steps take, beside the next sequences of the text, the next examples of each task.

    Which these are follows from the number of the step alone. They are spread evenly over the parts of a step and over
    the processes; each part has some of each task, or one that counts nothing, so that all weights take part in all.
    """

    def __init__(self, *args: Any, sources: Mapping[str, Source], longest: int, trunk_flops: float) -> None:
        """
        Args:
            sources: of the tasks with examples.
            longest: tokens of a row of examples.
            trunk_flops: operations of a step for a token of an example, as `Meter.flops_per_token` has them for text.
        """
        super().__init__(*args)
        tasks = attached(self.engine.model)
        assert tasks is not None
        self.tasks: Tasks = tasks
        self.sources = dict(sorted(sources.items()))  # as the tasks are, so that what is packed where does not change
        self.longest, self.trunk_flops = longest, trunk_flops
        self._step: tuple[list[Mixed], Tensor] = ([], self._sums)  # the last one's parts, and what they came to

    def step(self) -> None:
        before_step, balance = self.state.loss_tokens, self.tasks.nebula.balance
        super().step()
        if balance.looks_again and self.state.loss_tokens > before_step:  # else the weights are where they were
            parts, before = self._step
            with torch.no_grad():
                after = sum((self.engine.objective(part) for part in parts), start=torch.zeros_like(before))
            balance.observe(*(_means(self.processes.sum(x.cpu())).to(balance.weights) for x in (before, after)))

    def _gradients(self, step: Step) -> tuple[int, int, Tensor]:
        """Its loss is that of one step, whatever it is made of."""
        parts = self._mixed(step)
        sums = torch.zeros_like(self._sums)
        for number, part in enumerate(parts, start=1):
            sums += self.engine.accumulate(part, 1.0, last=number == len(parts))
            self.processes.moved()
            self.state.examples_read += part.examples_read * self.processes.ranks  # about
        self._step = parts, sums
        return int(parts[0].counts.sum()), 1, sums

    def _halve(self, step: Step) -> None:
        if not self.tasks.reads_text:
            raise AndromedaError(
                "training: out of memory with the examples of a step; raise accumulate, or lower their batch_size"
            )
        super()._halve(step)

    def _mixed(self, step: Step) -> list[Mixed]:
        """This process' share of a step, in parts: as many in every process."""
        texts: list[Batch | None] = [None] * self.recipe.accumulate
        if self.tasks.reads_text:
            texts = list(self._parts(step))
        counts = self._counts(texts)
        share = 1 / (len(texts) * self.processes.ranks)
        place = self.processes.rank * len(texts)
        return [
            mix(text, self._examples(place + number, len(texts) * self.processes.ranks), counts, share, self.longest)
            for number, text in enumerate(texts)
        ]

    def _counts(self, texts: list[Batch | None]) -> Tensor:
        """(K,) targets of the whole step."""
        mine = sum(int((text[1] != IGNORED).sum()) for text in texts if text is not None)
        targets = int(self.processes.sum(torch.tensor(mine)))
        return torch.tensor(
            [float(self.sources[name].batch_size if name in self.sources else targets) for name in self.tasks.names]
        )

    def _examples(self, part: int, parts: int) -> dict[str, Examples]:
        """Those of a part of the step under way."""
        examples: dict[str, Examples] = {}
        for name, source in self.sources.items():
            step = Step(self.state.step * source.batch_size, source.batch_size, self.longest, source.batch_size)
            own = step.share(part, parts)
            examples[name] = source.read(own.first, own.count) if own.count else nothing(self.tasks, name)
        return examples

    def _named(self, step: Step) -> str:
        numbers = {name: source.batch_size for name, source in self.sources.items()}
        examples = [f"{name} {(self.state.step - 1) * n} to {self.state.step * n - 1}" for name, n in numbers.items()]
        return ", ".join(([super()._named(step)] if step.count else []) + examples)

    def _losses(self) -> dict[str, float]:
        """Of each task the mean loss, what it is weighed by, and how often or how closely it was right.

        `loss` is the mean over steps of what was made small.
        """
        sums = torch.tensor(self._checked_sums(), dtype=torch.float64)
        line = {"loss": sums[0].item() / max(1, self.state.loss_tokens)}
        if self.tasks.text is not None:
            nats = _means(sums)[self.tasks.names.index(self.tasks.text)].nan_to_num().item()
            line["train_bits_per_byte"] = nats / math.log(2) / self.meter.bytes_per_token
        with self.engine.whole():
            weights = self.tasks.nebula.balance.coefficients().tolist()
        for place, name in enumerate(self.tasks.names):
            line |= described(self.tasks, name, table_of(sums)[:, place]) | {f"{name}/weight": weights[place]}
        return line

    def _read(self) -> tuple[int, float]:
        read, flops = super()._read()
        examples, self.state.examples_read = self.state.examples_read, 0
        return read + examples, flops + examples * self.trunk_flops


def described(tasks: Tasks, name: str, column: Tensor, prefix: str = "") -> dict[str, float]:
    """A task's column of the table of `Multitask` as figures for a line of metrics; none where it had no target.

    `accuracy` is the share of examples told right (of several labels, all of them), `error` the root of the mean
    squared error in the target's units.
    """
    losses, count, measure = column.tolist()
    if not count:
        return {}
    figures = {f"{name}/{prefix}loss": losses / count}
    if tasks.has_head(name):
        regression = tasks.head(name).spec.target.kind == "regression"
        figures[f"{name}/{prefix}{'error' if regression else 'accuracy'}"] = (
            math.sqrt(measure / count) if regression else measure / count
        )
    return figures


def _means(totals: Tensor) -> Tensor:
    """(K,) mean losses of what `Multitask` gave; NaN where a task had no target."""
    losses, counts, _ = table_of(totals)
    return losses / counts
