"""What a run on pairs is measured against: the log-probabilities of the model that it began with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from andromeda.commands.output import plural, say
from andromeda.commands.start import Start
from andromeda.data.pairs import PairSequences
from andromeda.errors import AndromedaError
from andromeda.training.engines import Engine
from andromeda.training.loop import in_turns
from andromeda.training.preference import (
    FILE,
    Preferences,
    Reference,
    held_out_figures,
    reference_log_probabilities,
)
from andromeda.training.state import FOLDER


@dataclass(frozen=True)
class Compared:
    """The pairs of a run, and what the model that it began with makes of them.

    Attributes:
        held_out: None: none are.
    """

    reference: Reference
    held_out: PairSequences | None

    @property
    def described(self) -> list[str]:
        """What is validated, in words."""
        return [] if self.held_out is None else [plural(len(self.held_out.fitting), "pair")]

    def validate(self, engine: Engine) -> dict[str, float]:
        """Figures of the pairs that are held out, for a line of metrics."""
        if self.held_out is None:
            return {}
        assert isinstance(engine.plain, Preferences) and self.reference.held_out is not None
        learned = _log_probabilities(engine, self.held_out)
        fitting = self.held_out.fitting
        return held_out_figures(engine.plain.loss, learned[fitting], self.reference.held_out[fitting])


def compare(engine: Engine, pairs: PairSequences, held_out: PairSequences | None, start: Start) -> Compared:
    """Gives the objective the reference that the checkpoint has; before the first step, that of the model as it is.

    Raises:
        AndromedaError: the checkpoint has none any more, or of other pairs that are held out.
    """
    recipe, reference = engine.recipe, start.reference
    key = "" if held_out is None else held_out.store.facts["key"]
    if reference is None:
        if start.state.step:
            raise AndromedaError(
                f"{recipe.output}: its checkpoint has no {FOLDER}/{FILE} any more; copy the whole directory again"
            )
        count = pairs.num_pairs + (0 if held_out is None else held_out.num_pairs)
        say(f"reference: log-probabilities of {plural(count, 'pair')}, by the model as it is")
        of_held_out = None if held_out is None else _log_probabilities(engine, held_out)
        reference = Reference(_log_probabilities(engine, pairs), of_held_out, key)
    if reference.held_out_key != key:
        raise AndromedaError(
            f"{recipe.output}: the pairs of data.validation={recipe.data.validation!r} are not what this run began "
            "with, and what it is measured against belongs to those; put them back, or choose another output"
        )
    assert isinstance(engine.plain, Preferences)
    engine.plain.reference = reference.trained_on
    return Compared(reference, held_out)


def _log_probabilities(engine: Engine, pairs: PairSequences) -> Tensor:
    """(pairs, 2), by the model as it is; processes take turns."""
    batches = in_turns(pairs.in_order(engine.recipe.batch_size), engine.processes, 2 * pairs.seq_len)
    with engine.evaluating():
        mine = reference_log_probabilities(engine.objective, batches, pairs.num_pairs)
    return engine.processes.sum(mine)
