"""The forward kernel for Hopper GPUs compiles without one, as it should, and is given only what it takes.

What it computes is asked on such a GPU, in test_flash_gpu.py: Gluon has no interpreter.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.kernels.hopper import check, reports

flash = pytest.importorskip("andromeda.kernels.flash", reason="needs triton")
E4M3 = torch.float8_e4m3fn

PROGRAM = """
import torch
from andromeda.kernels import flash_hopper as hopper
from tests.kernels.hopper import report, tile

for keys_dtype, kind in ((torch.bfloat16, "bf16"), (torch.float8_e4m3fn, "fp8e4nv")):
    keys = hopper.descriptor(torch.empty(2, 1, 1, 1000, 128, dtype=keys_dtype, device="meta"))
    values = hopper.descriptor(torch.empty(1, 1, 1000, 128, dtype=torch.bfloat16, device="meta"))
    types = {
        "q_ptr": f"*{kind}", "k_desc": tile(keys), "v_desc": tile(values), "out_ptr": "*bf16", "lse_ptr": "*fp32",
        "bounds_ptr": "*fp64",
    }
    stages, lag = hopper.RINGS[keys_dtype]
    report(
        hopper.ring_forward_kernel, types, warps=4, multiples=("q_b", "q_t", "q_h", "out_b", "out_t", "out_h"),
        WHICH=0, D=hopper.D, ROWS=hopper.ROWS, KEYS=hopper.KEYS, STAGES=stages, LAG=lag,
    )
"""


def test_the_kernel_compiles_for_hopper(tmp_path: os.PathLike[str]) -> None:
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    check(reports(PROGRAM, tmp_path), kernels=2)


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
    monkeypatch.setattr(flash, "INTERPRETED", True)
    assert not fits()
    monkeypatch.setattr(flash, "INTERPRETED", False)
    monkeypatch.setattr(flash, "has_hopper_gluon", lambda device: False)
    assert not fits()


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
