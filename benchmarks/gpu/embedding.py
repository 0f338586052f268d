"""The token embedding on one GPU: ours beside torch.nn.Embedding, eager and compiled, in one run.

A table of 50,432 x 2,560 in bfloat16; ids drawn by Zipf's law. Medians of CUDA-event times. GB/s count the bytes that
must move: forward reads and writes each token's row and reads its id; backward reads the gradient of each token and
writes that of the whole table. Beside them stands the speed of a copy. The forward pass alone is without gradients.

    python benchmarks/gpu/embedding.py
    python benchmarks/gpu/embedding.py --check      # tiny, and interpreted without a GPU
    python benchmarks/gpu/embedding.py --sweep      # our tiles
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.kernels import embedding as ours

CUDA = torch.cuda.is_available()
if not CUDA:  # before a kernel is defined, at its first use
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if CUDA else "cpu"
TOKENS = (8192, 32768, 102400)
TABLE = (50432, 2560)
SWEEP = [(rows, columns, piece) for rows in (4, 8, 16) for columns in (512, 1024, 4096) for piece in (64, 128)]

Embed = Callable[[Tensor, Tensor], Tensor]


def zipf(tokens: int, rows: int) -> Tensor:
    odds = 1 / torch.arange(1, rows + 1, dtype=torch.float64)
    return torch.multinomial(odds, tokens, replacement=True, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def contenders() -> dict[str, Embed]:
    plain = nn.functional.embedding
    both: dict[str, Embed] = {"ours": ours.embedding, "nn.Embedding": lambda ids, weight: plain(ids, weight)}
    if CUDA:
        both["nn.Embedding, compiled"] = torch.compile(lambda ids, weight: plain(ids, weight))
    return both


def milliseconds(run: Callable[[], Any], budget: float = 0.5) -> float:
    """Median time of one call over about `budget` seconds, after a warm-up; wall-clock without a GPU."""
    began = time.perf_counter()
    run()
    if not CUDA:
        return 1e3 * (time.perf_counter() - began)
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = max(5, min(200, int(budget / max(1e-5, time.perf_counter() - began))))
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def peak_mebibytes(run: Callable[[], Any]) -> float | None:
    """Beyond what was allocated before; None without a GPU."""
    if not CUDA:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_gigabytes_per_second() -> float:
    x = torch.empty(2**30 if CUDA else 2**20, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds(lambda: y.copy_(x)) / 1e6


def measure(name: str, embed: Embed, tokens: int, table: tuple[int, int]) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    weight = torch.randn(table, device=DEVICE, dtype=dtype).requires_grad_()
    ids, grad = zipf(tokens, table[0]), torch.randn(tokens, table[1], device=DEVICE, dtype=dtype)

    def forward() -> Tensor:
        with torch.no_grad():
            return embed(ids, weight)

    def both() -> Tensor:
        return torch.autograd.grad(embed(ids, weight), weight, grad)[0]

    exact = torch.zeros(table, device=DEVICE).index_add_(0, ids, grad.float())
    first = both()
    error = ((first.float() - exact).norm() / exact.norm()).item()
    read, write = ids.nbytes + grad.nbytes, grad.nbytes  # of a forward pass
    times = {"forward": milliseconds(forward), "both": milliseconds(both)}
    moved = {"forward": read + write, "both": read + write + read + weight.nbytes}
    return {
        "name": name, "tokens": tokens,
        **{f"{k}_ms": times[k] for k in times}, **{f"{k}_gb_s": moved[k] / times[k] / 1e6 for k in times},
        "peak_mib": peak_mebibytes(both), "repeatable": torch.equal(first, both()), "error": error,
    }  # fmt: skip


def sweep(tokens: int) -> list[dict[str, Any]]:
    rows = []
    for tile, columns, piece in SWEEP:
        ours.SUM_TILE, ours.PIECE = (tile, columns), piece
        row = measure(f"ours {tile} x {columns}, pieces of {piece}", ours.embedding, tokens, TABLE)
        rows.append(row)
        print(f"{row['name']}: {row['both_ms']:.3f} ms", flush=True)
    return rows


def machine() -> dict[str, str]:
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    return {"device": name, "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sizes, table = ((64, 300), (97, 40)) if args.check else (TOKENS, TABLE)
    ceiling = copy_gigabytes_per_second()
    print(f"{machine()}, copy {ceiling:.0f} GB/s\n")
    if args.sweep:
        rows = sweep(TOKENS[-1])
    else:
        print("| tokens | | forward, ms | GB/s | of copy | both, ms | GB/s | of copy | peak MiB | repeatable |")
        print("|---:|---|---:|---:|---:|---:|---:|---:|---:|---|")
        rows = []
        for tokens in sizes:
            for name, embed in contenders().items():
                row = measure(name, embed, tokens, table)
                cells = " | ".join(
                    f"{row[k + '_ms']:.3f} | {row[k + '_gb_s']:.0f} | {row[k + '_gb_s'] / ceiling:.0%}"
                    for k in ("forward", "both")
                )
                peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
                same = "yes" if row["repeatable"] else "no"
                print(f"| {tokens:,} | {name} | {cells} | {peak} | {same} |", flush=True)
                rows.append(row)
    if args.json:
        args.json.write_text(json.dumps({**machine(), "copy_gb_s": ceiling, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
