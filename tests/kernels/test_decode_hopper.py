"""The kernels for Hopper GPUs compile without one, as they should: nothing in slow memory, products side by side.

What they compute is asked on such a GPU, in test_decode.py: Gluon has no interpreter.
"""

from __future__ import annotations

import os

import pytest

from tests.kernels.hopper import check, reports

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

PROGRAM = """
from andromeda.kernels import decode_hopper as hopper
from tests.kernels.hopper import report

pointers = dict(
    q="bf16", pages="i32", lengths="i32", slopes="fp32", windows="i64", bounds="fp64", cos="fp16", sin="fp16",
    turns="fp64", decay="fp32", parts="fp32", tops="fp32", totals="fp32", out="bf16",
)
tile = f"tensordesc<bf16[64, 128],{hopper.TILE_LAYOUT!r}>"
types = {**{f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()}, "k_desc": tile, "v_desc": tile}
shape = dict(GROUP=24, D=128, PROGRAMS=132)
report(
    hopper.ring_kernel, types, warps=4, CUT=12, PAGE=64, ROWS=16, STAGES=hopper.STAGES, TABLE=32, **shape
)
report(hopper.merge_kernel, types, warps=8, CHANNELS=hopper.CHANNELS, **shape)
"""


def test_the_kernels_compile_for_hopper(tmp_path: os.PathLike[str]) -> None:
    check(reports(PROGRAM, tmp_path), kernels=2)
