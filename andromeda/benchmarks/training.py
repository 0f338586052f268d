"""Training on one GPU: tokens a second and peak memory of whole optimizer steps, beside transformers' Qwen3 class.

Random weights and tokens, one sequence a step, activations in bfloat16. Ours as a recipe trains it: float32 weights,
AdamW, clipping. The peer as it is most often trained on one card: bfloat16 weights and moments, PyTorch's fused AdamW,
clipping; with its own checkpointing where it is asked for. The ceiling is the rate of a large matrix product; what is
counted are the operations of causal attention and of products, of ours without what certified windows leave out, of
neither what is computed twice.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.benchmarks import measure, peers
from andromeda.benchmarks.measure import CUDA, DEVICE, GIB, Report, Save
from andromeda.config import AndromedaConfig, preset
from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.training.engines import build_engine
from andromeda.training.metrics import BACKWARD_AND_FORWARD, training_flops_per_token
from andromeda.training.processes import Processes
from andromeda.training.recipe import DataRecipe, Recipe

OURS = "andromeda"
LENGTHS = (8192, 32768, 131072)
LONG = 32768  # from here on activations are checkpointed
BUDGET = 3.0  # seconds that steps are timed for
LONG_STEP = 3000.0  # ms; one of these is enough


@dataclass(frozen=True)
class Row:
    """A way to train: who:preset:tokens, and then any of compile, selective, full, adamw8bit, muon, fp8 and a number:
    of sequences a step."""

    who: str
    preset: str
    tokens: int
    compile: bool = False
    checkpointing: str = "none"
    optimizer: str = "adamw"
    precision: str = "bfloat16"
    sequences: int = 1

    def __str__(self) -> str:
        ways = ["compile"] * self.compile + [self.checkpointing] * (self.checkpointing != "none")
        ways += [self.optimizer] * (self.optimizer != "adamw") + [self.precision] * (self.precision != "bfloat16")
        ways += [str(self.sequences)] * (self.sequences != 1)
        return ":".join([self.who, self.preset, str(self.tokens), *ways])


def read_row(text: str) -> Row:
    """Raises AndromedaError for what is no row."""
    who, name, tokens, *ways = text.split(":") if text.count(":") >= 2 else ("", "", "")
    if who not in ("ours", "qwen3") or not tokens.isdecimal():
        raise AndromedaError(f"bench training: --only {text}: a row is ours:2b:8192 or qwen3:2b:8192:full")
    row = Row(OURS if who == "ours" else peers.QWEN3, name, int(tokens))
    for way in ways:
        if way == "compile":
            row = replace(row, compile=True)
        elif way in ("selective", "full"):
            row = replace(row, checkpointing=way)
        elif way in ("adamw8bit", "muon"):
            row = replace(row, optimizer=way)
        elif way == "fp8":
            row = replace(row, precision=way)
        elif way.isdecimal() and int(way) > 0:
            row = replace(row, sequences=int(way))
        else:
            raise AndromedaError(f"bench training: --only {text}: no way {way!r}")
    return row


def wanted(name: str, lengths: tuple[int, ...], with_peers: bool) -> list[Row]:
    """Ours and the peer at each length, with checkpointing from LONG on."""
    rows = []
    for tokens in lengths:
        checkpointing = "full" if tokens >= LONG else "none"
        rows += [Row(OURS, name, tokens, compiled, checkpointing) for compiled in (False, True)]
        if with_peers and peers.installed(peers.QWEN3):
            rows.append(Row(peers.QWEN3, name, tokens, checkpointing=checkpointing))
    return rows


def run(rows: list[Row], once: bool, breakdown: bool, seconds: float, save: Save) -> Report:
    """Each row in turn; one that does not fit in memory says so."""
    deadline = measure.Deadline(seconds)
    ceiling = measure.product_rate()
    report: Report = {"machine": measure.machine(), "ceiling_flops": ceiling, "rows": []}
    print(f"{measure.headline(report['machine'])}; products {ceiling / 1e12:.0f} TFLOP/s\n")
    print("| | tokens/s | ms a step | of the ceiling | peak GiB |\n|---|---:|---:|---:|---:|", flush=True)
    for row in rows:
        if deadline.over():
            print(f"| {row} | no time left | | | |", flush=True)
            continue
        report["rows"].append(found := _measured(row, ceiling, once, breakdown))
        save(report)
        print(_line(row, found), flush=True)
        for name, ms in found.get("kernels", {}).items():
            print(f"    {ms:8.2f} ms  {name[:100]}", flush=True)
    return report


def _line(row: Row, found: dict[str, Any]) -> str:
    if "problem" in found:
        return f"| {row} | {found['problem']} | | | |"
    speed = f"{found['tokens_per_second']:,.0f} | {found['ms']:,.1f} | {found['of_ceiling']:.1%}"
    return f"| {row} | {speed} | {found['peak_bytes'] / GIB:.1f} |"


def _measured(row: Row, ceiling: float, once: bool, breakdown: bool) -> dict[str, Any]:
    found: dict[str, Any] = asdict(row)
    measure.release()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    try:
        step, flops_per_token = (_ours if row.who == OURS else _qwen3)(row)
        ms = measure.clocked(step, 1)[0] if once else _milliseconds(step)
        rate = 1e3 * row.sequences * row.tokens / ms
        found |= {
            "ms": ms, "tokens_per_second": rate, "of_ceiling": rate * flops_per_token / ceiling,
            "peak_bytes": torch.cuda.max_memory_allocated() if CUDA else 0,
        }  # fmt: skip
        if breakdown and CUDA:
            kernels = sorted(measure.by_kernel(step).items(), key=lambda item: -item[1])
            found["kernels"] = dict(kernels[:24])
    except torch.OutOfMemoryError:
        found["problem"] = "out of memory"
    return found


def _milliseconds(step: Callable[[], Any]) -> float:
    """Of a step that was warmed up: the median, or that of one where it takes long."""
    step()
    (once,) = measure.clocked(step, 1)
    return once if once > LONG_STEP else measure.milliseconds(step, BUDGET)


def _ours(row: Row) -> tuple[Callable[[], Any], float]:
    """A step, and operations a token."""
    config = replace(preset(row.preset), max_seq_len=row.tokens)
    recipe = Recipe(
        data=DataRecipe(train="random tokens"), model={"preset": row.preset}, compile=row.compile,
        precision=row.precision, optimizer=row.optimizer, checkpointing=row.checkpointing,  # type: ignore[arg-type]
    )  # fmt: skip
    device = torch.device(DEVICE)
    torch.manual_seed(0)
    with device:
        model = Andromeda(config)
    engine = build_engine(recipe, model, Processes(0, 1, device))
    ids = _ids(config, row)
    targets = ids.roll(-1, 1)

    def step() -> None:
        engine.accumulate((ids, targets, None), ids.numel(), last=True)
        engine.clip()
        engine.move(1e-4)

    return step, training_flops_per_token(model, row.tokens)


def _qwen3(row: Row) -> tuple[Callable[[], Any], float]:
    config = replace(preset(row.preset), max_seq_len=row.tokens)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: Any = peers.build(peers.QWEN3, config, row.tokens).to(torch.bfloat16)
    if row.checkpointing != "none":
        model.gradient_checkpointing_enable()
    model.train()
    compiled = torch.compile(model) if row.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = _ids(config, row).to(DEVICE)

    def step() -> None:
        compiled(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    products = 2.0 * sum(
        p.numel() for p in model.parameters()
    )  # the tied embedding is the projection to the vocabulary
    attention = 2 * 2 * config.depth * config.heads * config.dim_head * (row.tokens + 1) / 2
    return step, BACKWARD_AND_FORWARD * (products + attention)


def _ids(config: AndromedaConfig, row: Row) -> Tensor:
    return torch.randint(config.num_tokens, (row.sequences, row.tokens), generator=torch.Generator().manual_seed(0))


def check() -> Iterator[str]:
    """Two tiny steps of each way to train on this machine; lines to print."""
    for way in ("", ":selective", ":full", ":fp8", ":2"):
        row = read_row(f"ours:nano:64{way}")
        step, _ = _ours(row)
        step()
        step()
        gc.collect()
        yield f"{row}: two steps"
