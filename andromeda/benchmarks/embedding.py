"""The token embedding on one GPU: ours beside torch.nn.Embedding, eager and compiled, in one run.

A table of 50,432 x 2,560 in bfloat16; ids drawn by Zipf's law. Medians of CUDA-event times. GB/s count the bytes that
must move: forward reads and writes each token's row and reads its id; backward reads the gradient of each token and
writes that of the whole table. Beside them stands the speed of a copy. The forward pass alone is without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.benchmarks import measure
from andromeda.benchmarks.measure import CUDA, DEVICE, DTYPE, Report, Save
from andromeda.kernels import embedding as ours

TOKENS = (8192, 32768, 102400)
TABLE = (50432, 2560)
CHECKED, TINY_TABLE = (130,), (97, 40)
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


def row_of(name: str, embed: Embed, tokens: int, table: tuple[int, int]) -> dict[str, Any]:
    torch.manual_seed(0)
    weight = torch.randn(table, device=DEVICE, dtype=DTYPE).requires_grad_()
    ids, grad = zipf(tokens, table[0]), torch.randn(tokens, table[1], device=DEVICE, dtype=DTYPE)

    def forward() -> Tensor:
        with torch.no_grad():
            return embed(ids, weight)

    def both() -> Tensor:
        return torch.autograd.grad(embed(ids, weight), weight, grad)[0]

    exact = torch.zeros(table, device=DEVICE).index_add_(0, ids, grad.float())
    first = both()
    error = ((first.float() - exact).norm() / exact.norm()).item()
    if name.startswith("ours"):
        assert torch.equal(forward(), weight[ids])
        measure.require("embedding's gradient", error, 1e-2 if CUDA else 1e-5)
    row: dict[str, Any] = {
        "name": name, "tokens": tokens, "error": error, "repeatable": torch.equal(first, both()),
        "peak_bytes": measure.peak_bytes(both),
    }  # fmt: skip
    read, write = ids.nbytes + grad.nbytes, grad.nbytes  # of a forward pass
    for part, call, moved in (("forward", forward, read + write), ("both", both, 2 * read + write + weight.nbytes)):
        row[f"{part}_ms"] = measure.milliseconds(call, budget=0.5 if CUDA else 0.0, most=200)
        row[f"{part}_gb_s"] = moved / row[f"{part}_ms"] / 1e6
    return row


def sweep() -> Iterator[dict[str, Any]]:
    for tile, columns, piece in SWEEP:
        ours.SUM_TILE, ours.PIECE = (tile, columns), piece
        yield row_of(f"ours {tile} x {columns}, pieces of {piece}", ours.embedding, TOKENS[-1], TABLE)


def compare(sizes: Sequence[int], table: tuple[int, int]) -> Iterator[dict[str, Any]]:
    for tokens in sizes:
        for name, embed in contenders().items():
            yield row_of(name, embed, tokens, table)


def run(sweeping: bool, tiny: bool, save: Save) -> Report:
    """Peers, or our tiles in their place; `tiny`: small enough for Triton's interpreter."""
    report: Report = {"machine": measure.machine(), "rows": []}
    copy = measure.copy_rate() / 1e9
    report["copy_gb_s"] = copy
    print(f"{measure.headline(report['machine'])}\ncopy {copy:.0f} GB/s\n")
    print("| tokens | | forward, ms | GB/s | of copy | both, ms | GB/s | of copy | peak MiB | repeatable |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|---:|---|", flush=True)
    for row in sweep() if sweeping else compare(CHECKED, TINY_TABLE) if tiny else compare(TOKENS, TABLE):
        report["rows"].append(row)
        save(report)
        cells = " | ".join(
            f"{row[k + '_ms']:.3f} | {row[k + '_gb_s']:.0f} | {row[k + '_gb_s'] / copy:.0%}"
            for k in ("forward", "both")
        )
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        same = "yes" if row["repeatable"] else "no"
        print(f"| {row['tokens']:,} | {row['name']} | {cells} | {peak} | {same} |", flush=True)
    return report
