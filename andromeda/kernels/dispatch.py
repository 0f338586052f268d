"""The one place that picks how attention is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from andromeda.kernels.geometry import Geometry, check_shapes
from andromeda.kernels.reference import reference_attention
from andromeda.kernels.short import is_short, short_attention
from andromeda.kernels.tiled import tiled_attention

BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Geometry], Tensor]] = {
    "reference": reference_attention,
    "short": short_attention,
    "tiled": tiled_attention,
}
_forced: ContextVar[str | None] = ContextVar("attention_backend", default=None)


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
    name = _forced.get() or choose_backend(k.shape[1], geometry, flash=flash)
    return BACKENDS[name](q, k, v, geometry)


def choose_backend(keys: int, geometry: Geometry, *, flash: bool = True) -> str:
    """The name in BACKENDS of what computes attention over so many keys."""
    if not flash:
        return "reference"
    return "short" if is_short(keys, geometry) else "tiled"


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Within the block all attention takes this backend: for tests and comparisons."""
    if name not in BACKENDS:
        raise ValueError(f"attention: no backend {name!r}; backends: {', '.join(BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
