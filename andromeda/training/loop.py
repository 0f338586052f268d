"""The training loop: what happens when. How a step is computed, on one process or many, the engine knows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from andromeda.errors import AndromedaError
from andromeda.model import IGNORED
from andromeda.training import guard
from andromeda.training.engines import Engine
from andromeda.training.metrics import Meter, peak_memory
from andromeda.training.objective import Batch
from andromeda.training.optimizer import learning_rate
from andromeda.training.processes import Processes
from andromeda.training.progress import Progress
from andromeda.training.recipe import Recipe
from andromeda.training.scaling import LossScale
from andromeda.training.state import TrainingState
from andromeda.training.steps import Step, Steps


class DivergedError(AndromedaError):
    """The loss or its gradient is no number, or step after step is refused."""


@dataclass(frozen=True)
class Outside:
    """What the loop calls.

    Attributes:
        batches: (first, count) -> that many sequences, by number.
        validate: -> figures for a line of metrics; None: there is nothing to validate on.
        save: keeps the model, the optimizer and the state.
        log: takes a line of metrics.
        stop: whether this process is to stop after the step under way; all stop then.
        go_back: puts weights and optimizer where the newest checkpoint has them; False: there is none.
        warn: takes a line for whoever waits.
        watch: looks at what the heads do, as often as a validation is due.
        after_step: moves weights and state together with other groups, when it is time; returns what to log.
    """

    batches: Callable[[int, int], Batch]
    validate: Callable[[], dict[str, float]] | None
    save: Callable[[TrainingState], object]
    log: Callable[[dict[str, Any]], object]
    stop: Callable[[], bool]
    go_back: Callable[[], bool]
    warn: Callable[[str], object]
    watch: Callable[[TrainingState], object] | None = None
    after_step: Callable[[], dict[str, Any] | None] = lambda: None


class Loop:
    """Trains from `state` on; the state follows.

    Equal weights, optimizer, state and data give equal steps, whether or not a process ended in between. All processes
    of a run go through it together; each takes its share of a step's sequences.
    """

    def __init__(
        self, recipe: Recipe, engine: Engine, state: TrainingState, steps: Steps, meter: Meter, outside: Outside
    ) -> None:
        self.recipe, self.engine, self.processes = recipe, engine, engine.processes
        self.state, self.steps, self.meter, self.outside = state, steps, meter, outside
        # Of this process, and on the device, so that a step does not wait for it.
        before = [state.loss_sum, *state.figure_sums] if self.processes.first else [0.0]
        self._sums = torch.zeros(1 + len(engine.plain.figures), dtype=torch.float64, device=self.processes.device)
        self._sums[: len(before)] += torch.tensor(before, dtype=torch.float64, device=self.processes.device)
        self._seq_len = steps.longest  # of the last step
        self._most_tokens: int | None = None  # of a forward pass, once memory has shown a limit

    def run(self, progress: Progress) -> None:
        """Until the recipe's last step, or until asked to stop; ends with a checkpoint either way.

        Raises:
            DivergedError: step after step is refused (see `guard`), from the last checkpoint on too, or the validation
                is no number; nothing is saved then.
        """
        recipe, state, saved_step = self.recipe, self.state, self.state.step
        while state.step < recipe.num_steps and not self._told_to_stop():
            start = time.perf_counter()
            self.step()
            if exchanged := self.outside.after_step():
                self.outside.log(exchanged)
            validates = self.outside.validate is not None and self._due(recipe.validate_every)
            if validates or self._due(recipe.log_every):
                line = self._line(start)
                if validates:
                    line |= self._validate()
                self.outside.log(line)
                progress.log(line)
            else:
                state.loss_seconds += time.perf_counter() - start
            if self.outside.watch is not None and self._due(recipe.validate_every):
                self.outside.watch(state)
            progress.advance(state.step)
            if self._due(recipe.save_every) and not state.refused:
                self._save()
                saved_step = state.step
        if state.refused and state.step == recipe.num_steps:
            raise self._diverged()
        if saved_step != state.step and not state.refused:  # else the steps since the last checkpoint are made again
            self._save()

    def step(self) -> None:
        """One optimizer step: the mean over all targets of its sequences, however they are split into batches."""
        state, step = self.state, self.steps.at(self.state.sequence)
        self.engine.loss_scale = state.loss_scale if self.recipe.precision == "float16" else 1.0
        while (gradients := self._tried(step)) is None:
            self._halve(step)
        targets, count, sums = gradients
        norm = self.engine.clip().item()
        overflowed = self._rescale(norm)
        sound = guard.is_sound(norm, state.norms, self.recipe.spike)
        if sound:
            self.engine.move(learning_rate(self.recipe, state.step))
            self._sums += sums
            state.tokens += targets
            state.loss_tokens += count
            state.norms, state.refused, state.went_back = guard.remembered(norm, state.norms), 0, False
        else:
            self.engine.forget()
            state.refused += not overflowed
        state.step += 1
        state.sequence += step.count
        state.loss_read += step.count * step.seq_len
        self._seq_len = step.seq_len
        if not sound and not overflowed:
            self._refuse(step, norm)

    def _tried(self, step: Step) -> tuple[int, int, Tensor] | None:
        """`_gradients`; None: they need more memory than there is."""
        try:
            return self._gradients(step)
        except torch.OutOfMemoryError:
            return None

    def _gradients(self, step: Step) -> tuple[int, int, Tensor]:
        """Makes a step's. Returns its targets, of what its loss is the mean, and this process' `totals`."""
        parts = self._parts(step)
        mine = [[int((part[1] != IGNORED).sum()), self.engine.plain.count(part)] for part in parts]
        targets, count = self.processes.sum(torch.tensor(mine).sum(0) * self.processes.leads).tolist()
        sums = torch.zeros_like(self._sums)
        for number, part in enumerate(parts, start=1):
            # A step may hold questions alone, of a conversation that was cut.
            sums += self.engine.accumulate(part, max(1, count), last=number == len(parts))
            self.processes.moved()
        return targets, count, sums

    def _halve(self, step: Step) -> None:
        """Lets half as many tokens through the model at once from here on.

        Raises:
            AndromedaError: there is one sequence at a time already, or other processes wait for this one.
        """
        self.engine.forget()
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()
        at_once = self._at_once(step)
        what = f"training: out of memory with {at_once} sequences of {step.seq_len:,} tokens at once"
        if at_once == 1 or self.processes.ranks > 1:
            raise AndromedaError(f"{what}; set checkpointing=full, or less in batch_size or in the length of sequences")
        self._most_tokens = at_once // 2 * step.seq_len
        self.outside.warn(f"{what}; going on with {at_once // 2}, which changes no step beyond rounding")

    def _at_once(self, step: Step) -> int:
        """Sequences of one forward pass."""
        if self._most_tokens is None:
            return step.at_once
        return max(1, min(step.at_once, self._most_tokens // step.seq_len))

    def _rescale(self, norm: float) -> bool:
        """Moves float16's loss scale. Returns whether that was why a gradient is no number."""
        if self.recipe.precision != "float16":
            return False
        finite, scale = math.isfinite(norm), LossScale(self.state.loss_scale, self.state.finite)
        after = scale.after(finite)
        self.state.loss_scale, self.state.finite = after.value, after.finite
        return not finite and scale.value > 1

    def _refuse(self, step: Step, norm: float) -> None:
        """Says which sequences were left out, and goes back to a checkpoint after too many in a row."""
        state, last = self.state, step.first + step.count - 1
        size = f"{norm:.3g}" if math.isfinite(norm) else "no number"
        self.outside.warn(f"step {state.step}: the gradient of {self._named(step)} is {size}, so they are left out")
        self.outside.log({
            "step": state.step, "left_out": [step.first, last], "gradient_norm": norm if math.isfinite(norm) else None,
        })  # fmt: skip
        if state.refused < guard.PATIENCE:
            return
        if state.went_back or not self.outside.go_back():
            raise self._diverged()
        self.outside.warn(f"step {state.step}: weights and optimizer are back where the last checkpoint has them")
        state.refused, state.went_back = 0, True

    def _named(self, step: Step) -> str:
        return f"sequences {step.first} to {step.first + step.count - 1}"

    def _parts(self, step: Step) -> list[Batch]:
        """This team's share of a step, in batches: as many in every team, so some may have no target."""
        teams = self.processes.teams
        share = step.share(self.processes.team_number, teams)
        parts: list[Batch] = []
        if share.count:
            parts = list(_split(self.outside.batches(share.first, share.count), self._at_once(step)))
        largest = -(-step.count // teams)
        missing = -(-largest // self._at_once(step)) - len(parts)
        return parts + [empty_batch(step.seq_len)] * missing

    def _told_to_stop(self) -> bool:
        return bool(self.processes.sum(torch.tensor(int(self.outside.stop()))))

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.recipe.num_steps

    def _line(self, start: float) -> dict[str, Any]:
        """Figures since the line before; waits for the device."""
        state, meter = self.state, self.meter
        losses, (read, flops) = self._losses(), self._read()
        seconds = state.loss_seconds + time.perf_counter() - start
        state.seconds += seconds
        self._sums.zero_()
        state.loss_tokens, state.loss_read, state.loss_seconds = 0, 0, 0.0
        return {
            "step": state.step,
            "tokens": state.tokens,
            **losses,
            "learning_rate": learning_rate(self.recipe, state.step - 1),
            "gradient_norm": state.norms[-1] if state.norms else None,
            "seconds": state.seconds,
            "tokens_per_second": read / seconds,
            "flops_per_second": flops / seconds,
            "possible_flops_per_second": meter.possible_flops_per_second,
            **peak_memory(self.processes.device),
        }

    def _losses(self) -> dict[str, float]:
        """The means of the loss and of the objective's figures since the line before."""
        plain = self.engine.plain
        loss, *figures = (total / max(1, self.state.loss_tokens) for total in self._checked_sums())
        bits = {"train_bits_per_byte": loss / math.log(2) / self.meter.bytes_per_token} if plain.is_text else {}
        return {"loss": loss, **dict(zip(plain.figures, figures, strict=True)), **bits}

    def _read(self) -> tuple[int, float]:
        """Tokens that went through the model since the line before, and the operations that they took."""
        read = self.state.loss_read
        return read, read * self.meter.flops_per_token(self._seq_len)

    def _validate(self) -> dict[str, float]:
        assert self.outside.validate is not None
        values = self.outside.validate()
        self._checked_sums(*values.values())
        return values

    def _save(self) -> None:
        self.state.loss_sum, *self.state.figure_sums = self._checked_sums()
        self.outside.save(self.state)

    def _checked_sums(self, *others: float) -> list[float]:
        """The sums of the loss and of the objective's figures, of all processes since the last line of metrics.

        Raises:
            DivergedError: one of them or of the others is no number.
        """
        sums: list[float] = self.processes.sum(self._sums.cpu()).tolist()
        if not all(map(math.isfinite, (*sums, *others))):
            raise self._diverged()
        return sums

    def _diverged(self) -> DivergedError:
        return DivergedError(
            f"training: at step {self.state.step} the loss or its gradient is no number any more, or far too large, so "
            "it stops and keeps the checkpoints it has; lower learning_rate, or raise warmup_steps"
        )


def empty_batch(seq_len: int) -> Batch:
    """A sequence with nothing to learn, for a process that has none left where others compute together."""
    return torch.zeros(1, seq_len, dtype=torch.int64), torch.full((1, seq_len), IGNORED), None


def in_turns(batches: Iterable[Batch], processes: Processes, seq_len: int) -> Iterator[Batch]:
    """This team's batches, of which all take turns: as many in every team, so one at the end may be empty."""
    number, teams = -1, processes.teams
    for number, batch in enumerate(batches):
        if number % teams == processes.team_number:
            yield batch
        if number % teams == teams - 1:
            processes.moved()
    if processes.team_number > number % teams:
        yield empty_batch(seq_len)


def _split(batch: Batch, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    ids, targets, documents = batch
    for first in range(0, len(ids), size):
        part = slice(first, first + size)
        yield ids[part], targets[part], None if documents is None else documents[part]
