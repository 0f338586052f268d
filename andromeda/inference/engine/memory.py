"""How many pages of cache a device has room for."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from andromeda.config import AndromedaConfig
from andromeda.inference.engine.blocks import PAGE
from andromeda.inference.engine.pages import page_bytes

GPU_SHARE = 0.85  # of what is free beside the weights; the rest is for activations
CPU_SHARE = 0.1
USEFUL_TOKENS = 8192  # for each text that runs, at least; as many again for prefixes to come


def default_num_pages(config: AndromedaConfig, dtype: torch.dtype, device: torch.device, max_running: int) -> int:
    """As many as fit in the device's share, and no more than so many texts have a use for."""
    useful = 2 * max_running * max(config.max_seq_len, USEFUL_TOKENS) // PAGE
    return min(pages_in(available_bytes(device), config, dtype), useful)


def pages_in(memory_bytes: int, config: AndromedaConfig, dtype: torch.dtype) -> int:
    """Pages in so many bytes, page 0 among them."""
    return memory_bytes // page_bytes(config, dtype.itemsize)


def has_room(num_bytes: int) -> bool:
    """Whether so many bytes on the CPU leave half of what is free."""
    return num_bytes <= _free_bytes() // 2


def available_bytes(device: torch.device) -> int:
    """That the cache may have, of what is free now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held_for_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(GPU_SHARE * (free + held_for_torch))
    return int(CPU_SHARE * _free_bytes())


def _free_bytes() -> int:
    """On the CPU; on Linux with what holds copies of files, which give way."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
