"""Where Triton's kernels run."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None  # not imported; torch.compile cannot trace the search


def on_device_of(x: Tensor) -> torch.cuda.device:
    """A context in which kernels are launched on x's GPU; without one they are interpreted."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
