"""Writes pairs: a call that fits a request beside an answer that does not, made up by the task `tool_calls`.

python examples/preferences/build.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from andromeda.data.synthetic import Chat, Split, make_task, sample

FILES: dict[str, tuple[Split, int]] = {"train.jsonl": ("train", 240), "held-out.jsonl": ("test", 40)}  # and how many
SEED = 1  # recipes/data/sft.yaml has the samples of seed 0
LONGEST = 2000  # characters, so that either answer fits into 1,024 tokens of a small vocabulary
REFUSAL = "None of the functions that I have can do that."


def pairs(split: Split) -> Iterator[dict[str, Any]]:
    task = make_task("tool_calls", tools=[1, 2], cases=["one", "none"])
    for number in count():
        drawn = sample(task, split, SEED, number).body
        assert isinstance(drawn, Chat)
        *prompt, chosen = drawn.messages
        rejected = spoilt(chosen, drawn.tools, random.Random(number))
        pair = {"tools": drawn.tools, "prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
        if len(json.dumps(pair)) <= LONGEST:
            yield pair


def spoilt(answer: Any, tools: Any, chance: random.Random) -> dict[str, Any]:
    """A call where none fits; else a refusal, or the call without one of its arguments or with a wrong one."""
    if not answer.get("tool_calls"):
        return call(chance.choice(tools)["function"]["name"], {})
    function = answer["tool_calls"][0]["function"]
    arguments = dict(function["arguments"])
    way = chance.choice(("refuse", "leave out", "mistake"))
    if way == "refuse" or not arguments:
        return {"role": "assistant", "content": REFUSAL}
    name = chance.choice(list(arguments))
    if way == "leave out":
        del arguments[name]
    else:
        arguments[name] = mistaken(arguments[name])
    return call(function["name"], arguments)


def mistaken(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return value[1:]
    return f"{value}s"


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    called = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [called]}


if __name__ == "__main__":
    for name, (split, number) in FILES.items():
        lines = "".join(json.dumps(pair) + "\n" for pair in islice(pairs(split), number))
        Path(__file__).with_name(name).write_text(lines, encoding="utf-8")
