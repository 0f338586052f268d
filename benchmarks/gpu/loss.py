"""The loss head on one GPU, forward and backward: ours beside plain PyTorch, in one run.

dim 2,560, a vocabulary of 50,432, bfloat16, a random gradient for each token's loss. Medians of CUDA-event times. The
share of the ceiling counts the three products that are needed, 6 N V dim operations, against a product of two matrices
of 8,192 x 8,192; whoever computes logits again works more than that. liger-kernel and cut-cross-entropy take part where
they are installed: liger with the mean of the losses alone, since its gradient of single losses is wrong.

    python benchmarks/gpu/loss.py
    python benchmarks/gpu/loss.py --check      # tiny, and interpreted without a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.kernels.loss import chunked_cross_entropy, fused_cross_entropy

CUDA = torch.cuda.is_available()
if not CUDA:  # before a kernel is defined, at its first use
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if CUDA else "cpu"
TOKENS = (8192, 32768, 102400)
DIM, VOCABULARY = 2560, 50432

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, targets -> (N,), or the mean


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def contenders() -> dict[str, Loss]:
    found: dict[str, Loss] = {"ours": fused_cross_entropy, "chunked PyTorch": chunked_cross_entropy, "plain": plain}
    if CUDA:
        found["plain, compiled"] = torch.compile(plain)
    if CUDA and util.find_spec("liger_kernel"):
        liger = import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
        found["liger-kernel, mean"] = lambda hidden, weight, targets: liger.apply(hidden, weight, targets)[0]
    if CUDA and util.find_spec("cut_cross_entropy"):
        cut = import_module("cut_cross_entropy").linear_cross_entropy
        for eps in ("auto", None):
            name = "cut-cross-entropy" + ("" if eps else ", no filter")
            found[name] = lambda h, w, t, eps=eps: cut(h, w, t, reduction="none", filter_eps=eps)  # type: ignore[misc]
    return found


def milliseconds(run: Callable[[], Any], budget: float = 2.0) -> float:
    """Median time of one call over about `budget` seconds, after a warm-up; wall-clock without a GPU."""
    began = time.perf_counter()
    run()
    if not CUDA:
        return 1e3 * (time.perf_counter() - began)
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = max(3, min(50, int(budget / max(1e-5, time.perf_counter() - began))))
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def matmul_teraflops() -> float:
    size = 8192 if CUDA else 256
    a, b = (torch.randn(size, size, device=DEVICE).to(torch.bfloat16 if CUDA else torch.float32) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b) / 1e9


class Case:
    """Inputs of one length."""

    def __init__(self, tokens: int, dim: int, vocabulary: int) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if CUDA else torch.float32
        self.tokens, self.flops = tokens, 6.0 * tokens * vocabulary * dim
        self.hidden = torch.randn(tokens, dim, device=DEVICE).to(dtype).requires_grad_()
        self.weight = (torch.randn(vocabulary, dim, device=DEVICE) * 0.02).to(dtype).requires_grad_()
        self.targets = torch.randint(vocabulary, (tokens,), device=DEVICE)
        self.upstream = torch.rand(tokens, device=DEVICE)

    def run(self, loss: Loss) -> list[Tensor]:
        losses = loss(self.hidden, self.weight, self.targets)
        upstream = self.upstream.to(losses.dtype) if losses.dim() else torch.ones_like(losses)
        return [losses.detach(), *torch.autograd.grad(losses, (self.hidden, self.weight), upstream)]

    def truth(self) -> list[Tensor]:
        """Losses and both gradients, in float64, a few tokens at a time."""
        weight = self.weight.detach().double().requires_grad_()
        parts: list[list[Tensor]] = [[], []]
        total = torch.zeros_like(weight)
        for at in torch.arange(self.tokens, device=DEVICE).split(1024):
            hidden = self.hidden.detach()[at].double().requires_grad_()
            losses = F.cross_entropy(hidden @ weight.t(), self.targets[at], reduction="none")
            grads = torch.autograd.grad(losses, (hidden, weight), self.upstream[at].double())
            parts[0].append(losses.detach())
            parts[1].append(grads[0])
            total += grads[1]
        return [torch.cat(parts[0]), torch.cat(parts[1]), total]


def measure(name: str, loss: Loss, case: Case, truth: list[Tensor]) -> dict[str, Any]:
    """Errors are those of the losses and of the gradients of hidden and weight; a mean has none. ms None: no memory."""
    row: dict[str, Any] = {"name": name, "tokens": case.tokens, "ms": None}
    try:
        found = case.run(loss)
        if found[0].dim():
            row["errors"] = [((x.double() - t).norm() / t.norm()).item() for x, t in zip(found, truth, strict=True)]
            row["repeatable"] = all(torch.equal(x, y) for x, y in zip(found, case.run(loss), strict=True))
        del found
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            case.run(loss)
            row["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        row["ms"] = milliseconds(lambda: case.run(loss))
        row["tflop_s"] = case.flops / row["ms"] / 1e9
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    return row


def show(row: dict[str, Any], ceiling: float) -> None:
    if row["ms"] is None:
        print(f"| {row['tokens']:,} | {row['name']} | out of memory | | | | | |", flush=True)
        return
    errors = ", ".join(f"{x:.1e}" for x in row.get("errors", []))
    peak = f"{row['peak_gib']:.2f}" if "peak_gib" in row else "-"
    same = {True: "yes", False: "no", None: ""}[row.get("repeatable")]
    print(
        f"| {row['tokens']:,} | {row['name']} | {row['ms']:.1f} | {row['tflop_s']:.0f} "
        f"| {row['tflop_s'] / ceiling:.0%} | {peak} | {errors} | {same} |",
        flush=True,
    )


def machine() -> dict[str, str]:
    return {"device": torch.cuda.get_device_name() if CUDA else "CPU", "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sizes, dim, vocabulary = ((40, 90), 32, 211) if args.check else (TOKENS, DIM, VOCABULARY)
    ceiling, rows = matmul_teraflops(), []
    print(f"{machine()}, product {ceiling:.3g} TFLOP/s\n")
    print("| tokens | | ms | TFLOP/s | of the product's | peak GiB | errors: loss, hidden, weight | repeatable |")
    print("|---:|---|---:|---:|---:|---:|---|---|")
    for tokens in sizes:
        case = Case(tokens, dim, vocabulary)
        truth = case.truth()
        for name, loss in contenders().items():
            row = measure(name, loss, case, truth)
            show(row, ceiling)
            rows.append(row)
    if args.json:
        args.json.write_text(json.dumps({**machine(), "matmul_tflop_s": ceiling, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
