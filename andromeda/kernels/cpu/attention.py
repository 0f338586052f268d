"""Attention of a few new tokens over a paged cache, by attention.cpp: the function of `decode_reference`."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from andromeda.kernels.cpu.library import library
from andromeda.kernels.cpu.structures import Heads, N, P, Rows, Turns, pages_of
from andromeda.kernels.gathered import EVERYTHING, SMALLEST_DECAY, PageLayout
from andromeda.kernels.geometry import Geometry, Rotary
from andromeda.kernels.paged import MAX_NEW
from andromeda.kernels.rotation import longest_span

TILE = 64  # as in kernels.h
WIDTH = 8  # channels of a vector there


def takes(dtype: torch.dtype, device: torch.device, dim_head: int, new_tokens: int, rotary: Rotary | None) -> bool:
    """Whether the kernel is for so many new tokens a row of such a type, and the machine has it."""
    fits = dim_head % WIDTH == 0 and new_tokens <= min(MAX_NEW, longest_span(rotary))
    return fits and dtype == torch.float32 and device.type == "cpu" and library() is not None


def cpu_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, layout: PageLayout, geometry: Geometry) -> Tensor:
    """As `paged_attention` says, of inputs that fit, and that the kernel `takes`."""
    kernels = library()
    assert kernels is not None
    q = q.contiguous()
    if k_pages.stride() != v_pages.stride() or k_pages.stride(3) != 1:
        k_pages, v_pages = k_pages.contiguous(), v_pages.contiguous()
    rows, new, heads, dim_head = q.shape
    out = torch.empty_like(q)
    firsts, counts = _even_rows(rows, new)
    rows_of = Rows(
        rows, rows * new, firsts.data_ptr(), counts.data_ptr(), layout.lengths.data_ptr(),
        layout.page_table.data_ptr(), layout.page_table.stride(0),
    )  # fmt: skip
    all_heads = heads_of(heads, k_pages.shape[2], dim_head, geometry.rotary, layout.longest)
    slopes, windows = slopes_of(geometry, heads), windows_of(geometry, heads)
    kernels.andromeda_attention(
        ctypes.byref(rows_of), ctypes.byref(all_heads), ctypes.byref(pages_of(k_pages, v_pages)),
        P(slopes.data_ptr()), P(windows.data_ptr()), P(q.data_ptr()), P(out.data_ptr()), N(torch.get_num_threads()),
    )  # fmt: skip
    return out


def heads_of(heads: int, kv_heads: int, dim_head: int, rotary: Rotary | None, longest: int) -> Heads:
    """For texts of up to `longest` tokens."""
    if rotary is None:
        return Heads(heads, kv_heads, dim_head, 0)
    tiles = 1 << max(4, (-(-longest // TILE) - 1).bit_length())  # a power of two: growing texts need few tables
    tables = [table.data_ptr() for table in _turns(rotary, tiles)]
    return Heads(heads, kv_heads, dim_head, rotary.heads, *(Turns(*tables[i : i + 2]) for i in (0, 2, 4)))


def slopes_of(geometry: Geometry, heads: int) -> Tensor:
    """(heads,) float32, 0 where there is none."""
    return _no_slopes(heads) if geometry.slopes is None else geometry.slopes.float().contiguous()


def windows_of(geometry: Geometry, heads: int) -> Tensor:
    """(heads,) int64."""
    return _no_windows(heads) if geometry.windows is None else geometry.windows.long().contiguous()


@functools.cache
def _no_slopes(heads: int) -> Tensor:
    return torch.zeros(heads)


@functools.cache
def _no_windows(heads: int) -> Tensor:
    return torch.full((heads,), EVERYTHING, dtype=torch.int64)


@functools.lru_cache(maxsize=64)
def _even_rows(rows: int, new: int) -> tuple[Tensor, Tensor]:
    """First token, and count of tokens, of each row."""
    return torch.arange(0, rows * new, new, dtype=torch.int32), torch.full((rows,), new, dtype=torch.int32)


@functools.cache  # never dropped, for what is made of them holds their addresses
def _turns(rotary: Rotary, tiles: int) -> list[Tensor]:
    """Cosines and sines, decay included, (entries, pairs) each: of keys, of tiles and of queries, as kernels.h says."""
    of_keys, of_tiles, of_queries = torch.arange(TILE), TILE * torch.arange(tiles), torch.arange(MAX_NEW)
    tables: list[Tensor] = []
    for turned, decayed in ((-of_keys, of_keys), (of_tiles, of_tiles), (-of_queries, -of_queries)):  # tokens
        angle = rotary.rates() * turned[:, None]
        decay = torch.exp(rotary.log_decay() * decayed[:, None])
        tables += [_without_denormals(decay * angle.cos()), _without_denormals(decay * angle.sin())]
    return tables


def _without_denormals(table: Tensor) -> Tensor:
    return table.masked_fill(table.abs() < SMALLEST_DECAY, 0.0).float()
