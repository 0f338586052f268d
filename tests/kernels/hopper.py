"""Kernels in Gluon, compiled for a Hopper GPU without one, in a process where Triton does not interpret."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MAX_SHARED = 232_448  # bytes of shared memory that a program may have


def tile(descriptor: Any) -> str:
    """The type of a tensor descriptor as a kernel's argument."""
    kinds = {"bfloat16": "bf16", "float8_e4m3fn": "fp8e4nv", "float32": "fp32"}
    kind = kinds[str(descriptor.base.dtype).removeprefix("torch.")]
    return f"tensordesc<{kind}{descriptor.block_shape},{descriptor.layout!r}>"


def report(
    kernel: Any, types: Mapping[str, str], *, warps: int, multiples: Sequence[str] = (), **constants: Any
) -> None:
    """Prints what the assembler says of a kernel, and its shared memory.

    Args:
        types: of the arguments, int32 if not given. `multiples`: integers that 16 divides, as it does each address.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    whole = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in multiples or signature[name].startswith("*")
    }
    compiled = triton.compile(
        GluonASTSource(kernel, signature, values, whole),
        target=GPUTarget("cuda", 90, 32), options={"num_warps": warps},
    )  # fmt: skip
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"])
        command = [str(assembler), "-v", "-arch=sm_90a", "-o", str(source.with_suffix(".cubin")), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(done.stdout, done.stderr, f"shared: {compiled.metadata.shared}")


def reports(program: str, cache: os.PathLike[str]) -> str:
    """What a program prints that calls `report`."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def check(printed: str, kernels: int) -> None:
    """Hardly a number in slow memory, products side by side, and not more shared memory than there is."""
    spilled = [int(found) for found in re.findall(r"(\d+) bytes spill stores", printed)]
    assert len(spilled) == kernels, printed
    assert max(spilled) <= 32, printed
    assert "serialized" not in printed, printed
    shared = [int(line.split()[-1]) for line in printed.splitlines() if "shared: " in line]
    assert len(shared) == kernels, printed
    assert max(shared) <= MAX_SHARED, printed
