"""Attention of a few new tokens over a paged cache, in plain PyTorch: what decode.py must equal. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from andromeda.kernels.geometry import Geometry
from andromeda.kernels.reference import reference_attention

MIN_PAGE = 16  # tokens
DEFAULT_PAGE = 64
MAX_NEW = 16  # tokens a sequence that decode.py takes
MAX_UNITS = 4096  # sequences times kv heads that it takes: every program holds their lengths


def as_pages(cache: Tensor, page_size: int = DEFAULT_PAGE) -> tuple[Tensor, Tensor]:
    """A cache in one piece, seen as pages; nothing is copied.

    Args:
        cache: (B, capacity, kv_heads, dim_head) keys or values; page_size divides capacity.

    Returns:
        (B * pages, page_size, kv_heads, dim_head), a view, and the page table (B, pages) int32.

    Raises:
        ValueError: it cannot be seen so without a copy.
    """
    if cache.dim() != 4 or cache.shape[1] % page_size:
        raise ValueError(
            f"as_pages: the cache must be (B, capacity, kv_heads, dim_head), capacity a multiple of {page_size}; "
            f"got {tuple(cache.shape)}"
        )
    batch, pages = cache.shape[0], cache.shape[1] // page_size
    try:
        paged = cache.view(batch * pages, page_size, *cache.shape[2:])
    except RuntimeError:
        raise ValueError(
            f"as_pages: rows must lie back to back in memory; got {tuple(cache.shape)} with strides {cache.stride()}"
        ) from None
    return paged, torch.arange(batch * pages, dtype=torch.int32, device=cache.device).view(batch, pages)


def whole_buffer(held: Tensor, page_size: int = DEFAULT_PAGE) -> Tensor | None:
    """The buffer (B, capacity, kv_heads, dim_head) whose first tokens `held` (B, S, kv_heads, dim_head) views.

    None where it is not one in whole pages, or in one piece.
    """
    batch, tokens, kv_heads, dim_head = held.shape
    row, token = held.stride()[:2]
    capacity = row // token if token else 0
    in_one_piece = held.stride()[1:] == (kv_heads * dim_head, dim_head, 1) and row == capacity * token
    end = held.storage_offset() + batch * row
    if not in_one_piece or capacity % page_size or capacity < tokens:
        return None
    if end * held.element_size() > held.untyped_storage().nbytes():
        return None
    return held.as_strided((batch, capacity, kv_heads, dim_head), held.stride())


def decode_reference(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, geometry: Geometry
) -> Tensor:
    """The function of `decode_attention`: `reference_attention` of each row over its own keys."""
    out = torch.zeros_like(q)
    for row, length in enumerate(lengths.tolist()):
        new = min(q.shape[1], length)  # queries before the first position see nothing: zeros
        if new:
            k, v = (gather_pages(pages, page_table[row], length)[None] for pages in (k_pages, v_pages))
            out[row, -new:] = reference_attention(q[row : row + 1, -new:], k, v, geometry)[0]
    return out


def gather_pages(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """(length, kv_heads, dim_head): a sequence's keys or values in one piece, given its row of the page table."""
    used = table[: -(-length // pages.shape[1])].long()
    return pages[used].flatten(0, 1)[:length]


def check_paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, geometry: Geometry
) -> None:
    """Raises ValueError where the inputs of `decode_attention` do not fit together. Reads no values."""
    shapes = ", ".join(str(tuple(x.shape)) for x in (q, k_pages, v_pages, page_table, lengths))
    if q.dim() != 4 or k_pages.dim() != 4 or k_pages.shape != v_pages.shape:
        raise ValueError(f"decode: q and pages must have 4 dimensions, keys' pages like values'; got {shapes}")
    batch, _, heads, dim_head = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    if k_pages.shape[3] != dim_head or heads % kv_heads:
        raise ValueError(f"decode: dim_head must agree, and the kv heads divide the heads; got {shapes}")
    if page_size < MIN_PAGE or page_size & (page_size - 1):
        raise ValueError(f"decode: a page must hold a power of two of tokens, {MIN_PAGE} or more; got {page_size}")
    if page_table.dim() != 2 or page_table.shape[0] != batch or lengths.shape != (batch,):
        raise ValueError(f"decode: the page table must be ({batch}, pages) and lengths ({batch},); got {shapes}")
    if page_table.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise ValueError(f"decode: page table and lengths must be int32; got {page_table.dtype}, {lengths.dtype}")
    if geometry.starts is not None:
        raise ValueError("decode: a sequence of the cache is one document; geometry.starts must be None")
    for name in ("slopes", "windows"):
        value = getattr(geometry, name)
        if value is not None and value.shape != (heads,):
            raise ValueError(f"decode: {name} must be ({heads},), one a query head; got {tuple(value.shape)}")
    rotary = geometry.rotary
    if rotary is not None and (rotary.pairs * 2 != dim_head or rotary.heads > heads):
        raise ValueError(f"decode: {rotary} does not fit {heads} heads of {dim_head} channels")
    devices = {
        x.device for x in (q, k_pages, v_pages, page_table, lengths, geometry.slopes, geometry.windows) if x is not None
    }
    if len(devices) > 1:
        raise ValueError(f"decode: all tensors must be on one device; got {sorted(map(str, devices))}")
