"""The kernels for Hopper GPUs compile without one, as they should, and are given only what they take.

What they compute is asked on such a GPU, in test_flash_gpu.py: Gluon has no interpreter.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.hopper import check, reports
from tests.quick import quick

flash = pytest.importorskip("andromeda.kernels.flash", reason="needs triton")
E4M3 = torch.float8_e4m3fn

PROGRAM = """
import torch
from andromeda.kernels import flash_hopper, flash_hopper_backward as backward
from tests.kernels.hopper import report, tile

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")

def forward(dtype, kind):
    keys = flash_hopper.descriptor(empty(2, 1, 1, 1000, 128, dtype=dtype))
    types = {
        "q_ptr": f"*{kind}", "k_desc": tile(keys), "v_desc": tile(flash_hopper.descriptor(empty(1, 1, 1000, 128))),
        "out_ptr": f"*{kind}", "lse_ptr": "*fp32", "bounds_ptr": "*fp64", "out_scale": "fp32",
    }
    stages, lag = flash_hopper.RINGS[dtype]
    report(
        flash_hopper.ring_forward_kernel, types, warps=4, multiples=[f"{x}_{y}" for x in ("q", "out") for y in "bth"],
        WHICH=0, D=flash_hopper.D, ROWS=flash_hopper.ROWS, KEYS=flash_hopper.KEYS, STAGES=stages, LAG=lag,
    )

rows = tile(backward.descriptor(empty(1, 24, 1000, 128)))
line = tile(backward.line_descriptor(empty(1, 24, 1000, dtype=torch.float32)))
types = {
    "q_desc": rows, "dout_desc": rows, "lse_desc": line, "delta_desc": line,
    "k_desc": tile(backward.descriptor(empty(2, 1, 1, 1000, 128))), "v_desc": rows, "dk_ptr": "*fp32",
    "dv_ptr": "*fp32", "ends_ptr": "*i64",
}

def dkv(packed):
    report(
        backward.ring_dkv_kernel, types, warps=4, WHICH=0, PACKED=packed, SHARE=4, D=backward.D, ROWS=backward.ROWS,
        STAGES=backward.STAGES, LAG=backward.LAG,
    )

def dq():
    pointers = {f"{x}_ptr": "*bf16" for x in ("q", "out", "dout", "dq")} | {"lse_ptr": "*fp32", "delta_ptr": "*fp32"}
    report(
        backward.ring_dq_kernel, types | pointers, warps=4,
        multiples=[f"{x}_{y}" for x in ("q", "dout", "dq") for y in "bth"],
        WHICH=0, D=backward.D, ROWS=backward.ROWS, STAGES=backward.DQ_STAGES, LAG=backward.DQ_LAG,
    )
"""
KERNELS = ["forward(torch.bfloat16, 'bf16')", "dkv(packed=True)", "dq()"]  # each once; half of a minute
VARIANTS = ["forward(torch.float8_e4m3fn, 'fp8e4nv')", "dkv(packed=False)"]


@pytest.mark.parametrize("kernels", quick([KERNELS, VARIANTS], [KERNELS]), ids=" ".join)
def test_the_kernels_compile_for_hopper(kernels: list[str], tmp_path: os.PathLike[str]) -> None:
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    check(reports("\n".join([PROGRAM, *kernels]), tmp_path), len(kernels))


def fits(
    *, q: Any = torch.bfloat16, keys: Any = None, v: Any = torch.bfloat16, out: Any = None, **changes: Any
) -> bool:
    dim_head = changes.pop("dim_head", 128)
    switches = {"LOCAL": False, "CHUNK": 0, "PACKED": False, **changes}
    shapes = (1, 5, 4, dim_head), (1, 1, 2, 9, dim_head), (1, 9, 2, dim_head), (1, 5, 4, dim_head)
    dtypes = q, keys or q, v, out or v
    tensors = [torch.empty(s, dtype=t, device="meta") for s, t in zip(shapes, dtypes, strict=True)]
    answer: bool = flash.fits_the_ring(*tensors, switches)
    return answer


def test_what_the_kernel_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "INTERPRETED", False)
    monkeypatch.setattr(flash, "has_hopper_gluon", lambda device: device.type == "meta")
    assert fits()
    assert fits(q=E4M3)
    assert not fits(LOCAL=True)
    assert not fits(CHUNK=4096)
    assert not fits(PACKED=True)
    assert not fits(dim_head=64)
    assert not fits(q=torch.float16)
    assert not fits(keys=E4M3)
    assert not fits(v=torch.float16, out=torch.bfloat16)
    assert not fits(out=torch.float16)
    assert fits(q=E4M3, out=E4M3)
    monkeypatch.setattr(flash, "INTERPRETED", True)
    assert not fits()
    monkeypatch.setattr(flash, "INTERPRETED", False)
    monkeypatch.setattr(flash, "has_hopper_gluon", lambda device: False)
    assert not fits()


def test_what_the_gradients_kernels_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "INTERPRETED", False)
    monkeypatch.setattr(flash, "has_hopper_gluon", lambda device: True)

    def fits(
        queries: int, keys: int, dtype: torch.dtype = torch.bfloat16, local: bool = False, packed: bool = False
    ) -> bool:
        shapes = (1, queries, 4, 128), (1, 1, 1, keys, 128), (1, keys, 1, 128), (1, queries, 4, 128)
        dtypes = dtype, dtype, torch.bfloat16, torch.bfloat16
        tensors = [torch.empty(s, dtype=t, device="meta") for s, t in zip(shapes, dtypes, strict=True)]
        answer: bool = kernel(*tensors, {"LOCAL": local, "CHUNK": 0, "PACKED": packed})
        return answer

    kernel = flash.fits_the_dkv_ring
    assert fits(1000, 1000)
    assert not fits(1000, 1000, local=True)
    assert not fits(1000, 1000, E4M3)
    assert not fits(996, 1000)
    assert not fits(1001, 1001)
    assert fits(1000, 1000, packed=True)
    kernel = flash.fits_the_dq_ring
    assert not fits(1000, 1000, packed=True)
    assert fits(996, 1000)
    assert fits(1001, 1001)
    assert not fits(1000, 1000, local=True)
    assert not fits(1000, 1000, E4M3)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.skipif(not flash.INTERPRETED, reason="float32 is for the interpreter")
def test_launches_for_dk_and_dv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Global heads and no others, each once; what it leaves is added to the Triton kernel's."""
    q, v = torch.randn(1, 40, 4, 32), torch.randn(1, 40, 1, 32).requires_grad_()
    k = torch.randn(1, 1, 1, 40, 32).requires_grad_()
    geometry = flash.Geometry(slopes=torch.full((4,), 0.5), local_heads=2)
    plain = torch.autograd.grad(flash.prepared_attention(q, k, v, geometry).sum(), (k, v))

    def launch(*arguments: Any) -> None:
        dk, dv, _, segment, share = arguments[6:]
        served.append((segment.first, segment.count))
        dk.fill_(1.0)
        dv.fill_(2.0)
        assert dk.shape[0] * share == segment.count

    served: list[tuple[int, int]] = []
    monkeypatch.setattr(flash, "fits_the_dkv_ring", lambda *arguments: not arguments[-1]["LOCAL"])
    monkeypatch.setattr(flash, "_launch_dkv_ring", launch)
    local = flash.prepared_attention(q[:, :, :2], k, v, replace(geometry, slopes=torch.full((2,), 0.5)))
    expected = torch.autograd.grad(local.sum(), (k, v))
    got = torch.autograd.grad(flash.prepared_attention(q, k, v, geometry).sum(), (k, v))
    assert served == [(2, 2)]
    for x, y, whole, fill in zip(got, expected, plain, (1.0, 2.0), strict=True):
        torch.testing.assert_close(x - 2 * fill, y, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(x, whole, atol=1e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what is so without a GPU")
def test_there_is_no_such_gpu_here() -> None:
    assert not flash.has_hopper_gluon(torch.device("cpu"))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.skipif(not flash.INTERPRETED, reason="float32 is for the interpreter")
@pytest.mark.parametrize(("local", "keys", "known", "served"), [
    (2, 70, True, [(2, 2)]), (4, 70, True, []), (0, 70, True, [(0, 4)]), (2, 64, True, []), (2, 70, False, []),
])  # fmt: skip
def test_its_launches(
    local: int, keys: int, known: bool, served: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Global heads where bounds are known and there are more keys than a block has; and nothing twice."""
    launched: list[tuple[int, int]] = []
    q, v = torch.randn(1, keys, 4, 32), torch.randn(1, keys, 1, 32)
    k = torch.randn(1, 1, 1, keys, 32)
    bounds = torch.full((4,), 30.0, dtype=torch.float64) if known else None

    def launch(*arguments: Any) -> None:
        segment = arguments[-1]
        launched.append((segment.first, segment.count))
        arguments[4][:, :, segment.first : segment.first + segment.count] = 7

    monkeypatch.setattr(flash, "fits_the_ring", lambda *arguments: not arguments[-1]["LOCAL"])
    monkeypatch.setattr(flash, "_launch_ring", launch)
    monkeypatch.setattr(flash, "INTERPRETED_PLAN", flash.Plan(*[flash.Tiles(32, 64, 4, 1)] * 3))
    slopes = torch.full((4,), 0.5)
    geometry = flash.Geometry(slopes=slopes, bounds=bounds, local_heads=local)
    out = flash.prepared_attention(q, k, v, geometry)
    assert launched == served
    assert out.isfinite().all()
    for h in range(4):
        assert (out[:, :, h] == 7).all() == any(a <= h < a + n for a, n in served)
