"""Attention on one GPU: our kernels beside SDPA (flash and cuDNN, without any bias) and FlexAttention, in one run.

bfloat16, 24 query heads, one key/value head, 128 channels, causal; B = 11.3 (sqrt(128), gains 1). Medians of CUDA-event
times of CUDA graphs, one replay behind the other, and after pauses ("rested"): of a forward pass, and of one with its
backward pass ("both"). TFLOP/s count the products that a causal head needs, windows counted as skipped for ours; both
passes need 3.5 times those of the first. The ceiling is a product of two matrices of 8,192 x 8,192.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from andromeda.benchmarks import measure, preparation
from andromeda.benchmarks.measure import CUDA, DEVICE, DTYPE, Deadline, Report, Save
from andromeda.kernels import Geometry, Rotary, flash, rotate
from andromeda.kernels.reference import reference_attention
from andromeda.positions import NO_WINDOW, alibi_slopes, certified_windows

LENGTHS = (8192, 32768, 102400)
LONGEST_BACKWARD = 32768
HEADS, LOCAL, D = 24, 12, 128
EPSILON = 1e-4
CHECKED = (1, 127, 1000, 2500) if CUDA else (1, 70)  # tokens
MASK_BLOCK = 128  # FlexAttention's
OURS = {  # ALiBi heads, xPos
    "ours, 12 of 24 local": (LOCAL, True), "the same without xPos": (LOCAL, False),
    "ours, 20 of 24 local": (20, True), "ours, all global": (0, False),
}  # fmt: skip

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, heads or 1, T, D) each


def run(lengths: Sequence[int], peers: bool, sweep: bool, seconds: float, save: Save) -> Report:
    """Errors, then every row; the sweep comes last, in what is left of the time."""
    deadline = Deadline(seconds)
    torch.manual_seed(0)
    report: Report = {"machine": measure.machine(), "errors": check(), "rows": []}
    ceiling = measure.product_rate()
    report["product_tflops"] = ceiling / 1e12
    print(f"{measure.headline(report['machine'])}\nbf16 products {ceiling / 1e12:.0f} TFLOP/s", flush=True)
    for length in lengths:
        backward = length <= LONGEST_BACKWARD
        for name in [*OURS, *(PEERS if peers else ())]:
            if deadline.over():
                print(f"stopped before {name}, {length:,} tokens: {seconds:.0f} s are over", flush=True)
                return report
            row = (measure_ours if name in OURS else measure_peer)(name, length, backward)
            report["rows"].append(row)
            save(report)
            print(line(row, ceiling), flush=True)
    if not deadline.over():
        report["preparation"] = preparation.measured(32768, HEADS, LOCAL, D, measure.copy_rate())
        save(report)
    if sweep:
        report["sweep"] = sweep_tiles(32768, deadline, lambda rows: save(report | {"sweep": rows}))
    return report


def line(row: dict[str, Any], ceiling: float) -> str:
    text = f"{row['tokens']:7,}  {row['name']:32}"
    for part, times in (("forward", 1.0), ("both", 3.5)):
        if part in row:
            rate = times * row["flops"] / row[part] * 1e3
            text += f"  {part} {row[part]:8.3f} ms {rate / 1e12:4.0f} TFLOP/s {rate / ceiling:4.0%} of products"
        if f"{part}_rested" in row:
            text += f", rested {row[f'{part}_rested']:.3f} ms"
    return f"{text}  {row['problem']}" if "problem" in row else text


# ---- ours ----------------------------------------------------------------------------------------


def geometry(heads: int, local: int, bound: float, dim_head: int = D, xpos: bool = True) -> Geometry:
    slopes = torch.tensor(alibi_slopes(local) + [0.0] * (heads - local), device=DEVICE)
    bounds = torch.full((heads,), bound, dtype=torch.float64, device=DEVICE)
    return Geometry(
        slopes=slopes, bounds=bounds, windows=certified_windows(bounds, slopes.double(), EPSILON),
        rotary=Rotary(local, dim_head // 2, xpos_scale=512.0 if xpos else None) if local else None,
        local_heads=local,
    )  # fmt: skip


def inputs(tokens: int, heads: int, bound: float, dim_head: int = D) -> tuple[Tensor, Tensor, Tensor]:
    def unit(heads: int) -> Tensor:
        return F.normalize(torch.randn(1, tokens, heads, dim_head, device=DEVICE), dim=-1)

    v = torch.randn(1, tokens, 1, dim_head, device=DEVICE)
    return (unit(heads) * bound).to(DTYPE), unit(1).to(DTYPE), v.to(DTYPE)


def flops(tokens: int, g: Geometry) -> float:
    """Of a forward pass: two products over the keys that each head needs."""
    assert g.windows is not None
    total = 0.0
    for window in g.windows.tolist():
        w = min(window, tokens)
        total += 4.0 * D * (w * (w + 1) / 2 + (tokens - w) * w)
    return total


def check(lengths: Sequence[int] = CHECKED) -> dict[str, dict[str, list[float]]]:
    """Errors of output, dq, dk, dv against float64 by length: ours, and those of plain PyTorch in the same precision.

    Raises:
        WrongResultError: one of ours is more than twice the other's.
    """
    heads, local, dim_head = (8, 4, D) if CUDA else (3, 2, 32)
    return {str(tokens): _errors(tokens, heads, local, dim_head) for tokens in lengths}


def _errors(tokens: int, heads: int, local: int, dim_head: int) -> dict[str, list[float]]:
    bound = math.sqrt(dim_head)
    g, xs = geometry(heads, local, bound, dim_head), inputs(tokens, heads, bound, dim_head)
    weight = torch.randn_like(xs[0])

    def run(attention: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        given = [x.detach().to(dtype).requires_grad_() for x in xs]
        out = attention(*given, g)
        return [out.detach(), *torch.autograd.grad(out, given, weight.to(dtype))]

    truth = run(reference_attention, torch.float64)
    # A token alone has no gradient of q and k: their rounding is measured by that of v.
    scales = [truth[0].norm(), *[truth[3].norm()] * 3] if tokens == 1 else [t.norm() for t in truth]
    errors = {}
    for name, way in (("ours", flash.flash_attention), ("plain", reference_attention)):
        found = run(way, DTYPE)
        errors[name] = [float((x.double() - t).norm() / s) for x, t, s in zip(found, truth, scales, strict=True)]
    for mine, other in zip(errors["ours"], errors["plain"], strict=True):
        measure.require(f"attention, {tokens} tokens", mine, 2 * other + (1e-4 if CUDA else 1e-5))
    return errors


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

    def forward_e4m3(self) -> Callable[[], Any]:
        """q.k in e4m3, as `Prefill("fp8")` has it on global heads."""
        q, keys = (x.detach().to(torch.float8_e4m3fn) for x in (self.q, self.keys))
        out, v = torch.empty_like(self.q), self.v.detach()
        return lambda: flash.prepared_attention(q, keys, v, self.g, out=out)

    def both(self) -> Callable[[], Any]:
        return both(lambda q, keys, v: flash.prepared_attention(q, keys, v, self.g), (self.q, self.keys, self.v))

    def backward(self) -> Callable[[], Any]:
        out = flash.prepared_attention(self.q, self.keys, self.v, self.g)
        grad = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, (self.q, self.keys, self.v), grad, retain_graph=True)


def both(attend: Attention, given: Sequence[Tensor]) -> Callable[[], Any]:
    """A forward pass and the gradients of everything given."""
    grad = torch.randn_like(given[0])
    return lambda: torch.autograd.grad(attend(*given), given, grad)


def measure_ours(name: str, tokens: int, backward: bool) -> dict[str, Any]:
    local, xpos = OURS[name]
    ours = Prepared(tokens, HEADS, local, math.sqrt(D), xpos)
    row = {"name": name, "tokens": tokens, "flops": ours.flops, **timed("forward", ours.forward)}
    return row | timed("both", ours.both()) if backward else row


def timed(part: str, call: Callable[[], Any]) -> dict[str, float]:
    replay = measure.captured(call) if CUDA else call
    return {part: measure.milliseconds(replay), f"{part}_rested": measure.rested(replay)}


# ---- peers ---------------------------------------------------------------------------------------


def measure_peer(name: str, tokens: int, backward: bool) -> dict[str, Any]:
    """Those without windows are counted as causal; `problem` where one does not take the shape."""
    g = geometry(HEADS, LOCAL, math.sqrt(D))
    whole = replace(g, windows=torch.full((HEADS,), tokens, device=DEVICE))
    row: dict[str, Any] = {"name": name, "tokens": tokens, "flops": flops(tokens, g if "windows" in name else whole)}
    try:
        attend = PEERS[name](tokens, g)
        q, k, v = (x.transpose(1, 2) for x in inputs(tokens, HEADS, math.sqrt(D)))
        with torch.no_grad():
            attend(q, k, v)  # compiles what is to be compiled
            row |= timed("forward", lambda: attend(q, k, v))
        if backward:
            if name.startswith("SDPA"):  # their backward takes one k/v head a query head
                k, v = (x.expand(-1, HEADS, -1, -1).contiguous() for x in (k, v))
            call = both(attend, [x.detach().requires_grad_() for x in (q, k, v)])
            call()
            row |= timed("both", call)
    except Exception as problem:  # noqa: BLE001 - whatever a peer raises is its own
        row["problem"] = f"{type(problem).__name__}: {' '.join(str(problem).split())[:100]}"
    return row


def sdpa(backend: SDPBackend) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=1.0, enable_gqa=k.shape[1] < q.shape[1]
            )

    return run


def flex(tokens: int, g: Geometry, windowed: bool) -> Attention:
    """FlexAttention with ALiBi, causal, and with the windows in its block mask."""
    torch.compiler.reset()  # of earlier lengths, lest it reach the limit of recompilations and fall back to eager
    slopes = g.slopes
    windows = g.windows if windowed else torch.full((1,), NO_WINDOW, device=DEVICE)
    assert slopes is not None and windows is not None
    mask = block_mask(tokens, windows)
    call = torch.compile(flex_attention, dynamic=False) if CUDA else flex_attention

    def alibi(score: Any, _b: Any, h: Any, i: Any, j: Any) -> Any:
        return score - slopes[h] * (i - j)

    return lambda q, k, v: call(q, k, v, score_mod=alibi, block_mask=mask, scale=1.0, enable_gqa=True)


def block_mask(tokens: int, windows: Tensor, size: int = MASK_BLOCK) -> BlockMask:
    """The mask 0 <= i - j < windows[h], by arithmetic on blocks: `create_block_mask` looks at every pair of tokens.

    Args:
        tokens: queries and keys.
        windows: (heads,), or (1,) for all heads.
        size: tokens of a block.
    """
    blocks = -(-tokens // size)
    first = torch.arange(blocks, device=windows.device) * size
    apart = first[:, None] - first  # (query blocks, key blocks): between their first tokens
    nearest, farthest, cut = apart - (size - 1), apart + (size - 1), windows[:, None, None]
    some = (farthest >= 0) & (nearest < cut)
    full = (nearest >= 0) & (farthest < cut) & (first[:, None] + size <= tokens)  # rows behind the end see nothing
    one = len(windows) == 1

    def seen(_b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) if one else (i >= j) & (i - j < windows[h])

    def listed(kept: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks a row keeps, and these first."""
        order = kept.int().argsort(dim=-1, descending=True, stable=True)
        return kept.sum(-1, dtype=torch.int32)[None], order.int()[None]

    return BlockMask.from_kv_blocks(
        *listed(some & ~full), *listed(full), BLOCK_SIZE=size, mask_mod=seen, seq_lengths=(tokens, tokens)
    )


PEERS: dict[str, Callable[[int, Geometry], Attention]] = {
    "SDPA flash, no bias": lambda _tokens, _g: sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN, no bias": lambda _tokens, _g: sdpa(SDPBackend.CUDNN_ATTENTION),
    "FlexAttention + ALiBi": lambda tokens, g: flex(tokens, g, windowed=False),
    "FlexAttention + ALiBi + windows": lambda tokens, g: flex(tokens, g, windowed=True),
}  # fmt: skip


# ---- tile shapes ---------------------------------------------------------------------------------

CANDIDATES: dict[str, list[flash.Tiles]] = {
    kernel: [flash.Tiles(*shape) for shape in shapes]
    for kernel, shapes in {
        "forward": [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 4), (64, 128, 4, 2)],
        "dq": [(128, 64, 8, 4), (128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 4)],
        "dkv": [(32, 64, 4, 4), (32, 64, 4, 3), (32, 64, 4, 5), (32, 128, 8, 3), (64, 64, 4, 2)],
    }.items()
}


def sweep_tiles(tokens: int, deadline: Deadline, save: Callable[[list[Any]], None]) -> list[dict[str, Any]]:
    """Each kernel's milliseconds by tile shape, global and local heads apart, and q.k of global ones in e4m3."""
    rows: list[dict[str, Any]] = []
    cases = [(kernel, shape) for kernel, shapes in CANDIDATES.items() for shape in shapes]
    measure.in_processes(_compile, [(kernel, shape, kind, tokens) for kernel, shape in cases for kind in kinds(kernel)])
    for kernel, shape in cases:
        if deadline.over():
            print(f"stopped before {kernel} {shape}: {deadline.seconds:.0f} s are over", flush=True)
            break
        row: dict[str, Any] = {"kernel": kernel, "tiles": asdict(shape)}
        for kind in kinds(kernel):
            try:
                with planned(kernel, shape):
                    row[kind] = measure.by_kernel(_kernel_run(kernel, kind, tokens))[f"{kernel}_kernel"]
            except Exception as problem:  # noqa: BLE001 - too many registers or too much shared memory
                row[kind] = type(problem).__name__
        print(row, flush=True)
        rows.append(row)
        save(rows)
    return rows


def kinds(kernel: str) -> list[str]:
    return ["global", "local", *(["global, e4m3"] if kernel == "forward" else [])]


@contextmanager
def planned(kernel: str, shape: flash.Tiles) -> Iterator[None]:
    """One kernel's tiles in place of the plan's, Triton's kernels alone: flash_hopper.py's has no others."""
    base, fits = flash.PLANS[D], flash.fits_the_ring
    flash.PLANS[D] = replace(base, **{kernel: shape})
    flash.fits_the_ring = lambda *_: False
    try:
        yield
    finally:
        flash.PLANS[D], flash.fits_the_ring = base, fits


def _kernel_run(kernel: str, kind: str, tokens: int) -> Callable[[], Any]:
    ours = Prepared(tokens, LOCAL, LOCAL if kind == "local" else 0, math.sqrt(D))
    if kernel != "forward":
        return ours.backward()
    return ours.forward_e4m3() if "e4m3" in kind else ours.forward


def _compile(case: tuple[str, flash.Tiles, str, int]) -> None:
    kernel, shape, kind, tokens = case
    with planned(kernel, shape), suppress(Exception):  # what fails here fails again where it is timed
        _kernel_run(kernel, kind, tokens)()
