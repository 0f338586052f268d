"""The entropy of attention's probabilities, in tiles, against the dense reference's."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from andromeda.kernels import Geometry, Rotary, tiled
from andromeda.kernels.entropy import attention_entropy
from andromeda.kernels.reference import reference_attention

HEADS, DIM_HEAD, NO_LIMIT = 4, 8, 2**31 - 1
GEOMETRY = Geometry(
    slopes=torch.tensor([0.5, 0.0625, 0.0, 0.0], dtype=torch.float64),
    windows=torch.tensor([11, 40, NO_LIMIT, NO_LIMIT]),
    bounds=torch.tensor([8.0, 100.0, 8.0, 100.0]),
    rotary=Rotary(heads=2, pairs=DIM_HEAD // 2, xpos_scale=40.0),
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "QUERY_TILE", 16)
    monkeypatch.setattr(tiled, "KEY_CHUNK", 24)


def dense(q: Tensor, k: Tensor, geometry: Geometry) -> Tensor:
    """By probabilities, which are the outputs for values that are unit vectors."""
    keys = k.shape[1]
    unit = torch.eye(keys, dtype=q.dtype)[None, :, None].expand(len(k), keys, k.shape[2], keys)
    p = reference_attention(q, k, unit, geometry)
    return torch.special.entr(p).sum(-1)


def inputs(queries: int, keys: int, kv_heads: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries)
    q = 2 * torch.randn(2, queries, HEADS, DIM_HEAD, generator=generator, dtype=torch.float64)
    return q, torch.randn(2, keys, kv_heads, DIM_HEAD, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kv_heads", [1, HEADS])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (77, 77), (20, 131), (1, 50)])
def test_it_is_that_of_the_dense_probabilities(queries: int, keys: int, kv_heads: int) -> None:
    q, k = inputs(queries, keys, kv_heads)
    for geometry in (GEOMETRY, Geometry()):
        found = attention_entropy(q, k, geometry)
        assert found.shape == q.shape[:3]
        torch.testing.assert_close(found, dense(q, k, geometry), rtol=1e-9, atol=1e-9)


def test_a_document_sees_itself_alone() -> None:
    q, k = inputs(60, 60)
    starts = torch.where(torch.arange(60) < 50, 0, 50).expand(2, 60)
    geometry = replace(GEOMETRY, starts=starts)
    found = attention_entropy(q, k, geometry)
    torch.testing.assert_close(found, dense(q, k, geometry), rtol=1e-9, atol=1e-9)
    assert found[:, 50].abs().max() < 1e-9  # a document's first token sees one key


def test_equal_logits_look_at_all_keys_alike() -> None:
    q, k = inputs(40, 40)
    found = attention_entropy(0 * q, k, Geometry())
    torch.testing.assert_close(found, torch.arange(1, 41).log()[None, :, None].expand(2, 40, HEADS).double())


def test_logits_of_any_size_and_low_precision() -> None:
    q, k = inputs(40, 40)
    sharp = attention_entropy(1e6 * q, k, Geometry())
    assert torch.isfinite(sharp).all() and sharp.max() < 0.1
    low = attention_entropy(q.bfloat16(), k.bfloat16(), GEOMETRY)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), dense(q, k, GEOMETRY), rtol=0.05, atol=0.05)


def test_memory_does_not_grow_with_queries_times_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor inside is larger than a tile by a chunk of all heads."""
    sizes: list[int] = []
    original = torch.Tensor.exp

    def exp(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return original(x)

    monkeypatch.setattr(torch.Tensor, "exp", exp)
    q, k = inputs(300, 300)
    attention_entropy(q, k, Geometry())
    assert sizes and max(sizes) <= 2 * HEADS * 16 * 24
    assert math.prod(q.shape[:3]) * 300 > 20 * max(sizes)
