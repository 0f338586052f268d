"""The peers' masks, and what the operations of a row are counted to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from andromeda.benchmarks import attention
from andromeda.kernels import Geometry
from andromeda.kernels.reference import reference_attention
from andromeda.positions import NO_WINDOW


@pytest.mark.parametrize("tokens", [1, 16, 47, 96, 113])
@pytest.mark.parametrize("windows", [[NO_WINDOW], [1, 15, 16, 17, 33, NO_WINDOW]])
def test_the_block_mask_is_that_of_every_pair(tokens: int, windows: list[int]) -> None:
    limits = torch.tensor(windows)

    def seen(_b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & (i - j < limits[h])

    fast = attention.block_mask(tokens, limits, size=16)
    slow = create_block_mask(seen, 1, len(windows), tokens, tokens, device="cpu", BLOCK_SIZE=16)
    assert fast.seq_lengths == slow.seq_lengths
    for mine, other in (
        (listed(fast.kv_num_blocks, fast.kv_indices), listed(slow.kv_num_blocks, slow.kv_indices)),
        (listed(fast.full_kv_num_blocks, fast.full_kv_indices), listed(slow.full_kv_num_blocks, slow.full_kv_indices)),
        (listed(fast.q_num_blocks, fast.q_indices), listed(slow.q_num_blocks, slow.q_indices)),
        (listed(fast.full_q_num_blocks, fast.full_q_indices), listed(slow.full_q_num_blocks, slow.full_q_indices)),
    ):
        assert mine == other


def listed(counts: Any, indices: Any) -> list[set[int]]:
    """The blocks of each row."""
    rows = zip(counts.flatten().tolist(), indices.flatten(0, -2).tolist(), strict=True)
    return [set(row[:count]) for count, row in rows]


@pytest.mark.parametrize("windowed", [False, True])
def test_flex_attention_computes_what_it_is_compared_for(windowed: bool) -> None:
    torch.manual_seed(0)
    slopes, windows = torch.tensor([0.5, 0.1, 0.0]), torch.tensor([20, 130, NO_WINDOW])
    g = Geometry(slopes=slopes, windows=windows)
    q, k, v = attention.inputs(200, 3, 4.0, 16)
    found = attention.flex(200, g, windowed)(*(x.transpose(1, 2) for x in (q, k, v)))
    exact = reference_attention(q, k, v, g if windowed else Geometry(slopes=slopes))
    assert (found.transpose(1, 2) - exact).abs().max() < 1e-5


def test_operations_are_those_of_the_pairs_that_are_seen() -> None:
    windows = torch.tensor([3, 10, NO_WINDOW])
    i, j = torch.arange(7)[:, None], torch.arange(7)
    pairs = sum(int(((i >= j) & (i - j < window)).sum()) for window in windows.tolist())
    assert attention.flops(7, Geometry(windows=windows)) == 4 * attention.D * pairs


def test_a_line_has_its_share_of_the_ceiling() -> None:
    row = {"name": "x", "tokens": 8192, "flops": 1e12, "forward": 2.0, "both": 14.0}
    assert " ".join(attention.line(row, 1e15).split()) == (
        "8,192 x forward 2.000 ms 500 TFLOP/s 50% of products both 14.000 ms 250 TFLOP/s 25% of products"
    )
    row = {"name": "x", "tokens": 9, "flops": 1.0, "problem": "no"}
    assert " ".join(attention.line(row, 1.0).split()) == "9 x no"
