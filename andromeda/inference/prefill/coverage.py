"""What the kernels of a prefill can run: precisions, devices, configurations."""

from __future__ import annotations

import os

import torch

from andromeda.config import AndromedaConfig
from andromeda.kernels.launch import HAS_TRITON

PRECISIONS = ("fp32", "bf16", "fp8")


def heads_in_fp8(config: AndromedaConfig) -> int:
    """How many heads, the last ones, multiply q and k in e4m3: the global ones, if normalised and not rotated."""
    local = config.num_local_heads
    divides_groups = config.kv_heads == 1 or local % (config.heads // config.kv_heads) == 0
    if config.normalises_qk and config.num_rotated_heads <= local and divides_groups:
        return config.heads - local
    return 0


def why_not(config: AndromedaConfig, precision: str, device: torch.device) -> str | None:
    """Why the kernels cannot run a model there; None: they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not HAS_TRITON:
        return "triton is not installed"
    if device.type != "cuda" and not interpreted:
        return f"the model is on {device.type}, and the kernels need a CUDA device"
    if precision == "fp32" and not interpreted:
        return "precision='fp32' is for Triton's interpreter"
    if precision == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "precision='fp8' needs a GPU of compute capability 8.9 or later"
    return _not_covered(config, precision)


def _not_covered(config: AndromedaConfig, precision: str) -> str | None:
    if not config.parallel_blocks:
        return "parallel_blocks=False is not covered"
    if config.use_abs_pos_emb:
        return "use_abs_pos_emb=True is not covered"
    if not config.attn_flash:
        return "attn_flash=False asks for the reference"
    if config.dim_head not in (32, 64, 128):
        return f"dim_head={config.dim_head} is not covered: 32, 64 and 128 are"
    inner = config.heads * config.dim_head + config.ff_mult * config.dim
    if config.dim % 16 or inner % 16:
        return f"dim={config.dim} is not a multiple of 16"
    if precision == "fp8" and config.depth < 2:
        return "precision='fp8' needs two blocks"
    return None
