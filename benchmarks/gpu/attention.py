"""Attention on one GPU: our kernels beside SDPA (flash and cuDNN, without any bias) and FlexAttention, in one run.

bfloat16, 24 query heads, one key/value head, 128 channels, causal; B = 11.3 (sqrt(128), gains 1). Medians of CUDA-event
times. TFLOP/s count the products that a causal head needs, windows counted as skipped for ours.

    python benchmarks/gpu/attention.py                  # check, then forward and backward beside the peers
    python benchmarks/gpu/attention.py --sweep          # tile shapes
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.kernels import Geometry, Rotary, flash, rotate
from andromeda.kernels.reference import reference_attention
from andromeda.positions import alibi_slopes, certified_windows

D = 128
EPSILON = 1e-4


def geometry(heads: int, local: int, bound: float, max_seq_len: int = 8192, xpos: bool = True) -> Geometry:
    slopes = torch.tensor(alibi_slopes(local) + [0.0] * (heads - local), device="cuda")
    bounds = torch.full((heads,), bound, dtype=torch.float64, device="cuda")
    return Geometry(
        slopes=slopes, bounds=bounds, windows=certified_windows(bounds, slopes.double(), EPSILON),
        rotary=Rotary(local, D // 2, xpos_scale=max(512.0, max_seq_len / 16) if xpos else None) if local else None,
        local_heads=local,
    )  # fmt: skip


def inputs(tokens: int, heads: int, bound: float, keys: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    def unit(count: int, heads: int) -> Tensor:
        return F.normalize(torch.randn(1, count, heads, D, device="cuda"), dim=-1)

    keys = keys or tokens
    q = (unit(tokens, heads) * bound).bfloat16()
    return q, unit(keys, 1).bfloat16(), torch.randn(1, keys, 1, D, device="cuda").bfloat16()


def milliseconds(run: Callable[[], Any], budget: float = 0.4) -> float:
    """Median time of one call, after a warm-up, over about `budget` seconds."""
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


def flops(tokens: int, g: Geometry) -> float:
    """Of a forward pass: two products over the keys that each head needs."""
    assert g.windows is not None
    total = 0.0
    for window in g.windows.tolist():
        w = min(window, tokens)
        total += 4.0 * D * (w * (w + 1) / 2 + (tokens - w) * w)
    return total


def matmul_ceiling() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9


def error(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


def check(tokens: int, heads: int, local: int) -> dict[str, list[float]]:
    """Errors of output, dq, dk, dv against float64: ours, and plain PyTorch's in bfloat16."""
    g = geometry(heads, local, math.sqrt(D))
    xs = [x.requires_grad_() for x in inputs(tokens, heads, math.sqrt(D))]
    weight = torch.randn_like(xs[0])

    def run(attention: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        given = [x.detach().to(dtype).requires_grad_() for x in xs]
        out = attention(*given, g)
        return [out, *torch.autograd.grad(out, given, weight.to(dtype))]

    truth = run(reference_attention, torch.float64)
    return {
        name: [error(x, t) for x, t in zip(run(attention, torch.bfloat16), truth, strict=True)]
        for name, attention in (("ours", flash.flash_attention), ("plain", reference_attention))
    }


class Prepared:
    """Our attention on prepared queries and keys, forward and backward."""

    def __init__(self, tokens: int, heads: int, local: int, bound: float, xpos: bool = True) -> None:
        self.g = geometry(heads, local, bound, xpos=xpos)
        q, k, v = inputs(tokens, heads, bound)
        self.q = rotate.rotate_queries(q, self.g.rotary, 0, flash.LOG2_E).requires_grad_()
        self.keys = rotate.stack_keys(k, self.g.rotary).contiguous().requires_grad_()
        self.v = v.requires_grad_()
        self.flops = flops(tokens, self.g)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return flash.prepared_attention(self.q, self.keys, self.v, self.g)

    def backward(self) -> Callable[[], Any]:
        out = flash.prepared_attention(self.q, self.keys, self.v, self.g)
        grad = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, (self.q, self.keys, self.v), grad, retain_graph=True)


def by_kernel(run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each kernel of one call, by name."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / 3e3 for event in profiler.key_averages()}


CANDIDATES: dict[str, list[tuple[int, ...]]] = {
    "forward": [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 4), (64, 32, 4, 3, 168), (128, 64, 8, 2, 128)],
    "dq": [(128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3, 168), (64, 32, 4, 4), (64, 128, 8, 2), (128, 64, 8, 4)],
    "dkv": [(64, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 3), (64, 128, 8, 2), (32, 64, 4, 4)],
}  # fmt: skip


def sweep(tokens: int, seconds: float) -> list[dict[str, Any]]:
    """Tile shapes (queries, keys, warps, stages, registers) of each kernel, global and local heads apart."""
    rows: list[dict[str, Any]] = []
    base, ends = flash.PLANS[D], time.time() + seconds
    for kernel, shape in ((kernel, shape) for kernel, shapes in CANDIDATES.items() for shape in shapes):
        if time.time() > ends:
            break
        flash.PLANS[D] = replace(base, **{kernel: flash.Tiles(*shape)})
        row: dict[str, Any] = {"kernel": kernel, "tiles": shape}
        for name, heads, local in (("global", 12, 0), ("local", 12, 12)):
            try:
                ours = Prepared(tokens, heads, local, math.sqrt(D))
                run = ours.forward if kernel == "forward" else ours.backward()
                row[name] = sum(t for key, t in by_kernel(run).items() if key == f"{kernel}_kernel")
            except Exception as problem:  # noqa: BLE001 - too many registers or too much shared memory
                row[name] = type(problem).__name__
        print(row, flush=True)
        rows.append(row)
    flash.PLANS[D] = base
    return rows


def peers(tokens: int, heads: int, g: Geometry) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    slopes, windows = g.slopes, g.windows
    compiled = torch.compile(flex_attention, dynamic=False)

    def causal(_b: Any, _h: Any, i: Any, j: Any) -> Any:
        return i >= j

    def windowed(_b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & (i - j < windows[h])  # type: ignore[index]

    def alibi(score: Any, _b: Any, h: Any, i: Any, j: Any) -> Any:
        return score - slopes[h] * (i - j)  # type: ignore[index]

    whole = create_block_mask(causal, None, None, tokens, tokens, device="cuda", _compile=True)
    cut = create_block_mask(windowed, None, heads, tokens, tokens, device="cuda", _compile=True)

    def sdpa(backend: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=1.0, enable_gqa=k.shape[1] < q.shape[1]
                )

        return run

    def flex(mask: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: compiled(q, k, v, score_mod=alibi, block_mask=mask, scale=1.0, enable_gqa=True)

    return {
        "SDPA flash, no bias": sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN, no bias": sdpa(SDPBackend.CUDNN_ATTENTION),
        "FlexAttention + ALiBi": flex(whole),
        "FlexAttention + ALiBi + windows": flex(cut),
    }  # fmt: skip


def compare(tokens: int, backward: bool, with_peers: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, heads, local, xpos in (
        ("ours, 12 of 24 local", 24, 12, True), ("the same without xPos", 24, 12, False),
        ("ours, 20 of 24 local", 24, 20, True), ("ours, all global", 24, 0, False),
    ):  # fmt: skip
        ours = Prepared(tokens, heads, local, math.sqrt(D), xpos)
        row: dict[str, Any] = {"name": name, "tokens": tokens, "forward": milliseconds(ours.forward)}
        row["tflops"] = ours.flops / row["forward"] / 1e9
        if backward:
            row["backward"] = milliseconds(ours.backward())
        rows.append(row)
        print(row, flush=True)
    if not with_peers:
        return rows
    q, k, v = (x.transpose(1, 2) for x in inputs(tokens, 24, math.sqrt(D)))
    causal = 24 * 4.0 * D * tokens * (tokens + 1) / 2
    for name, run in peers(tokens, 24, geometry(24, 12, math.sqrt(D))).items():
        row = {"name": name, "tokens": tokens}
        try:
            with torch.no_grad():
                row["forward"] = milliseconds(lambda: run(q, k, v))  # noqa: B023
            row["tflops"] = causal / row["forward"] / 1e9
            if backward:
                shared = [x.detach().requires_grad_() for x in (q, k, v)]
                if name.startswith("SDPA"):  # their backward takes one k/v head a query head
                    shared = [
                        shared[0],
                        *(x.detach().expand(-1, 24, -1, -1).contiguous().requires_grad_() for x in (k, v)),
                    ]
                out = run(*shared)
                grad = torch.randn_like(out)
                row["backward"] = milliseconds(lambda: torch.autograd.grad(out, shared, grad, retain_graph=True))  # noqa: B023
        except Exception as problem:  # noqa: BLE001 - a peer may not take the shape
            row["problem"] = f"{type(problem).__name__}: {str(problem)[:100]}"
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="tile shapes instead of peers")
    parser.add_argument("--lengths", default="8192,32768,102400")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--seconds", type=float, default=150, help="limit of the sweep")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    results["errors"] = {str(n): check(n, 8, 4) for n in (1, 127, 1000, 2500)}
    print(results, flush=True)
    results["matmul_tflops"] = matmul_ceiling()
    if args.sweep:
        results["sweep"] = sweep(32768, args.seconds)
    else:
        results["rows"] = [
            row for n in args.lengths.split(",") for row in compare(int(n), int(n) <= 32768, not args.no_peers)
        ]
    print(f"{results['device']}, bf16 products {results['matmul_tflops']:.0f} TFLOP/s")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
