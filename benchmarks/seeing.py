"""What it costs to watch a run: training with TensorBoard, looks at the heads and summaries, and without, in turns.

    python benchmarks/seeing.py --turns 3 recipes/verse.yaml steps=60 validate_every=20

Both write metrics.jsonl and validate. Seconds are this process' own processor time, which other work on the machine
disturbs less than the clock. Below stands what each part of watching took, each time it was done.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any
from unittest.mock import patch

from andromeda.commands.session import Session
from andromeda.commands.train import train
from andromeda.training.records import Records

PARTS: dict[str, tuple[type, str]] = {
    "a look at the heads": (Session, "_watch"),
    "a line of metrics": (Records, "metrics"),
    "a line on the heads": (Records, "heads"),
    "a summary with pictures": (Session, "_look_back"),
}


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        begin = time.process_time()
        try:
            return function(*args)
        finally:
            seconds.append(time.process_time() - begin)

    return run


def tokens_per_second(recipe: str, overrides: list[str], parts: dict[str, list[float]] | None) -> float:
    """Of one run, from its first step to its end.

    Args:
        parts: takes the seconds of each part of watching; None: nothing is watched.
    """
    whole: list[float] = []
    tokens: list[int] = []
    run = timed(Session.run, whole)

    def of_session(session: Session, stop: Callable[[], bool]) -> None:
        run(session, stop)
        tokens.append(session.state.tokens)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(patch.object(Session, "run", of_session))
        keys = [*overrides, f"output={folder}/run"]
        if parts is None:
            stack.enter_context(patch.object(Session, "_watch", lambda *_: None))
            stack.enter_context(patch.object(Session, "_look_back", lambda *_: True))
        else:
            keys.append("track=[tensorboard]")
            for name, (owner, method) in PARTS.items():
                stack.enter_context(patch.object(owner, method, timed(getattr(owner, method), parts[name])))
        train(recipe, keys)
    return tokens[0] / whole[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    parts: dict[str, list[float]] = {name: [] for name in PARTS}
    tokens_per_second(args.recipe, [*args.overrides, "steps=2"], {name: [] for name in PARTS})  # imports and caches
    speeds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(args.turns):
        for watched in (False, True) if turn % 2 else (True, False):
            speeds[watched].append(tokens_per_second(args.recipe, args.overrides, parts if watched else None))
    print("\n| | tokens per second, median (lowest to highest) |\n|---|---:|")
    for watched, name in ((False, "metrics.jsonl alone"), (True, "all")):
        found = speeds[watched]
        print(f"| {name} | {median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f}) |")
    print("\n| | times a run | ms, median |\n|---|---:|---:|")
    for name, seconds in parts.items():
        print(f"| {name} | {len(seconds) / args.turns:.0f} | {1000 * median(seconds):,.1f} |")


if __name__ == "__main__":
    main()
