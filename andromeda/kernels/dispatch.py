"""The one place that picks how attention is computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from andromeda.kernels.geometry import Geometry, check_shapes
from andromeda.kernels.launch import has_triton
from andromeda.kernels.reference import reference_attention
from andromeda.kernels.rotation import MAX_DECAY_EXPONENT, xpos_chunk
from andromeda.kernels.short import is_short, short_attention
from andromeda.kernels.tiled import tiled_attention

FLASH_DIMS = (32, 64, 128)
FLASH_DTYPES = (torch.bfloat16, torch.float16)


def _flash(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
    from andromeda.kernels.flash import flash_attention  # Triton is imported only when used

    return flash_attention(q, k, v, geometry)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Geometry], Tensor]] = {
    "reference": reference_attention,
    "short": short_attention,
    "tiled": tiled_attention,
    "triton": _flash,
}
_forced: str | None = None  # a plain global: torch.compile guards it


def attention(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, *, flash: bool = True) -> Tensor:
    """Causal attention of the last T positions over all S, as `reference_attention` defines it.

    Args:
        q: (B, T, heads, dim_head), normalised and scaled, not rotated. k, v: (B, S, kv_heads, dim_head), k not rotated.
        flash: False takes the dense reference.

    Returns:
        (B, T, heads, dim_head) in q's dtype.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_shapes(q, k, v, geometry)
    name = _forced or choose_backend(q.device, q.dtype, q.shape[3], k.shape[1], geometry, flash=flash)
    return BACKENDS[name](q, k, v, geometry)


def choose_backend(
    device: torch.device, dtype: torch.dtype, dim_head: int, keys: int, geometry: Geometry, *, flash: bool = True
) -> str:
    """The name in BACKENDS of what computes attention over so many keys of such a type."""
    if not flash:
        return "reference"
    if has_flash_kernels(device) and dtype in FLASH_DTYPES and dim_head in FLASH_DIMS and _decays_gently(geometry):
        return "triton"
    return "short" if is_short(keys, geometry) else "tiled"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def has_flash_kernels(device: torch.device) -> bool:
    """Whether Triton is there, and a GPU that it serves (compute capability 8 or more)."""
    if device.type != "cuda" or not has_triton():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _decays_gently(geometry: Geometry) -> bool:
    """Whether stored queries and keys, decayed by up to half a chunk, stay in float16's range."""
    rotary = geometry.rotary
    return rotary is None or rotary.steepest_decay * xpos_chunk(rotary) / 2 <= MAX_DECAY_EXPONENT


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Within the block all attention takes this backend: for tests and comparisons."""
    if name not in BACKENDS:
        raise ValueError(f"attention: no backend {name!r}; backends: {', '.join(BACKENDS)}")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
