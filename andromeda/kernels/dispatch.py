"""The one place that picks how attention is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from andromeda.kernels.cpu.attention import cpu_attention, takes
from andromeda.kernels.gathered import PageLayout, gathered_attention
from andromeda.kernels.geometry import Geometry, check_shapes
from andromeda.kernels.launch import HAS_TRITON
from andromeda.kernels.norm import QKNorm
from andromeda.kernels.paged import MAX_NEW, MAX_UNITS, as_pages, check_paged, whole_buffer
from andromeda.kernels.reference import reference_attention
from andromeda.kernels.rotation import MAX_DECAY_EXPONENT, longest_span, xpos_chunk
from andromeda.kernels.short import is_short, short_attention
from andromeda.kernels.tiled import tiled_attention

FLASH_DIMS = (32, 64, 128)
FLASH_DTYPES = (torch.bfloat16, torch.float16)


def _flash(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
    from andromeda.kernels.flash import flash_attention  # Triton is imported only when used

    return flash_attention(q, k, v, geometry)


def _decode(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
    from andromeda.kernels.decode import decode_attention

    if _learns(q, k, v):
        raise ValueError("attention: the decode kernel has no gradient; run it under torch.no_grad()")
    buffers = [whole_buffer(x) for x in (k, v)]
    if buffers[0] is None or buffers[1] is None:
        raise ValueError("attention: the decode kernel reads keys and values in whole pages; see kernels.paged")
    (k_pages, table), (v_pages, _) = as_pages(buffers[0]), as_pages(buffers[1])
    lengths = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=k.device)
    return decode_attention(q, k_pages, v_pages, table, lengths, geometry)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Geometry], Tensor]] = {
    "reference": reference_attention,
    "short": short_attention,
    "tiled": tiled_attention,
    "triton": _flash,
    "decode": _decode,
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
    return BACKENDS[_choose(q, k, v, geometry, flash)](q, k, v, geometry)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor | Sequence[int],
    geometry: Geometry, *, layout: PageLayout | None = None,
) -> Tensor:  # fmt: skip
    """Each row's new tokens over its own keys in a paged cache, as `decode_reference` defines it. Inference only.

    Args:
        q: (B, N, heads, dim_head), 1 <= N <= 16; normalised and scaled, not rotated. Queries of row b stand at
            positions lengths[b] - N .. lengths[b] - 1; those before position 0 (padding) give zeros.
        k_pages, v_pages: (pages, page_size, kv_heads, dim_head) in q's dtype, keys not rotated, those of the new tokens
            included. What lies beyond a row's length is never used.
        page_table: (B, max_pages) int32: token j of row b is in page page_table[b, j // page_size].
        lengths: (B,) int32, at most max_pages * page_size; as integers on the host, nothing waits for the device.
        geometry: `starts` must be None; with `bounds` it is faster.
        layout: of this page table and these lengths: what blocks of a model can share is then worked out once.

    Returns:
        (B, N, heads, dim_head) in q's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or inputs that want a gradient.
    """
    layout = layout or PageLayout(page_table, lengths, k_pages.shape[1])
    shapes = (q.shape, q.dtype, k_pages.shape, k_pages.dtype, v_pages.shape, v_pages.dtype, geometry.rotary)
    if layout.checked != shapes:
        _check_paged(q, k_pages, v_pages, layout, geometry)
        layout.checked = shapes
    kernels = has_kernels_for(q.device, q.dtype, q.shape[3], geometry)
    if kernels and q.shape[1] <= longest_span(geometry.rotary) and q.shape[0] * k_pages.shape[2] <= MAX_UNITS:
        from andromeda.kernels.decode import decode_attention

        return decode_attention(q, k_pages, v_pages, page_table, layout.lengths, geometry)
    if takes(q.dtype, q.device, q.shape[3], q.shape[1], geometry.rotary):
        return cpu_attention(q, k_pages, v_pages, layout, geometry)
    return gathered_attention(q, k_pages, v_pages, layout, geometry)


def _check_paged(q: Tensor, k_pages: Tensor, v_pages: Tensor, layout: PageLayout, geometry: Geometry) -> None:
    check_paged(q, k_pages, v_pages, layout.page_table, layout.lengths, geometry)
    if not 1 <= q.shape[1] <= MAX_NEW or k_pages.dtype != q.dtype or v_pages.dtype != q.dtype:
        raise ValueError(
            f"attention: 1 to {MAX_NEW} new tokens a row, and pages of their type; "
            f"got {q.shape[1]}, and {q.dtype}, {k_pages.dtype}, {v_pages.dtype}"
        )
    if _learns(q, k_pages, v_pages):
        raise ValueError("attention: over a paged cache it has no gradient; run it under torch.no_grad()")


def normalised_attention(
    q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, norm: QKNorm, *, flash: bool = True
) -> Tensor:
    """`attention` over norm(q, k), of as many queries as keys; the Triton path normalises and rotates in one pass.

    Arguments and errors as of `attention`, but q and k neither normalised nor scaled.
    """
    if q.shape[1] == k.shape[1] and _choose(q, k, v, geometry, flash) == "triton":
        return _fused(q, k, v, geometry, norm)
    return attention(*norm(q, k), v, geometry, flash=flash)


def _fused(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, norm: QKNorm) -> Tensor:
    from andromeda.kernels.flash import LOG2_E, prepared_attention
    from andromeda.kernels.prepare import prepare

    q, keys = prepare(q, k, geometry.rotary, replace(norm, scale=norm.scale * LOG2_E))
    return prepared_attention(q, keys, v, geometry)


def _choose(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, flash: bool) -> str:
    check_shapes(q, k, v, geometry)
    return _forced or choose_backend(
        q.device, q.dtype, q.shape[3], k.shape[1], geometry, flash=flash, step=_is_decode_step(q, k, v, geometry)
    )


def choose_backend(
    device: torch.device, dtype: torch.dtype, dim_head: int, keys: int, geometry: Geometry, *, flash: bool = True,
    step: bool = False,
) -> str:  # fmt: skip
    """The name in BACKENDS of what computes attention over so many keys of such a type; `step`: a few new tokens do."""
    if not flash:
        return "reference"
    if has_kernels_for(device, dtype, dim_head, geometry):
        return "decode" if step else "triton"
    return "short" if is_short(keys, geometry) else "tiled"


def has_kernels_for(device: torch.device, dtype: torch.dtype, dim_head: int, geometry: Geometry) -> bool:
    """Whether Triton computes attention there."""
    return has_flash_kernels(device) and dtype in FLASH_DTYPES and dim_head in FLASH_DIMS and _decays_gently(geometry)


def has_flash_kernels(device: torch.device) -> bool:
    """Whether Triton is there, and a GPU that it serves (compute capability 8 or more)."""
    return device.type == "cuda" and HAS_TRITON and torch.cuda.get_device_capability(device) >= (8, 0)


# What torch.compiler.assume_constant_result does, which would import the compiler. It works on plain functions alone:
# Dynamo looks through functools.cache and traces what is inside.
has_flash_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _decays_gently(geometry: Geometry) -> bool:
    """Whether stored queries and keys, decayed by up to half a chunk, stay in float16's range."""
    rotary = geometry.rotary
    return rotary is None or rotary.steepest_decay * xpos_chunk(rotary) / 2 <= MAX_DECAY_EXPONENT


def _is_decode_step(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> bool:
    """Whether a few new tokens follow a cache in whole pages, for which no gradient is wanted."""
    few = q.shape[1] < k.shape[1] and q.shape[1] <= min(MAX_NEW, longest_span(geometry.rotary))
    if not few or _learns(q, k, v) or geometry.starts is not None or q.shape[0] * k.shape[2] > MAX_UNITS:
        return False
    if torch.compiler.is_compiling():  # which cannot trace a look at the storage
        return False
    return whole_buffer(k) is not None and whole_buffer(v) is not None


def _learns(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


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
