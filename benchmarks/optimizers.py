"""The optimizers of a recipe beside each other: loss, bytes of state a parameter, seconds a step.

recipes/verse.yaml's model and data, on sequences of 128 tokens and for 500 steps; the same weights, sequences and order
for all. AdamW with moments in 8 bits has AdamW's learning rate; Muon and AdamW have the best of their own sweep. If
bitsandbytes is installed, its AdamW8bit is there too, for comparison with torchao's, which a recipe takes.

    python benchmarks/optimizers.py --json results.json        # about 25 minutes on one core
    python benchmarks/optimizers.py --no-training              # bytes and seconds alone; 2 minutes
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.benchmarks.measure import headline, machine, version
from andromeda.config import preset
from andromeda.data.text import Corpus, load_corpus, read_documents
from andromeda.data.windows import TokenWindows, validation_batches
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer
from andromeda.training.adamw8bit import to_plain
from andromeda.training.objective import NextToken, bits_per_byte, total_nats
from andromeda.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from andromeda.training.recipe import Recipe, read_recipe

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
BITSANDBYTES = "adamw8bit of bitsandbytes"
NAMES = ("adamw", "adamw8bit", "muon", *([BITSANDBYTES] if find_spec("bitsandbytes") else []))
RATES = {"adamw": (2e-3, 4e-3, 8e-3), "muon": (2e-3, 4e-3, 8e-3)}
LAST = 50  # steps that the training loss is a mean of


@dataclass(frozen=True)
class Held:
    """The state after a step."""

    name: str
    model: str
    parameters: int
    bytes_per_parameter: float
    in_8_bits: dict[str, float]  # share of the parameters: of all, and of the embedding


@dataclass(frozen=True)
class Speed:
    name: str
    optimizer_ms: float  # of its step alone, median
    step_ms: float  # forward, backward and optimizer


@dataclass(frozen=True)
class Trained:
    name: str
    learning_rate: float
    seed: int
    training_loss: float  # nats a token, mean of the last LAST steps
    validation_bits_per_byte: float


@dataclass(frozen=True)
class Data:
    recipe: Recipe
    tokenizer: Tokenizer
    train: Corpus
    validation: Corpus

    def windows(self, seed: int) -> TokenWindows:
        return TokenWindows(self.train.tokens, self.length, seed=seed, end_of_text=self.tokenizer.eos_id)

    @property
    def length(self) -> int:
        assert self.recipe.seq_len is not None
        return self.recipe.seq_len

    def model(self, seed: int) -> Andromeda:
        torch.manual_seed(seed)
        return Andromeda(self.recipe.config(self.tokenizer.vocab_size))


def load(folder: Path) -> Data:
    files = [f"data.train={ROOT}/examples/verse/train.jsonl", f"data.validation={ROOT}/examples/verse/validation.txt"]
    recipe = read_recipe(ROOT / "recipes" / "verse.yaml", [*files, "steps=500", "seq_len=128"])
    paths = recipe.data.train_paths
    tokenizer = Tokenizer.train(read_documents(paths), recipe.config().num_tokens)
    train = load_corpus(paths, tokenizer, folder / "train")
    return Data(recipe, tokenizer, train, load_corpus(recipe.data.validation_paths, tokenizer, folder / "validation"))


def build(name: str, model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if name != BITSANDBYTES:
        return build_optimizer(model, replace(recipe, optimizer=name))  # type: ignore[arg-type]
    from bitsandbytes.optim import AdamW8bit

    groups = build_optimizer(model, replace(recipe, optimizer="adamw")).param_groups
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
    built: torch.optim.Optimizer = AdamW8bit(groups, lr=recipe.learning_rate, betas=recipe.betas)
    return built


# ---- bytes ---------------------------------------------------------------------------------------


def held(name: str, size: str, recipe: Recipe) -> Held:
    """What an optimizer holds after a step on random gradients."""
    torch.manual_seed(0)
    model = Andromeda(preset(size))
    optimizer = build(name, model, recipe)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer.step()
    total = sum(parameter.numel() for parameter in model.parameters())
    tensors = {tensor.data_ptr(): tensor for p in model.parameters() for tensor in state_of(optimizer, p)}
    eight = {
        parameter
        for parameter in model.parameters()
        if any(t.dtype == torch.uint8 for t in state_of(optimizer, parameter))
    }
    share = sum(parameter.numel() for parameter in eight) / total
    embedding = float(any(parameter in eight for parameter in model.embedding.parameters()))
    bytes_held = sum(tensor.nbytes for tensor in tensors.values())
    return Held(name, size, total, bytes_held / total, {"all": share, "embedding": embedding})


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Iterator[Tensor]:
    for key, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor):  # bitsandbytes counts steps in a Python number
            yield from to_plain(key, value).values()


# ---- seconds -------------------------------------------------------------------------------------


def speeds(data: Data, rounds: int = 15) -> list[Speed]:
    """All optimizers in turn, so that what else the machine does meets all of them."""
    runs = {name: _steps(name, data) for name in NAMES}
    timed: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name, step in runs.items():
            timed[name].append(step())
    found = []
    for name, pairs in timed.items():
        alone, whole = zip(*pairs[2:], strict=True)  # the first make the state
        found.append(Speed(name, 1e3 * median(alone), 1e3 * median(whole)))
    return found


def _steps(name: str, data: Data) -> Callable[[], tuple[float, float]]:
    """A training step -> seconds of the optimizer alone, and of all."""
    model = data.model(0)
    optimizer, objective, windows = build(name, model, data.recipe), NextToken(model, CPU), data.windows(0)

    def step() -> tuple[float, float]:
        began = perf_counter()
        objective(windows.batch(0, data.recipe.batch_size)).mean().backward()
        middle = perf_counter()
        optimizer.step()
        ended = perf_counter()
        optimizer.zero_grad()
        return ended - middle, ended - began

    return step


# ---- loss ----------------------------------------------------------------------------------------


def train(name: str, rate: float, seed: int, data: Data) -> Trained:
    recipe = replace(data.recipe, learning_rate=rate, seed=seed)
    model = data.model(seed)
    optimizer, objective, windows = build(name, model, recipe), NextToken(model, CPU), data.windows(seed)
    losses = []
    for step in range(recipe.num_steps):
        loss = objective(windows.batch(step * recipe.batch_size, recipe.batch_size)).mean()
        loss.backward()
        assert recipe.clip_norm is not None
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        set_learning_rate(optimizer, learning_rate(recipe, step))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    validation = validation_batches(data.validation.tokens, data.length, 16, end_of_text=data.tokenizer.eos_id)
    bits = bits_per_byte(total_nats(objective, validation).item(), data.validation.num_bytes)
    return Trained(name, rate, seed, sum(losses[-LAST:]) / LAST, bits)


def train_all(data: Data, jobs: int, save: Callable[[list[Trained]], None]) -> list[Trained]:
    """All of `runs`, so many at a time, in processes of one thread."""
    trained = []
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for future in as_completed([pool.submit(train, *run, data) for run in runs(data.recipe)]):
            trained.append(future.result())
            print(f"  {trained[-1]}", flush=True)
            save(trained)
    return trained


def runs(recipe: Recipe) -> list[tuple[str, float, int]]:
    """Name, learning rate and seed: all at the recipe's rate, then the sweep, then AdamW's pair with another seed."""
    rate = recipe.learning_rate
    same = [(name, rate, 0) for name in NAMES]
    swept = [(name, each, 0) for name, rates in RATES.items() for each in rates if each != rate]
    return [*same, *swept, *[(name, rate, 1) for name in ("adamw", "adamw8bit")]]


# ---- tables --------------------------------------------------------------------------------------


def bytes_table(found: list[Held]) -> str:
    lines = ["| | model | parameters | bytes a parameter | in 8 bits | embedding |", "|---|---|---:|---:|---:|---|"]
    for row in found:
        embedding = "8 bits" if row.in_8_bits["embedding"] else "32 bits"
        lines.append(
            f"| {row.name} | {row.model} | {row.parameters:,} | {row.bytes_per_parameter:.3f} | "
            f"{row.in_8_bits['all']:.2%} | {embedding} |"
        )
    return "\n".join(lines)


def speed_table(found: list[Speed]) -> str:
    base = found[0]
    lines = ["| | optimizer, ms | whole step, ms | whole step / adamw's |", "|---|---:|---:|---:|"]
    for row in found:
        ratio = row.step_ms / base.step_ms
        lines.append(f"| {row.name} | {row.optimizer_ms:.1f} | {row.step_ms:.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def loss_table(found: list[Trained]) -> str:
    """Differences are from AdamW with the same learning rate and seed."""
    lines = [
        "| | learning rate | seed | training loss | / adamw's | validation, bits a byte | / adamw's |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = {(row.learning_rate, row.seed): row for row in found if row.name == "adamw"}
    for row in sorted(found, key=lambda row: (NAMES.index(row.name), row.seed, row.learning_rate)):
        twin = base.get((row.learning_rate, row.seed))
        losses = "-" if twin is None else f"{row.training_loss / twin.training_loss - 1:+.2%}"
        bits = "-" if twin is None else f"{row.validation_bits_per_byte / twin.validation_bits_per_byte - 1:+.2%}"
        lines.append(
            f"| {row.name} | {row.learning_rate:.0e} | {row.seed} | {row.training_loss:.4f} | {losses} | "
            f"{row.validation_bits_per_byte:.4f} | {bits} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--no-training", action="store_true", help="seconds and bytes alone")
    parts.add_argument("--training-alone", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="training runs at a time, of one thread each")
    parser.add_argument("--large", default="150m", help="a preset whose state is measured beside nano's")
    parser.add_argument("--json", type=Path, help="write what is measured here, as it is")
    args = parser.parse_args()
    facts = machine() | {name: version(name) for name in ("torchao", "bitsandbytes")}
    facts["command"] = shlex.join(["python", "benchmarks/optimizers.py", *sys.argv[1:]])
    print(f"{headline(facts)}, torchao {facts['torchao']}, bitsandbytes {facts['bitsandbytes']}\n")
    trained: list[Trained] = []
    with TemporaryDirectory() as folder:
        data = load(Path(folder))
        if not args.training_alone:
            timed = speeds(data)
            print(speed_table(timed), "\n", flush=True)
            states = [held(name, size, data.recipe) for size in ("nano", args.large) for name in NAMES]
            print(bytes_table(states), flush=True)
            save(args.json, {"machine": facts, "speed": timed, "state": states})
        if not args.no_training:
            trained = train_all(data, args.jobs, lambda done: save(args.json, {"machine of loss": facts, "loss": done}))
    if trained:
        print(f"\n{loss_table(trained)}")


def save(path: Path | None, report: dict[str, Any]) -> None:
    """What the file holds beside it stays."""
    if path is not None:
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | report, indent=1, default=asdict) + "\n")


if __name__ == "__main__":
    main()
