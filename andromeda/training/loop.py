"""The training loop. It knows one device, and takes what could be spread over many from outside."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.errors import AndromedaError
from andromeda.model import IGNORED
from andromeda.training.metrics import Meter
from andromeda.training.objective import Batch, Objective
from andromeda.training.optimizer import learning_rate, set_learning_rate
from andromeda.training.progress import Progress
from andromeda.training.recipe import Recipe
from andromeda.training.state import TrainingState
from andromeda.training.steps import Steps


@dataclass(frozen=True)
class Outside:
    """What the loop calls.

    Attributes:
        batches: (first, count) -> that many sequences, by number.
        validate: -> bits per byte; None: there is nothing to validate on.
        save: keeps the model, the optimizer and the state.
        log: takes a line of metrics.
        stop: whether to stop after the step under way.
    """

    batches: Callable[[int, int], Batch]
    validate: Callable[[], float] | None
    save: Callable[[TrainingState], object]
    log: Callable[[dict[str, Any]], object]
    stop: Callable[[], bool]


class Loop:
    """Trains from `state` on; the state follows.

    Equal weights, optimizer, state and data give equal steps, whether or not a process ended in between.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        state: TrainingState,
        steps: Steps,
        meter: Meter,
        outside: Outside,
    ) -> None:
        self.recipe, self.optimizer, self.objective = recipe, optimizer, objective
        self.state, self.steps, self.meter, self.outside = state, steps, meter, outside
        self._parameters = list(model.parameters())
        # On the device, so that a step does not wait for it.
        self._loss_sum = torch.tensor(state.loss_sum, dtype=torch.float64, device=self._parameters[0].device)
        self._gradient_norm = torch.zeros(())
        self._seq_len = steps.longest  # of the last step

    def run(self, progress: Progress) -> None:
        """Until the recipe's last step, or until asked to stop; ends with a checkpoint either way.

        Raises:
            AndromedaError: the loss or the gradient is no number any more; nothing is saved then.
        """
        recipe, state, saved_step = self.recipe, self.state, self.state.step
        while state.step < recipe.num_steps and not self.outside.stop():
            start = time.perf_counter()
            self.step()
            validates = self.outside.validate is not None and self._due(recipe.validate_every)
            if validates or self._due(recipe.log_every):
                line = self._line(start)
                if validates:
                    line["validation_bits_per_byte"] = self._validate()
                self.outside.log(line)
                progress.log(line)
            else:
                state.loss_seconds += time.perf_counter() - start
            progress.advance(state.step)
            if self._due(recipe.save_every):
                self._save()
                saved_step = state.step
        if saved_step != state.step:
            self._save()

    def step(self) -> None:
        """One optimizer step: the mean over all targets of its sequences, however they are split into batches."""
        recipe, state = self.recipe, self.state
        step = self.steps.at(state.sequence)
        batch = self.outside.batches(step.first, step.count)
        targets = int((batch[1] != IGNORED).sum())
        for part in _split(batch, step.at_once):
            loss = self.objective(part).sum()
            (loss / max(1, targets)).backward()  # of a conversation's cut, a step may hold questions alone
            self._loss_sum += loss.detach()
        self._gradient_norm = nn.utils.clip_grad_norm_(self._parameters, recipe.clip_norm or math.inf)
        set_learning_rate(self.optimizer, learning_rate(recipe, state.step))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.sequence += step.count
        state.tokens += targets
        state.loss_tokens += targets
        state.loss_read += batch[0].numel()
        self._seq_len = step.seq_len

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.recipe.num_steps

    def _line(self, start: float) -> dict[str, Any]:
        """Figures since the line before; waits for the device."""
        state, meter = self.state, self.meter
        self._check_finite()
        loss = self._loss_sum.item() / max(1, state.loss_tokens)
        seconds = state.loss_seconds + time.perf_counter() - start
        state.seconds += seconds
        tokens_per_second = state.loss_read / seconds
        self._loss_sum.zero_()
        state.loss_tokens, state.loss_read, state.loss_seconds = 0, 0, 0.0
        return {
            "step": state.step,
            "tokens": state.tokens,
            "loss": loss,
            "train_bits_per_byte": loss / math.log(2) / meter.bytes_per_token,
            "learning_rate": learning_rate(self.recipe, state.step - 1),
            "gradient_norm": self._gradient_norm.item(),
            "seconds": state.seconds,
            "tokens_per_second": tokens_per_second,
            "flops_per_second": tokens_per_second * meter.flops_per_token(self._seq_len),
            "possible_flops_per_second": meter.possible_flops_per_second,
        }

    def _validate(self) -> float:
        assert self.outside.validate is not None
        value = self.outside.validate()
        self._check_finite(value)
        return value

    def _save(self) -> None:
        self._check_finite()
        self.state.loss_sum = self._loss_sum.item()
        self.outside.save(self.state)

    def _check_finite(self, *others: float) -> None:
        """The norm of the last gradient is finite only if all weights before were."""
        if not all(map(math.isfinite, (self._loss_sum.item(), self._gradient_norm.item(), *others))):
            raise AndromedaError(
                f"training: at step {self.state.step} the loss or its gradient is no number any more, so it stops and "
                "keeps the checkpoints it has; lower learning_rate, or raise warmup_steps"
            )


def _split(batch: Batch, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    ids, targets, documents = batch
    for first in range(0, len(ids), size):
        part = slice(first, first + size)
        yield ids[part], targets[part], None if documents is None else documents[part]
