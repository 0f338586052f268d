"""What a run on pairs is measured against: the log-probabilities of the model that it began with."""

from __future__ import annotations

from andromeda.commands.output import plural, say
from andromeda.commands.start import Start
from andromeda.data.pairs import PairSequences
from andromeda.errors import AndromedaError
from andromeda.training.engines import Engine
from andromeda.training.loop import in_turns
from andromeda.training.preference import FILE, Preferences, reference_log_probabilities
from andromeda.training.state import FOLDER


def set_reference(engine: Engine, pairs: PairSequences, start: Start, batch_size: int) -> None:
    """Gives the objective those that the checkpoint has; before the first step, those of the model as it is."""
    objective, processes = engine.plain, engine.processes
    assert isinstance(objective, Preferences)
    if start.reference is not None:
        objective.reference = start.reference
        return
    if start.state.step:
        raise AndromedaError(
            f"{engine.recipe.output}: its checkpoint has no {FOLDER}/{FILE} any more; copy the whole directory again"
        )
    say(f"reference: log-probabilities of {plural(pairs.num_pairs, 'pair')}, by the model as it is")
    batches = in_turns(pairs.in_order(batch_size), processes, 2 * pairs.seq_len)
    with engine.evaluating():
        mine = reference_log_probabilities(engine.objective, batches, pairs.num_pairs)
    objective.reference = processes.sum(mine)
