"""What it costs to watch a run: training with TensorBoard, looks at the heads and summaries, and without, in turns.

    python benchmarks/seeing.py --turns 4 recipes/verse.yaml steps=100 validate_every=50

Both write metrics.jsonl and validate. The figures are tokens per second of this process' own processor time, which
other work on the machine disturbs less than the clock's; the clock's stand beside them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from statistics import median
from unittest.mock import patch

from andromeda.commands.session import Session
from andromeda.commands.train import train

Figures = tuple[float, float]  # tokens per second of processor time, and of the clock


def measure(recipe: str, overrides: list[str], watched: bool) -> Figures:
    """Of one run, from its first step to its end."""
    found: list[Figures] = []
    original = Session.run

    def timed(session: Session, stop: object) -> None:
        clock, processor = time.perf_counter(), time.process_time()
        original(session, stop)  # type: ignore[arg-type]
        spent = time.process_time() - processor, time.perf_counter() - clock
        found.append((session.state.tokens / spent[0], session.state.tokens / spent[1]))

    with tempfile.TemporaryDirectory() as folder, patch.object(Session, "run", timed):
        keys = [*overrides, f"output={folder}/run"]
        if watched:
            train(recipe, [*keys, "track=[tensorboard]"])
        else:
            with patch.object(Session, "_watch", lambda *_: None), patch.object(Session, "_look_back", lambda *_: True):
                train(recipe, keys)
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--turns", type=int, default=4)
    args = parser.parse_args()
    measure(args.recipe, [*args.overrides, "steps=2"], watched=True)  # imports and caches
    rows: dict[bool, list[Figures]] = {True: [], False: []}
    for turn in range(args.turns):
        for watched in (False, True) if turn % 2 else (True, False):
            rows[watched].append(measure(args.recipe, args.overrides, watched))
    print("\n| | tokens per second of the processor, median (lowest to highest) | of the clock |\n|---|---:|---:|")
    for watched, name in ((False, "metrics.jsonl alone"), (True, "all")):
        processor, clock = ([row[index] for row in rows[watched]] for index in (0, 1))
        ends = f"{min(processor):,.0f} to {max(processor):,.0f}"
        print(f"| {name} | {median(processor):,.0f} ({ends}) | {median(clock):,.0f} |")


if __name__ == "__main__":
    main()
