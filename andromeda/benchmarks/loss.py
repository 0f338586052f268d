"""The loss head on one GPU, forward and backward: ours beside plain PyTorch, in one run.

dim 2,560, a vocabulary of 50,432, bfloat16, a random gradient for each token's loss. Medians of CUDA-event times. The
share of the ceiling counts the three products that are needed, 6 N V dim operations, against a product of two matrices
of 8,192 x 8,192; whoever computes logits again works more than that. liger-kernel and cut-cross-entropy take part where
they are installed: liger with the mean of the losses alone, since its gradient of single losses is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.benchmarks import measure
from andromeda.benchmarks.measure import CUDA, DEVICE, DTYPE, GIB, Report, Save
from andromeda.kernels.loss import chunked_cross_entropy, fused_cross_entropy

TOKENS = (8192, 32768, 102400)
DIM, VOCABULARY = 2560, 50432
CHECKED, TINY = (70,), (32, 211)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, targets -> (N,), or the mean


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def contenders() -> dict[str, Loss | None]:
    """None: not installed."""
    found: dict[str, Loss | None] = {
        "ours": fused_cross_entropy, "chunked PyTorch": chunked_cross_entropy, "plain": plain,
    }  # fmt: skip
    if CUDA:
        found |= {"plain, compiled": torch.compile(plain), **_liger(), **_cut()}
    return found


def _liger() -> dict[str, Loss | None]:
    name = "liger-kernel, mean"
    if measure.version("liger-kernel") is None:
        return {name: None}
    liger = import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    return {name: lambda hidden, weight, targets: liger.apply(hidden, weight, targets)[0]}


def _cut() -> dict[str, Loss | None]:
    if measure.version("cut-cross-entropy") is None:
        return {"cut-cross-entropy": None}
    cut = import_module("cut_cross_entropy").linear_cross_entropy

    def loss(eps: str | None) -> Loss:
        return lambda h, w, t: cut(h, w, t, reduction="none", filter_eps=eps)

    return {"cut-cross-entropy": loss("auto"), "cut-cross-entropy, no filter": loss(None)}


class Case:
    """Inputs of one length."""

    def __init__(self, tokens: int, dim: int, vocabulary: int) -> None:
        torch.manual_seed(0)
        self.tokens, self.flops = tokens, 6.0 * tokens * vocabulary * dim
        self.hidden = torch.randn(tokens, dim, device=DEVICE).to(DTYPE).requires_grad_()
        self.weight = (torch.randn(vocabulary, dim, device=DEVICE) * 0.02).to(DTYPE).requires_grad_()
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


def row_of(name: str, loss: Loss | None, case: Case, truth: list[Tensor]) -> dict[str, Any]:
    """Errors are those of the losses and of the gradients of hidden and weight; a mean has none."""
    row: dict[str, Any] = {"name": name, "tokens": case.tokens}
    if loss is None:
        return row | {"problem": "not installed"}
    try:
        found = case.run(loss)
        if found[0].dim():
            row["errors"] = [((x.double() - t).norm() / t.norm()).item() for x, t in zip(found, truth, strict=True)]
            row["repeatable"] = all(torch.equal(x, y) for x, y in zip(found, case.run(loss), strict=True))
        del found
        row["peak_bytes"] = measure.peak_bytes(lambda: case.run(loss))
        row["ms"] = measure.milliseconds(lambda: case.run(loss), budget=2.0 if CUDA else 0.0)
        row["tflop_s"] = case.flops / row["ms"] / 1e9
    except torch.OutOfMemoryError:
        measure.release()
        return row | {"problem": "out of memory"}
    if name == "ours":
        measure.require("the loss head", max(row["errors"]), 2e-2 if CUDA else 1e-5)
    return row


def line(row: dict[str, Any], ceiling: float) -> str:
    head = f"| {row['tokens']:,} | {row['name']}"
    if "problem" in row:
        return f"{head} | {row['problem']} | | | | | |"
    errors = ", ".join(f"{x:.1e}" for x in row.get("errors", []))
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f}"
    same = {True: "yes", False: "no", None: ""}[row.get("repeatable")]
    rate = f"{row['tflop_s']:.3g} | {row['tflop_s'] / ceiling:.0%}"
    return f"{head} | {row['ms']:.1f} | {rate} | {peak} | {errors} | {same} |"


def run(tiny: bool, save: Save) -> Report:
    """All contenders at all lengths; `tiny`: small enough for Triton's interpreter."""
    sizes, (dim, vocabulary) = (CHECKED, TINY) if tiny else (TOKENS, (DIM, VOCABULARY))
    report: Report = {"machine": measure.machine(), "rows": []}
    ceiling = measure.product_rate() / 1e12
    report["product_tflop_s"] = ceiling
    print(f"{measure.headline(report['machine'])}\nproducts {ceiling:.3g} TFLOP/s\n")
    print("| tokens | | ms | TFLOP/s | of the product's | peak GiB | errors: loss, hidden, weight | repeatable |")
    print("|---:|---|---:|---:|---:|---:|---|---|", flush=True)
    for tokens in sizes:
        case = Case(tokens, dim, vocabulary)
        truth = case.truth()
        for name, loss in contenders().items():
            report["rows"].append(row_of(name, loss, case, truth))
            save(report)
            print(line(report["rows"][-1], ceiling), flush=True)
    return report
