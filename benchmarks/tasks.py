"""Three tasks together and each alone: the language model, the name of a tool, and the number of steps of a solution.

* text: the next token of GSM8K's questions with their solutions and of MetaTool's queries; bits per byte;
* tool: which of the 20 most frequent tools a query of MetaTool's asks for; accuracy;
* steps: how many calculator steps GSM8K's solution of a question has (1 to 8), told from the question alone; the share
  of the variance that is explained (R^2).

A step reads 768 tokens of each task that is part of it, or of all three together 256 tokens of each; all runs have as
many steps, the same model, tokenizer and weights to begin with. `alone` so has the tokens that the three have
together; `alone, a third` has as many of its own as it has in the run together. All are run at two learning rates.

    python benchmarks/tasks.py DATA --seeds 0 1 2 --json tasks.json --picture tasks.png    # 54 runs: an hour of a core

What the JSON file holds of other seeds and rates stays, and is in the table too.

DATA holds quant/gsm8k.jsonl.xz and tools/metatool_selection.jsonl.xz, as their owners have them, a JSON object a line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, pvariance
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from andromeda.benchmarks.measure import headline, machine
from andromeda.commands.train import train
from andromeda.training.metrics import read_metrics

TOOLS = 20
SEQ_LEN = 128
TOKENS = 768  # of a step
VALIDATION = 10  # of each hundred records
MOST = 500  # examples that are validated, and
MOST_TEXTS = 150  # texts
STEPS_OF = range(1, 9)
NAMES = ("text", "tool", "steps")


@dataclass(frozen=True)
class Run:
    """Which tasks learn together, on how large a share of a step's tokens each."""

    name: str
    tasks: tuple[str, ...]
    share: int
    balance: str = "fixed"


ALONE = [Run(f"{name} alone", (name,), 1) for name in NAMES]
RUNS = [
    *ALONE,
    *(Run(f"{name} alone, a third", (name,), 3) for name in NAMES),
    *(Run(f"together, {balance}", NAMES, 3, balance) for balance in ("fixed", "uncertainty", "famo")),
]


@dataclass(frozen=True)
class Result:
    run: str
    learning_rate: float
    seed: int
    scores: dict[str, float]  # by task: bits per byte, accuracy, R^2
    weights: dict[str, float]  # by task, at the end


# ---- data ----------------------------------------------------------------------------------------


def records(path: Path) -> list[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def held_out(text: str) -> bool:
    """The same on every machine; equal texts are on one side."""
    digest = hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=4).digest()
    return int.from_bytes(digest) % 100 < VALIDATION


def write(data: Path, folder: Path) -> dict[str, float]:
    """The files of examples. Returns what guessing alone comes to, and the variance of the number of steps."""
    solved = records(data / "quant" / "gsm8k.jsonl.xz")
    asked = [row for row in records(data / "tools" / "metatool_selection.jsonl.xz") if len(row.get("tools", ())) == 1]
    asked = list({" ".join(row["query"].lower().split()): row for row in asked}.values())
    common = [tool for tool, _ in Counter(row["tools"][0] for row in asked).most_common(TOOLS)]
    parts: dict[str, list[dict[str, Any]]] = {
        "tool": [{"query": r["query"], "tool": r["tools"][0]} for r in asked if r["tools"][0] in common],
        "steps": [
            {"query": row["question"], "steps": row["answer"].count("<<")}
            for row in solved
            if row["answer"].count("<<") in STEPS_OF
        ],
        "text": [
            *({"query": row["question"], "text": f"{row['question']}\n{row['answer']}"} for row in solved),
            *({"query": row["query"], "text": row["query"]} for row in asked),
        ],
    }
    validated = {}
    for name, rows in parts.items():
        rows.sort(key=lambda row: hashlib.blake2b(row["query"].encode(), digest_size=8).digest())
        validated[name] = [row for row in rows if held_out(row["query"])][: MOST_TEXTS if name == "text" else MOST]
        lines(folder / f"{name}.jsonl", (row for row in rows if not held_out(row["query"])))
        lines(folder / f"{name}-validation.jsonl", validated[name])
    told = Counter(row["tool"] for row in validated["tool"])
    return {
        "most frequent tool": max(told.values()) / sum(told.values()),
        "variance of steps": pvariance([row["steps"] for row in validated["steps"]]),
        "tool examples": len(parts["tool"]),
        "steps examples": len(parts["steps"]),
        "validated tool examples": len(validated["tool"]),
        "validated steps examples": len(validated["steps"]),
    }


def lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


# ---- runs ----------------------------------------------------------------------------------------


def recipe(run: Run, folder: Path, rate: float, seed: int, steps: int, tokens: dict[str, float]) -> dict[str, Any]:
    """
    Args:
        tokens: of an input of each task.
    """
    tasks: dict[str, Any] = {}
    for name in run.tasks:
        files = {"train": str(folder / f"{name}.jsonl"), "validation": str(folder / f"{name}-validation.jsonl")}
        kind = {"tool": "classification", "steps": "regression"}.get(name)
        batch_size = round(TOKENS / run.share / tokens[name])
        example = {"kind": kind, **files, "input": "query", "target": name, "batch_size": batch_size}
        tasks[name] = {"kind": "language_model"} if name == "text" else example
    data = {"train": str(folder / "text.jsonl"), "validation": str(folder / "text-validation.jsonl")}
    return {
        "model": {"preset": "nano", "max_seq_len": SEQ_LEN},
        "data": data if "text" in run.tasks else {},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "tasks": tasks,
        "balance": run.balance,
        "output": str(folder / f"{run.name}-{rate}-{seed}"),
        "steps": steps,
        "batch_size": round(TOKENS / run.share / SEQ_LEN),
        "learning_rate": rate,
        "warmup_steps": steps // 6,  # this and the rest as in recipes/verse.yaml
        "schedule": "wsd",
        "decay_fraction": 0.5,
        "final_ratio": 0.0,
        "seed": seed,
        "log_every": 20,
        "validate_every": steps,
        "save_every": steps,
    }


def measured(
    run: Run, folder: Path, rate: float, seed: int, steps: int, tokens: dict[str, float], variance: float
) -> Result:
    keys = recipe(run, folder, rate, seed, steps, tokens)
    plan = Path(f"{keys['output']}.yaml")
    plan.write_text(yaml.safe_dump(keys))
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        train(str(plan), [])
    last = read_metrics(Path(keys["output"]) / "metrics.jsonl")[-1]
    scores = {}
    if "text" in run.tasks:
        scores["text"] = last["validation_bits_per_byte"]
    if "tool" in run.tasks:
        scores["tool"] = last["tool/validation_accuracy"]
    if "steps" in run.tasks:
        scores["steps"] = 1 - last["steps/validation_error"] ** 2 / variance
    return Result(run.name, rate, seed, scores, {name: last[f"{name}/weight"] for name in run.tasks})


def prepare(folder: Path) -> dict[str, float]:
    """Trains the tokenizer, and counts the tokens of an input of each task."""
    from andromeda.config import preset
    from andromeda.data.text import read_documents
    from andromeda.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(read_documents([folder / "text.jsonl"]), preset("nano").num_tokens)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    counted = {"text": float(SEQ_LEN)}
    for name in ("tool", "steps"):
        queries = [json.loads(line)["query"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        counted[name] = mean(1 + len(ids) for ids in tokenizer.encode_batch(queries))
    return counted


# ---- tables --------------------------------------------------------------------------------------


def table(found: list[Result]) -> str:
    rows = ["| | learning rate | text, bits a byte | tool, accuracy | steps, R² |", "|---|---:|---:|---:|---:|"]
    for run in RUNS:
        for rate in sorted({x.learning_rate for x in found if x.run == run.name}):
            same = [x for x in found if (x.run, x.learning_rate) == (run.name, rate)]
            cells = [spread([x.scores[name] for x in same if name in x.scores]) for name in NAMES]
            rows.append(f"| {run.name} | {rate:.0e} | {' | '.join(cells)} |")
    return "\n".join(rows)


def spread(scores: list[float]) -> str:
    """The mean, and of several seeds the lowest and the highest."""
    ends = f" ({min(scores):.3f} to {max(scores):.3f})" if len(scores) > 1 else ""
    return f"{mean(scores):.3f}{ends}" if scores else "-"


def draw(found: list[Result], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"text": "text: bits a byte (less is better)", "tool": "tool: accuracy", "steps": "steps: R²"}
    rates = sorted({x.learning_rate for x in found})
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        shown = [run for run in reversed(RUNS) if name in run.tasks]
        for rate, marker in zip(rates, "osD^v"[: len(rates)], strict=True):
            points = [
                (x.scores[name], place)
                for place, run in enumerate(shown)
                for x in found
                if (x.run, x.learning_rate) == (run.name, rate)
            ]
            axes.plot(*zip(*points, strict=True), marker, label=f"learning rate {rate:g}", alpha=0.8)
        axes.set_yticks(range(len(shown)), [run.name.removeprefix(f"{name} ") for run in shown])
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(rates), fontsize="small")
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of the two files")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 4e-3], help="learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--picture", type=Path, help="draw them here")
    args = parser.parse_args()
    facts: dict[str, Any] = machine() | {"command": "python benchmarks/tasks.py DATA", "steps": args.steps}
    print(f"{headline(facts)}\n")
    before = json.loads(args.json.read_text())["runs"] if args.json is not None and args.json.exists() else []
    found = [Result(**row) for row in before]
    with TemporaryDirectory() as name:
        folder = Path(name)
        facts |= write(args.data, folder)
        tokens = prepare(folder)
        facts["tokens of an input"] = tokens
        with ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            tried = [
                pool.submit(measured, run, folder, rate, seed, args.steps, tokens, facts["variance of steps"])
                for seed in args.seeds
                for rate in args.rates
                for run in RUNS
            ]
            for future in as_completed(tried):
                found.append(future.result())
                print(found[-1], flush=True)
                if args.json is not None:
                    report = {"machine": facts, "runs": [asdict(result) for result in found]}
                    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{table(found)}")
    if args.picture is not None:
        draw(found, args.picture)


if __name__ == "__main__":
    main()
