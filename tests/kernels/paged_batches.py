"""Batches of a paged cache in which all that no row holds is NaN, and the flags of attention in small."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from andromeda.kernels import Geometry, Rotary
from andromeda.kernels.paged import decode_reference

NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Case:
    """The default model's flags, in small; the tests flip them."""

    heads: int = 4
    kv_heads: int = 1
    rotated_heads: int = 2
    xpos_scale: float | None = 40.0
    interpolation: float = 1.0
    alibi_heads: int = 2
    windowed: bool = True
    bound: float | None = None  # of the logits; queries have the norm sqrt(dim_head)
    local_heads: int | None = None

    def geometry(self, device: str = "cpu") -> Geometry:
        slopes = torch.tensor([0.5, 0.0625, 0.25, 0.125, *[0.05] * 20][: self.alibi_heads] + [0.0] * self.heads)[
            : self.heads
        ]
        windows = torch.tensor([11, 70, 35, 50, *[60] * 20][: self.alibi_heads] + [NO_LIMIT] * self.heads)[: self.heads]
        return Geometry(
            slopes=slopes.to(device) if self.alibi_heads else None,
            windows=windows.to(device) if self.windowed else None,
            bounds=None if self.bound is None else torch.full((self.heads,), self.bound, device=device).double(),
            rotary=None,
            local_heads=self.local_heads,
        )

    def with_rotary(self, dim_head: int, device: str = "cpu") -> Geometry:
        rotary = Rotary(self.rotated_heads, dim_head // 2, 10000.0, self.interpolation, self.xpos_scale)
        return replace(self.geometry(device), rotary=rotary if self.rotated_heads else None)


CASES = {
    "default": Case(),
    "multi_head": Case(kv_heads=4),
    "grouped": Case(kv_heads=2),
    "grouped_across_the_sets": Case(heads=6, kv_heads=2, rotated_heads=4, alibi_heads=4),
    "no_rotary": Case(rotated_heads=0),
    "no_rotary_local_heads_known": Case(rotated_heads=0, local_heads=2),
    "rotary_all": Case(rotated_heads=4),
    "rotary_all_local_heads_known": Case(rotated_heads=4, local_heads=2, kv_heads=2),
    "no_xpos": Case(xpos_scale=None),
    "steep_xpos": Case(xpos_scale=0.5),
    "interpolated": Case(interpolation=4.0, rotated_heads=4),
    "no_alibi": Case(alibi_heads=0, windowed=False),
    "alibi_all": Case(alibi_heads=4),
    "no_windows": Case(windowed=False),
    "no_positions": Case(rotated_heads=0, alibi_heads=0, windowed=False),
    "bounded": Case(bound=5.7),
    "bounded_grouped": Case(kv_heads=2, rotated_heads=4, bound=5.7),
    "bounded_no_windows": Case(windowed=False, bound=5.7),
}


class Batch(NamedTuple):
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    lengths: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(self.q.to(dtype), self.k_pages.to(dtype), self.v_pages.to(dtype), self.page_table, self.lengths)


def batch_of(
    lengths: list[int], new: int, case: Case, dtype: torch.dtype, dim_head: int = 32, page_size: int = 16,
    spare: int = 1, device: str = "cpu", in_runs: bool = False,
) -> Batch:  # fmt: skip
    """Rows of a cache whose pages lie in any order, or one behind the other; whatever no row holds is NaN."""
    generator = torch.Generator().manual_seed(sum(lengths) + new)
    width = max(-(-length // page_size) for length in lengths) + spare
    pages = len(lengths) * width
    table = torch.arange(pages) if in_runs else torch.randperm(pages, generator=generator)
    table = table.view(len(lengths), width).int()
    k, v = torch.full((2, pages, page_size, case.kv_heads, dim_head), math.nan, dtype=dtype, device=device)
    for row, length in enumerate(lengths):
        j = torch.arange(length)
        where = table[row, j // page_size].long(), j % page_size
        new_k, new_v = torch.randn(2, length, case.kv_heads, dim_head, generator=generator)
        k[where] = torch.nn.functional.normalize(new_k, dim=-1).to(device, dtype)
        v[where] = new_v.to(device, dtype)
    q = torch.randn(len(lengths), new, case.heads, dim_head, generator=generator)
    q = math.sqrt(dim_head) * torch.nn.functional.normalize(q, dim=-1)
    return Batch(q.to(device, dtype), k, v, table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device))


def assert_equal(out: Tensor, batch: Batch, geometry: Geometry, tolerance: float = 1e-5) -> None:
    exact = decode_reference(*batch.to(torch.float64), geometry)
    assert out.shape == batch.q.shape and out.dtype == batch.q.dtype
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


def assert_strides_do_not_matter(attend: Callable[[Batch, Geometry], Tensor]) -> None:
    """Inputs need not be contiguous, and are left alone."""
    case = CASES["grouped"]
    batch, geometry = batch_of([60, 33], 2, case, torch.float32, spare=0), case.with_rotary(32)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (batch.q, batch.k_pages, batch.v_pages)]
    backwards = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (batch.q, batch.k_pages, batch.v_pages)]
    expected = attend(batch, geometry)
    for q, k, v in (strided, backwards):
        before = [x.clone() for x in (q, k, v)]
        assert torch.equal(attend(Batch(q, k, v, batch.page_table, batch.lengths), geometry), expected)
        for x, was in zip((q, k, v), before, strict=True):
            torch.testing.assert_close(x, was, rtol=0, atol=0, equal_nan=True)
