"""Memory in large pages, where Linux gives them on request: what is read from end to end needs fewer look-ups."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

LARGE_PAGE = 2**21  # bytes


def in_large_pages(*shape: int) -> Tensor:
    """An empty float32 tensor on the CPU."""
    count = math.prod(shape)
    if count * 4 < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape)
    memory = mmap.mmap(-1, count * 4 + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % LARGE_PAGE
    return torch.frombuffer(memory, dtype=torch.float32, count=count, offset=begin).view(shape)
