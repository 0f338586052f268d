"""Where Triton's kernels run."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None  # not imported; torch.compile cannot trace the search


@functools.cache
def has_hopper_gluon(device: torch.device) -> bool:
    """A Hopper GPU, and a Triton whose Gluon knows it."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
        and importlib.util.find_spec("triton.experimental.gluon.nvidia.hopper") is not None
    )


def on_device_of(x: Tensor) -> torch.cuda.device:
    """A context in which kernels are launched on x's GPU; without one they are interpreted."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


@contextmanager
def written(out: Tensor | None) -> Iterator[Tensor | None]:
    """What a kernel writes in place of `out`: e4m3 without a GPU is float32 first, for the interpreter loses carries
    when it rounds.
    """
    if out is None or out.dtype != torch.float8_e4m3fn or out.is_cuda:
        yield out
        return
    wide = out.float()
    yield wide
    out.copy_(wide.clamp(-448.0, 448.0))
