"""Triton's interpreter as tests use it, beside the one that Triton has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import hashlib, sys
from contextlib import nullcontext

import torch

from andromeda.kernels.decode import decode_attention
from tests.interpreter import quick_interpreter
from tests.kernels import paged_batches, test_flash

digest = hashlib.sha256()
with quick_interpreter() if sys.argv[1] == "quick" else nullcontext():
    for name in ("documents", "grouped k/v heads", "the running maximum"):
        case = test_flash.CASES[name]
        for x in test_flash.outputs_and_gradients(test_flash.flash.flash_attention, case.inputs(), case.geometry()):
            digest.update(x.numpy().tobytes())
    for name in ("default", "bounded"):
        case = paged_batches.CASES[name]
        batch = paged_batches.batch_of([81, 5, 66], 1, case, torch.float32)
        digest.update(decode_attention(*batch, case.with_rotary(32)).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_the_quick_one_has_the_same_bits() -> None:
    found = {}
    for how in ("quick", "plain"):
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        arguments = [sys.executable, "-c", SCRIPT, how]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found[how] = done.stdout.strip()
    assert len(found["plain"]) == 64 and found["quick"] == found["plain"]
