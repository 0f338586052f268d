"""The kernels for Hopper GPUs compile without one, as they should: nothing in slow memory, products side by side.

What they compute is asked on such a GPU, in test_decode.py: Gluon has no interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

COMPILE = """
import subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from andromeda.kernels import decode_hopper as hopper

POINTERS = dict(
    q="bf16", pages="i32", lengths="i32", slopes="fp32", windows="i64", bounds="fp64", cos="fp16", sin="fp16",
    turns="fp64", decay="fp32", parts="fp32", tops="fp32", totals="fp32", out="bf16",
)
TILE = f"tensordesc<bf16[64, 128],{hopper.TILE_LAYOUT!r}>"

def typed(name):
    return "*" + POINTERS[name.removesuffix("_ptr")] if name.endswith("_ptr") else TILE if "desc" in name else "i32"

def ptx(kernel, warps, **constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else typed(name) for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    whole = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = GluonASTSource(kernel, signature, values, whole)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]

shape = dict(GROUP=24, D=128, PROGRAMS=132)
folder = Path(sys.argv[1])
(folder / "ring.ptx").write_text(ptx(
    hopper.ring_kernel, 4, CUT=12, PAGE=64, ROWS=16, STAGES=hopper.STAGES, TABLE=32, **shape
))
(folder / "merge.ptx").write_text(ptx(hopper.merge_kernel, 8, CHANNELS=hopper.CHANNELS, **shape))
assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
for name in ("ring", "merge"):
    command = [assembler, "-v", "-arch=sm_90a", "-o", folder / "out", folder / f"{name}.ptx"]
    print(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
"""


def test_the_kernels_compile_for_hopper(tmp_path: os.PathLike[str]) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, tmp_path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(" 0 bytes spill stores") == 2, done.stdout
    assert "serialized" not in done.stdout, done.stdout
