"""How fast models learn: Andromeda beside transformers' GPT-2, Llama and Qwen3 classes, on CPU, from bytes of verse.

Same number of parameters (within 3%), same bytes in the same order, same AdamW, warm-up, cosine and
clipping, each with its best of four learning rates. Validation in bits per byte, on the same bytes, at 1, 4 and 16
times the trained length; at equal tokens, and at equal wall-clock (the peer's steps are scaled to the seconds that
Andromeda took, and the schedule with them).

    python benchmarks/learning.py                 # the comparison; about 15 minutes on 2 cores
    python benchmarks/learning.py --ablations     # each technique off
    python benchmarks/learning.py --jobs 8        # eight runs at a time, each on its own two cores
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.config import AndromedaConfig
from andromeda.model import Andromeda

CORPUS = Path(__file__).parent.parent / "examples" / "verse"
LENGTH = 128  # bytes a training sequence
BATCH = 8  # sequences a step
SCORED = 65536  # validation bytes
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
THREADS = 2
NUM_TOKENS = 256

DEFAULT: dict[str, Any] = dict(
    num_tokens=NUM_TOKENS, max_seq_len=LENGTH, dim=128, depth=4, dim_head=32, heads=4, alibi_num_heads=2
)
ABLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no token shift": {"shift_tokens": 0},
    "token shift by 2": {"shift_tokens": 2},
    "no ALiBi": {"alibi_pos_bias": False},
    "plain rotary for xPos": {"rotary_xpos": False},
    "no rotary": {"rotary_heads": "none", "rotary_xpos": False},
    "rotary on all heads": {"rotary_heads": "all"},
    "no log-n temperature": {"log_n_temperature": False},
    "no QK norm": {"qk_norm": False, "attn_qk_norm": False, "attn_qk_norm_dim_scale": False},
    "QK norm, temperature 10": {"attn_qk_norm": False},
    "no gains on q and k": {"attn_qk_norm_dim_scale": False},
    "one k/v head a query head": {"attn_one_kv_head": False},
    "learned absolute positions too": {"use_abs_pos_emb": True},
    "tied embeddings": {"tie_embeddings": True},
    "DeepNorm, sequential": {"parallel_blocks": False},
    "pre-norm, parallel": {"deepnorm": False},
    "pre-norm, sequential": {"deepnorm": False, "parallel_blocks": False},
    "GELU": {"ff_activation": "gelu"},
    "SiLU": {"ff_activation": "silu"},
    "no windows": {"window_epsilon": 0.0},
}
# With three seeds, to see what is noise.
SEEDED = ("default", "token shift by 2", "DeepNorm, sequential", "pre-norm, parallel", "pre-norm, sequential")


@dataclass(frozen=True)
class Job:
    """One training run."""

    model: str  # a key of PEERS, or "andromeda"
    learning_rate: float
    steps: int
    overrides: tuple[tuple[str, Any], ...] = ()
    name: str = "andromeda"
    seed: int = 0


@dataclass(frozen=True)
class Result:
    job: Job
    parameters: int
    seconds: float  # of training, validation apart
    bits_per_byte: dict[int, float]  # by context length; none where the architecture ends


Logits = Callable[[Tensor], Tensor]


def build(job: Job) -> tuple[nn.Module, Logits, int | None]:
    """A model, ids (B, T) -> logits (B, T, 256), and the longest context it takes."""
    torch.manual_seed(job.seed)
    if job.model == "andromeda":
        config = AndromedaConfig(**(DEFAULT | dict(job.overrides)))
        ours = Andromeda(config)
        return ours, ours, LENGTH if config.use_abs_pos_emb else None
    peer = PEERS[job.model]()
    return peer, lambda ids: peer(input_ids=ids, use_cache=False).logits, LENGTH if job.model == "GPT-2" else None


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=NUM_TOKENS, n_positions=LENGTH, n_embd=120, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        )
    )  # fmt: skip


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=NUM_TOKENS, hidden_size=120, intermediate_size=318, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=LENGTH, tie_word_embeddings=False,
        )
    )  # fmt: skip


def _qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=NUM_TOKENS, hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=LENGTH, tie_word_embeddings=False,
        )
    )  # fmt: skip


PEERS: dict[str, Callable[[], Any]] = {"GPT-2": _gpt2, "Llama": _llama, "Qwen3": _qwen3}


def train_bytes(corpus: Path) -> Tensor:
    texts = [json.loads(line)["text"] for line in (corpus / "train.jsonl").read_text("utf-8").splitlines()]
    return torch.frombuffer(bytearray("\n\n".join(texts).encode()), dtype=torch.uint8).long()


def validation_bytes(corpus: Path) -> Tensor:
    return torch.frombuffer(bytearray((corpus / "validation.txt").read_bytes()), dtype=torch.uint8).long()


def run(job: Job, corpus: Path) -> Result:
    torch.set_num_threads(THREADS)
    model, logits, longest = build(job)
    parameters = sum(p.numel() for p in model.parameters())
    train = train_bytes(corpus)
    matrices = [p for p in model.parameters() if p.dim() == 2 and min(p.shape) > 1]
    others = [p for p in model.parameters() if not (p.dim() == 2 and min(p.shape) > 1)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=job.learning_rate,
        betas=(0.9, 0.95),
    )
    order = torch.Generator().manual_seed(job.seed)  # the same bytes for every model
    spent = 0.0
    for step in range(job.steps):
        starts = torch.randint(len(train) - LENGTH - 1, (BATCH,), generator=order)
        sequences = torch.stack([train[s : s + LENGTH + 1] for s in starts.tolist()])
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = job.learning_rate * schedule(step, job.steps)
        loss = F.cross_entropy(logits(sequences[:, :-1]).flatten(0, 1), sequences[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        spent += time.perf_counter() - began
    validation = validation_bytes(corpus)
    lengths = [n for n in (LENGTH, 4 * LENGTH, 16 * LENGTH) if longest is None or n <= longest]
    return Result(job, parameters, spent, {n: bits_per_byte(logits, model, validation, n) for n in lengths})


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth, then a cosine down to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.inference_mode()
def bits_per_byte(logits: Logits, model: nn.Module, text: Tensor, length: int) -> float:
    """Mean bits of the same SCORED bytes, read in windows of `length`."""
    model.eval()
    nats = 0.0
    windows = text[: SCORED + 1].unfold(0, length + 1, length)  # each shares a byte with the next
    for batch in windows.split(max(1, 8192 // length)):
        nats += F.cross_entropy(logits(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return nats / math.log(2) / SCORED


def run_all(
    jobs: list[Job], corpus: Path, workers: int, json_file: Path | None, before: Sequence[Result] = ()
) -> list[Result]:
    """Runs jobs, `workers` at a time, each on cores of its own. All there is goes to `json_file` after every result."""
    context = multiprocessing.get_context("spawn")
    slots = context.Queue()
    for slot in range(workers):
        slots.put(slot)
    results: list[Result] = []
    with ProcessPoolExecutor(workers, context, initializer=_take_cores, initargs=(slots,)) as pool:
        for future in as_completed([pool.submit(run, job, corpus) for job in jobs]):
            result = future.result()
            job = result.job
            bits = "  ".join(f"{n}: {b:.3f}" for n, b in result.bits_per_byte.items())
            print(
                f"  {job.name:32} lr {job.learning_rate:.1e}  {job.steps:5} steps  {result.seconds:6.1f} s  {bits}",
                flush=True,
            )
            results.append(result)
            if json_file:
                every = [asdict(r) for r in (*before, *results)]
                json_file.write_text(json.dumps(every, indent=1) + "\n")
    return sorted(results, key=lambda r: jobs.index(r.job))


def _take_cores(slots: Any) -> None:
    slot = slots.get()
    cores = sorted(os.sched_getaffinity(0))
    mine = {cores[(slot * THREADS + i) % len(cores)] for i in range(THREADS)}
    os.sched_setaffinity(0, mine)


def best(results: list[Result], name: str) -> Result:
    return min((r for r in results if r.job.name == name), key=lambda r: r.bits_per_byte[LENGTH])


def compare(steps: int, corpus: Path, workers: int, json_file: Path | None) -> list[Result]:
    names = ["andromeda", *PEERS]
    jobs = [Job(name, rate, steps, name=name) for rate in LEARNING_RATES for name in names]
    results = run_all(jobs, corpus, workers, json_file)
    budget = best(results, "andromeda")
    print(f"\nequal wall-clock: {budget.seconds:.0f} s")
    timed = []
    for name in PEERS:
        peer = best(results, name)
        fitting = round(steps * budget.seconds / peer.seconds)
        timed.append(Job(name, peer.job.learning_rate, fitting, name=f"{name}, equal wall-clock"))
    return results + run_all(timed, corpus, workers, json_file, results)


def ablate(steps: int, corpus: Path, workers: int, json_file: Path | None) -> list[Result]:
    """Each change at two learning rates with seed 0; those of SEEDED at the higher one with two more seeds."""
    jobs = []
    for name, change in ABLATIONS.items():
        overrides = tuple(change.items())
        jobs += [Job("andromeda", rate, steps, overrides, name) for rate in LEARNING_RATES[1:3]]
        if name in SEEDED:
            jobs += [
                Job("andromeda", LEARNING_RATES[2], steps, overrides, f"{name}, seed {seed}", seed) for seed in (1, 2)
            ]
    return run_all(jobs, corpus, workers, json_file)


def table(results: list[Result]) -> str:
    """Markdown: the better learning rate of each."""
    lengths = (LENGTH, 4 * LENGTH, 16 * LENGTH)
    lines = [
        f"| | parameters | learning rate | steps | seconds | {' | '.join(f'{n} bytes' for n in lengths)} |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(r.job.name for r in results):
        r = best(results, name)
        bits = " | ".join(f"{r.bits_per_byte[n]:.3f}" if n in r.bits_per_byte else "-" for n in lengths)
        lines.append(
            f"| {name} | {r.parameters:,} | {r.job.learning_rate:.1e} | {r.job.steps:,} | {r.seconds:.0f} | {bits} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablations", action="store_true", help="each technique off, instead of the peers")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, two cores each")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--json", type=Path, help="write every run here, as it ends")
    args = parser.parse_args()
    results = (ablate if args.ablations else compare)(args.steps, args.corpus, args.jobs, args.json)
    print(
        f"\n{BATCH} x {LENGTH} bytes a step; {platform.processor() or platform.machine()}, torch {torch.__version__}\n"
    )
    print(table(results))


if __name__ == "__main__":
    main()
