"""Key-value recall in noise: trained at 512 tokens, asked at up to 131,072.

A sequence is noise with PAIRS (key, value) pairs at random places; it ends with every key once more, each to be
answered by its value. Accuracy is the share of right answers. The default model is compared with rotary positions on
all heads (the letter of the specification), with the default less its log-n temperature, and with a Llama-like one.

The question is how far a model reaches, not how fast it learns, so each is trained until it answers: sequences begin
with 64 tokens, and become twice as long whenever the loss has fallen; at 512 tokens the learning rate then falls to 0.

    python benchmarks/recall.py                       # the plot and the table; a GPU when there is one
    python benchmarks/recall.py --lengths 512,4096    # as far as the machine allows
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections import deque
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
LEARNED = 0.02  # mean nats an answer over the last RECENT steps
RECENT = 50
LAST_STEPS = 300  # in which the learning rate falls to 0
PAIRS = 8
KEYS, VALUES, NOISE = 64, 64, 128  # vocabulary of each kind, in this order
BATCH = 32
WARMUP = 100
CHUNK = 32768  # tokens of a sequence read at once when asked

BASE: dict[str, Any] = dict(
    num_tokens=KEYS + VALUES + NOISE, max_seq_len=TRAINED, dim=128, depth=2, dim_head=32, heads=4, alibi_num_heads=2
)
# With our token shift: without it such a model had not learned the task at 512 tokens after 2,000 steps.
LLAMA_LIKE: dict[str, Any] = dict(
    alibi_pos_bias=False, rotary_heads="all", rotary_xpos=False, log_n_temperature=False, qk_norm=False,
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
    steps: int  # of training
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


def train(model: Andromeda, most_steps: int, rate: float, seed: int, device: torch.device, label: str) -> int:
    """Trains until the task is learned at TRAINED tokens, or `most_steps` have been made; the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    length, losses, end = SHORTEST, deque[float](maxlen=RECENT), most_steps
    step = 0
    while step < end:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP, (end - step) / LAST_STEPS)
        ids = sequences(BATCH, length, generator).to(device)
        hidden = model.hidden(ids[:, :-1])[:, -2 * PAIRS + 1 :: 2]  # at the keys asked
        loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), ids[:, -2 * PAIRS + 1 :: 2].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        if end == most_steps and len(losses) == RECENT and sum(losses) < LEARNED * RECENT:
            print(f"  {label}: step {step:5}: learned at {length} tokens", flush=True)
            losses.clear()
            if length < TRAINED:
                length *= 2
            else:
                end = min(end, step + LAST_STEPS)
        elif step % 200 == 0:
            print(f"  {label}: step {step:5}: loss {losses[-1]:.4f} at {length} tokens", flush=True)
    return step


@torch.inference_mode()
def accuracy(model: Andromeda, length: int, answers: int, device: torch.device) -> float:
    """Share of right answers at `length`, over at least `answers` of them."""
    model.eval()
    at_once = 2**14 if device.type == "cpu" else 2**19  # tokens of all sequences
    generator = torch.Generator().manual_seed(length)
    right = asked = 0
    while asked < answers:
        count = max(1, min(-(-(answers - asked) // PAIRS), at_once // length))
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
    most_steps: int
    lengths: tuple[int, ...]
    device: str
    threads: int
    least: int

    def answers(self, length: int) -> int:
        """How many to ask for: fewer where they take long."""
        most, tokens = (1024, 2**21) if self.device.startswith("cuda") else (256, 2**18)
        return max(self.least, min(most, PAIRS * (tokens // length)))


def run(job: Job) -> Result:
    overrides, rate = CONTENDERS[job.name]
    device, label = torch.device(job.device), f"{job.name}, seed {job.seed}"
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    model = Andromeda(AndromedaConfig(**(BASE | overrides))).to(device)
    began = time.perf_counter()
    steps = train(model, job.most_steps, rate, job.seed, device, label)
    result = Result(job.name, job.seed, steps, time.perf_counter() - began, {}, {})
    for length in job.lengths:
        began = time.perf_counter()
        result.answers[length] = job.answers(length)
        result.accuracy[length] = accuracy(model, length, job.answers(length), device)
        took = time.perf_counter() - began
        print(f"  {label}: {length:,} tokens: {result.accuracy[length]:.3f}  ({took:.1f} s)", flush=True)
    return result


def table(results: list[Result], lengths: tuple[int, ...]) -> str:
    lines = [
        f"| accuracy at | steps | {' | '.join(f'{n:,}' for n in lengths)} |",
        "|---|---:|" + "---:|" * len(lengths),
    ]
    lines += [
        f"| {r.name}, seed {r.seed} | {r.steps:,} | {' | '.join(f'{r.accuracy[n]:.3f}' for n in lengths)} |"
        for r in results
    ]
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """Accuracy by length: a color a contender, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4), constrained_layout=True)
    lengths = sorted({n for r in results for n in r.accuracy})
    for index, (name, marker) in reversed(list(enumerate(zip(CONTENDERS, "osD^", strict=True)))):  # the default on top
        for r in (r for r in results if r.name == name):
            axes.plot(
                list(r.accuracy), list(r.accuracy.values()), color=f"C{index}", marker=marker, clip_on=False,
                linestyle="-" if r.seed == 0 else "--", linewidth=2.2 if index == 0 else 1.4,
                label=name if r.seed == 0 else None,
            )  # fmt: skip
    axes.axvline(TRAINED, color="gray", linestyle=":")
    axes.annotate("trained length", (TRAINED, 0.02), xytext=(5, 0), textcoords="offset points", color="gray")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set(
        xlabel="tokens of context", ylabel="share of right answers", ylim=(0, 1.0), title="Key-value recall in noise"
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="the most that one is trained for")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lengths", default="512,4096,16384,131072")
    parser.add_argument("--only", choices=list(CONTENDERS), help="one contender")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--answers", type=int, default=2 * PAIRS, help="the least to ask for at any length")
    parser.add_argument("--jobs", type=int, default=1, help="contenders at a time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for recall.json and recall.png")
    args = parser.parse_args()
    device, lengths = torch.device(args.device), tuple(int(n) for n in args.lengths.split(","))
    names = [args.only] if args.only else list(CONTENDERS)
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    jobs = [
        Job(name, seed, args.steps, lengths, args.device, threads, args.answers)
        for seed in range(args.seeds)
        for name in names
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            results.append(future.result())
            (args.out / "recall.json").write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    results.sort(key=lambda r: (names.index(r.name), r.seed))
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"\n{machine}, torch {torch.__version__}\n")
    print(table(results, lengths))
    plot(results, args.out / "recall.png")


if __name__ == "__main__":
    main()
