"""Where Triton's kernels run."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


@functools.cache
def has_triton() -> bool:
    """Without importing it."""
    return importlib.util.find_spec("triton") is not None


def on_device_of(x: Tensor) -> torch.cuda.device:
    """A context in which kernels are launched on x's GPU; without one they are interpreted."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
