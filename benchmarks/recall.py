"""Key-value recall in noise: trained at 512 tokens, asked at up to 131,072.

A sequence is noise with PAIRS (key, value) pairs at random places; it ends with every key once more, each to be
answered by its value. Accuracy is the share of right answers. The default model is compared with rotary positions on
all heads (the letter of the specification), with the default less its log-n temperature, and with a Llama-like one.

    python benchmarks/recall.py                       # the plot and the table; a GPU when there is one
    python benchmarks/recall.py --lengths 512,4096    # as far as the machine allows
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.cache import Cache
from andromeda.config import AndromedaConfig
from andromeda.model import Andromeda

RESULTS = Path(__file__).parent / "results"
TRAINED = 512  # tokens
SHORTEST = 64  # tokens that training begins with
PAIRS = 8
KEYS, VALUES, NOISE = 64, 64, 128  # vocabulary of each kind, in this order
BATCH = 32
WARMUP = 100
CHUNK = 32768  # tokens read at once when asked

BASE: dict[str, Any] = dict(
    num_tokens=KEYS + VALUES + NOISE, max_seq_len=TRAINED, dim=128, depth=2, dim_head=32, heads=4, alibi_num_heads=2
)
LLAMA_LIKE: dict[str, Any] = dict(
    alibi_pos_bias=False, rotary_heads="all", rotary_xpos=False, shift_tokens=0, log_n_temperature=False, qk_norm=False,
    attn_qk_norm=False, attn_qk_norm_dim_scale=False, deepnorm=False, parallel_blocks=False, ff_activation="silu",
)  # fmt: skip
CONTENDERS: dict[str, tuple[dict[str, Any], float]] = {  # what differs, and the learning rate
    "default": ({}, 2e-3),
    "default without log-n": ({"log_n_temperature": False}, 2e-3),
    "rotary and xPos on all heads": ({"rotary_heads": "all"}, 2e-3),
    "Llama-like": (LLAMA_LIKE, 1e-3),
}


@dataclass(frozen=True)
class Result:
    name: str
    seed: int
    training_seconds: float
    accuracy: dict[int, float]  # by length in tokens
    answers: dict[int, int]  # how many were asked


def sequences(count: int, length: int, generator: torch.Generator) -> Tensor:
    """(count, length) ids: noise with pairs in it, then key, value, key, value ... in another order."""
    tail = 2 * PAIRS
    ids = torch.randint(KEYS + VALUES, KEYS + VALUES + NOISE, (count, length), generator=generator)
    for row in ids:
        keys = torch.randperm(KEYS, generator=generator)[:PAIRS]
        values = KEYS + torch.randint(VALUES, (PAIRS,), generator=generator)
        # a pair takes two places, so draw among the even ones
        places = 2 * torch.randperm((length - tail) // 2, generator=generator)[:PAIRS]
        row[places], row[places + 1] = keys, values
        order = torch.randperm(PAIRS, generator=generator)
        row[length - tail :: 2], row[length - tail + 1 :: 2] = keys[order], values[order]
    return ids


def training_length(progress: float) -> int:
    """Tokens a sequence: SHORTEST for a third of the steps, TRAINED for the last third, growing evenly between."""
    growth = min(max(3 * progress - 1, 0.0), 1.0)
    return SHORTEST + 16 * int((TRAINED - SHORTEST) // 16 * growth)


def train(model: Andromeda, steps: int, rate: float, seed: int, device: torch.device, label: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        scale = min(1.0, (step + 1) / WARMUP) * min(1.0, 2 * (1 - step / steps) + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        length = training_length(step / steps)
        ids = sequences(BATCH, length, generator).to(device)
        hidden = model.hidden(ids[:, :-1])[:, -2 * PAIRS + 1 :: 2]  # at the keys asked
        loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), ids[:, -2 * PAIRS + 1 :: 2].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, steps // 10) == 0:
            print(f"  {label}: step {step + 1:5}  loss {loss.item():.4f}", flush=True)


@torch.inference_mode()
def accuracy(model: Andromeda, length: int, answers: int, device: torch.device) -> float:
    """Share of right answers at `length`, over at least `answers` of them."""
    model.eval()
    generator = torch.Generator().manual_seed(length)
    right = asked = 0
    while asked < answers:
        count = max(1, min(-(-(answers - asked) // PAIRS), 16384 // length))
        ids = sequences(count, length, generator).to(device)
        cache = Cache()
        for chunk in ids[:, : -2 * PAIRS].split(CHUNK, dim=1):
            model.hidden(chunk, cache=cache)
        hidden = model.hidden(ids[:, -2 * PAIRS : -1], cache=cache)[:, ::2]
        right += int((model.logits(hidden).argmax(-1) == ids[:, -2 * PAIRS + 1 :: 2]).sum())
        asked += count * PAIRS
    model.train()
    return right / asked


@dataclass(frozen=True)
class Job:
    name: str
    seed: int
    steps: int
    lengths: tuple[int, ...]
    device: str

    def answers(self, length: int) -> int:
        """How many to ask for: fewer where they take long."""
        most, tokens = (1024, 2**20) if self.device.startswith("cuda") else (256, 2**18)
        return max(2 * PAIRS, min(most, PAIRS * (tokens // length)))


def run(job: Job) -> Result:
    overrides, rate = CONTENDERS[job.name]
    device, label = torch.device(job.device), f"{job.name}, seed {job.seed}"
    torch.manual_seed(job.seed)
    model = Andromeda(AndromedaConfig(**(BASE | overrides))).to(device)
    began = time.perf_counter()
    train(model, job.steps, rate, job.seed, device, label)
    result = Result(job.name, job.seed, time.perf_counter() - began, {}, {})
    for length in job.lengths:
        began = time.perf_counter()
        result.answers[length] = job.answers(length)
        result.accuracy[length] = accuracy(model, length, job.answers(length), device)
        took = time.perf_counter() - began
        print(f"  {label}: {length:,} tokens: {result.accuracy[length]:.3f}  ({took:.1f} s)", flush=True)
    return result


def table(results: list[Result], lengths: tuple[int, ...]) -> str:
    lines = [f"| accuracy at | {' | '.join(f'{n:,}' for n in lengths)} |", "|---|" + "---:|" * len(lengths)]
    lines += [f"| {r.name}, seed {r.seed} | {' | '.join(f'{r.accuracy[n]:.3f}' for n in lengths)} |" for r in results]
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for color, name in enumerate(CONTENDERS):
        for i, r in enumerate(r for r in results if r.name == name):
            axes.plot(*zip(*r.accuracy.items(), strict=True), "o-", color=f"C{color}", label=name if i == 0 else None)
    axes.axvline(TRAINED, color="gray", linestyle=":")
    axes.annotate("trained length", (TRAINED, 0.5), rotation=90, ha="right", color="gray")
    axes.set_xscale("log", base=2)
    lengths = list(results[0].accuracy)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set(xlabel="tokens of context", ylabel="accuracy", ylim=(-0.03, 1.03), title="Key-value recall in noise")
    axes.legend(loc="center right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lengths", default="512,4096,16384,131072")
    parser.add_argument("--only", choices=list(CONTENDERS), help="one contender")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="contenders at a time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for recall.json and recall.png")
    args = parser.parse_args()
    device, lengths = torch.device(args.device), tuple(int(n) for n in args.lengths.split(","))
    names = [args.only] if args.only else list(CONTENDERS)
    jobs = [Job(name, seed, args.steps, lengths, args.device) for seed in range(args.seeds) for name in names]
    args.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            results.append(future.result())
            (args.out / "recall.json").write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    results.sort(key=lambda r: (names.index(r.name), r.seed))
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"\n{machine}, torch {torch.__version__}, {args.steps} steps of {BATCH} x {TRAINED} tokens\n")
    print(table(results, lengths))
    plot(results, args.out / "recall.png")


if __name__ == "__main__":
    main()
