"""The Triton kernels on a GPU: precision, length, repeatability, torch.compile. One command: make test-gpu."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.config import preset
from andromeda.kernels import Geometry, QKNorm, Rotary, attention, attention_backend
from andromeda.kernels.reference import reference_attention
from andromeda.model import Andromeda
from andromeda.positions import alibi_slopes, certified_windows

pytestmark = pytest.mark.gpu
NAMES = ("out", "dq", "dk", "dv")


def geometry(heads: int, local: int, dim_head: int, xpos: bool = True, bound: float | None = None) -> Geometry:
    slopes = torch.tensor(alibi_slopes(local) + [0.0] * (heads - local), device="cuda")
    bounds = torch.full((heads,), bound or math.sqrt(dim_head), dtype=torch.float64, device="cuda")
    rotary = Rotary(local, dim_head // 2, xpos_scale=512.0 if xpos else None)
    windows = certified_windows(bounds, slopes.double(), 1e-4)
    return Geometry(slopes=slopes, windows=windows, bounds=bounds, rotary=rotary, local_heads=local)


def inputs(queries: int, heads: int, dim_head: int, *, kv_heads: int = 1, keys: int | None = None) -> list[Tensor]:
    """Fresh at each call."""

    def unit(tokens: int, count: int) -> Tensor:
        return F.normalize(torch.randn(1, tokens, count, dim_head, device="cuda"), dim=-1)

    keys = keys or queries
    q = unit(queries, heads) * math.sqrt(dim_head)
    return [q, unit(keys, kv_heads), torch.randn(1, keys, kv_heads, dim_head, device="cuda")]


def run(function: Callable[..., Tensor], xs: list[Tensor], g: Geometry, dtype: torch.dtype) -> list[Tensor]:
    given = [x.detach().to(dtype).requires_grad_() for x in xs]
    out = function(*given, g)
    weight = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(3), device="cuda").to(dtype)
    return [out.detach(), *torch.autograd.grad(out, given, weight)]


def in_parts(xs: list[Tensor], g: Geometry, dtype: torch.dtype) -> list[Tensor]:
    """The reference, a head and 256 queries at a time: all at once it would take too much memory."""
    q, k, v = xs
    group, offset = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    out, dq = torch.empty_like(q, dtype=dtype), torch.empty_like(q, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device="cuda") for x in (k, v))
    weight = torch.randn(q.shape, generator=torch.Generator("cuda").manual_seed(3), device="cuda").to(q.dtype)
    for h, rows in itertools.product(range(q.shape[2]), torch.arange(q.shape[1]).split(256)):
        assert g.slopes is not None and g.windows is not None and g.rotary is not None
        first, end = int(rows[0]), int(rows[-1]) + 1
        seen, own, kv = slice(0, offset + end), slice(first, end), slice(h // group, h // group + 1)
        one = Geometry(
            slopes=g.slopes[h : h + 1], windows=g.windows[h : h + 1],
            rotary=replace(g.rotary, heads=1) if h < g.rotary.heads else None,
            starts=None if g.starts is None else g.starts[:, seen],
        )  # fmt: skip
        given = [x.detach().to(dtype).requires_grad_() for x in (q[:, own, h : h + 1], k[:, seen, kv], v[:, seen, kv])]
        part = reference_attention(given[0], given[1], given[2], one)
        gradients = torch.autograd.grad(part, given, weight[:, own, h : h + 1].to(dtype))
        out[:, own, h : h + 1], dq[:, own, h : h + 1] = part.detach(), gradients[0]
        dk[:, seen, kv] += gradients[1]
        dv[:, seen, kv] += gradients[2]
    return [out, dq, dk.to(dtype), dv.to(dtype)]


def relative_error(x: Tensor, truth: Tensor) -> float:
    assert x.isfinite().all()
    return float((x.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def compare(xs: list[Tensor], g: Geometry, dtype: torch.dtype) -> None:
    """Ours at most twice as far from float64 as plain PyTorch in the same precision; all start from the same inputs."""
    xs = [x.to(dtype) for x in xs]
    truth, plain = in_parts(xs, g, torch.float64), in_parts(xs, g, dtype)
    with attention_backend("triton"):
        ours = run(attention, xs, g, dtype)
    for name, x, p, t in zip(NAMES, ours, plain, truth, strict=True):
        if xs[0].shape[1] == 1 and name in ("dq", "dk"):
            assert x.abs().max() < 0.1, name  # exactly zero but for rounding: one key has all the weight
        else:
            assert relative_error(x, t) <= 2 * relative_error(p, t) + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("tokens", [1, 63, 127, 1000, 4096, 8192])
def test_error_is_at_most_twice_plain_pytorchs(tokens: int, dtype: torch.dtype) -> None:
    compare(inputs(tokens, 4, 128), geometry(4, 2, 128), dtype)


@pytest.mark.parametrize("dim_head", [32, 64])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_other_shapes(dim_head: int, kv_heads: int) -> None:
    compare(inputs(777, 4, dim_head, kv_heads=kv_heads), geometry(4, 2, dim_head), torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        {"bounds": None}, {"rotary": Rotary(4, 64, xpos_scale=512.0)}, {"rotary": Rotary(2, 64)},
        {"rotary": Rotary(4, 64, xpos_scale=64.0)}, {"starts": "documents"}, {"queries": 200},
    ],
    ids=["running maximum", "rotary on all heads", "plain rotary", "short chunks", "documents", "chunk of queries"],
)  # fmt: skip
def test_flags(change: dict[str, object]) -> None:
    g, tokens = geometry(4, 2, 128), 1500
    xs = inputs(int(str(change.pop("queries", tokens))), 4, 128, keys=tokens)
    if change.get("starts") == "documents":
        index = torch.arange(tokens, device="cuda")
        change = {"starts": torch.where(index < 411, 0, torch.where(index < 1029, 411, 1029))[None]}
    compare(xs, replace(g, **change), torch.bfloat16)  # type: ignore[arg-type]


def test_two_runs_are_bit_identical() -> None:
    xs, g = inputs(3001, 8, 128), geometry(8, 4, 128)
    for first, second in zip(run(attention, xs, g, torch.bfloat16), run(attention, xs, g, torch.bfloat16), strict=True):
        assert torch.equal(first, second)


def test_200_000_tokens() -> None:
    tokens, g = 200_000, geometry(4, 2, 128)
    q, k, v = (x.bfloat16() for x in inputs(tokens, 4, 128))
    out = attention(q, k, v, g)
    assert out.isfinite().all()
    for row in (0, 1, 8_191, 65_537, 131_071, 199_999):
        truth = reference_attention(
            q[:, row : row + 1].double(), k[:, : row + 1].double(), v[:, : row + 1].double(), g
        )  # fmt: skip
        assert relative_error(out[:, row : row + 1], truth) < 0.01


@pytest.mark.parametrize("parallel", [True, False])
def test_a_block_compiles_without_graph_breaks(parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused preparation among it, for plain PyTorch's is not there."""
    monkeypatch.delattr(QKNorm, "__call__")
    config = preset("150m", num_tokens=512, depth=1, dim=256, heads=4, alibi_num_heads=2, parallel_blocks=parallel)
    model = Andromeda(config).to("cuda", torch.bfloat16)
    x = torch.randn(1, 300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    step = model._pass(300, 0, None, None, x.device)
    compiled = torch.compile(lambda x: model.blocks[0](x, step), fullgraph=True)
    out, expected = compiled(x), model.blocks[0](x, step)
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.05)
    learned, upstream = [x, *model.blocks[0].parameters()], torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad(y, learned, upstream) for y in (out, expected)), strict=True):
        assert relative_error(a, b.double()) < 0.05


def test_operator_passes_opcheck() -> None:
    from andromeda.kernels import flash, rotate

    g = geometry(4, 2, 128)
    q, k, v = (x.bfloat16().requires_grad_() for x in inputs(130, 4, 128))
    q = rotate.rotate_queries(q, g.rotary, 0, flash.LOG2_E).detach().requires_grad_()
    keys = rotate.stack_keys(k, g.rotary).detach().requires_grad_()
    arguments = (q, keys, v, g.slopes, g.windows, g.bounds, g.starts, 2, 2, 512.0, 1.0)
    torch.library.opcheck(
        flash._attend, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


SMALL_CASE = """
import torch
from andromeda.kernels import flash
from tests.kernels.test_flash_gpu import geometry, inputs, run
run(flash.flash_attention, inputs(150, 2, 64), geometry(2, 1, 64), torch.bfloat16)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL_CASE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
