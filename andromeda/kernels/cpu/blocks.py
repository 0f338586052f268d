"""All blocks of a step in which texts are written, in one call of blocks.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from andromeda.kernels.cpu.attention import heads_of
from andromeda.kernels.cpu.library import library
from andromeda.kernels.cpu.linear import in_panels
from andromeda.kernels.cpu.structures import Block, Model, Rows, Step, pages_of
from andromeda.kernels.geometry import Rotary

ACTIVATIONS = ("relu2", "gelu", "silu")  # by their numbers in blocks.cpp


@dataclass(frozen=True)
class Shape:
    """What all blocks have in common.

    Attributes:
        alpha: DeepNorm's; None: norms stand before the sub-layers.
        normalises: whether queries and keys are given length 1.
    """

    dim: int
    inner: int
    heads: int
    kv_heads: int
    dim_head: int
    activation: str
    shift_tokens: int
    alpha: float | None
    eps: float
    normalises: bool
    rotary: Rotary | None


@dataclass(frozen=True)
class OfBlock:
    """One block's weights and what it keeps of texts.

    Attributes:
        way_in: (F + (H + 2 K) D, dim). way_out: (dim, F + H D). factor: (H + K, D), gains and temperature.
        norm: (dim,). slopes: (H,) float32. windows: (H,) int64.
        keys, values: (pages, page_size, K, D). shifts: (pages, shift_tokens, dim), or None.
    """

    way_in: Tensor
    way_out: Tensor
    factor: Tensor
    norm: Tensor
    slopes: Tensor
    windows: Tensor
    keys: Tensor
    values: Tensor
    shifts: Tensor | None


@dataclass(frozen=True)
class StepRows:
    """The rows of a step on the host, R rows and T tokens of them all, laid flat; each tensor in one piece.

    Attributes:
        firsts, counts, lengths: (R,) int32: a row's first token, how many it has, and of its text with these.
        table: (R, width) int32, the pages of texts.
        positions, cells: (T,) int64, in texts, and in the cache, counted in tokens of all pages.
        before: (R,) int64, the pages that hold the shift states before rows; None without token shift.
        drafted: those rows' numbers whose ends are not known before the draw.
    """

    firsts: Tensor
    counts: Tensor
    lengths: Tensor
    table: Tensor
    positions: Tensor
    cells: Tensor
    before: Tensor | None
    drafted: range


class Blocks:
    """The blocks of one model over one cache; their weights are held a second time, in panels."""

    def __init__(self, shape: Shape, blocks: Sequence[OfBlock]) -> None:
        kernels = library()
        assert kernels is not None
        self._call, self.shape = kernels.andromeda_blocks, shape
        self._held = [(block, in_panels(block.way_in), in_panels(block.way_out)) for block in blocks]
        self._blocks = (Block * len(blocks))(*(_structure(*held) for held in self._held))

    def __call__(self, x: Tensor, rows: StepRows, q_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the blocks make of the tokens, (T, dim); and for rows that are drafted what shift states are made of.

        Args:
            x: (T, dim).
            q_scale: (T, H), factors of the queries.

        Returns:
            (T, dim); and (depth, k, dim), the states before the drafted rows, then their tokens, or None.
        """
        shape, depth = self.shape, len(self._held)
        x = x.clone(memory_format=torch.contiguous_format)
        q_scale = None if q_scale is None else q_scale.float().contiguous()
        kept = None
        if rows.drafted and shape.shift_tokens:
            tokens = sum(rows.counts[rows.drafted.start : rows.drafted.stop].tolist())
            kept = torch.empty(depth, len(rows.drafted) * shape.shift_tokens + tokens, shape.dim)
        longest = int(rows.lengths.max())
        model = Model(
            depth, shape.dim, shape.inner, ACTIVATIONS.index(shape.activation), shape.shift_tokens,
            shape.alpha is not None, shape.normalises, shape.alpha or 1.0, shape.eps,
            heads_of(shape.heads, shape.kv_heads, shape.dim_head, shape.rotary, longest),
            ctypes.addressof(self._blocks),
        )  # fmt: skip
        step = Step(
            Rows(
                len(rows.firsts), len(x), rows.firsts.data_ptr(), rows.counts.data_ptr(), rows.lengths.data_ptr(),
                rows.table.data_ptr(), rows.table.shape[1],
            ),
            rows.positions.data_ptr(), rows.cells.data_ptr(), None if q_scale is None else q_scale.data_ptr(),
            None if rows.before is None else rows.before.data_ptr(), len(rows.drafted), rows.drafted.start,
            None if kept is None else kept.data_ptr(), x.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        self._call(ctypes.byref(model), ctypes.byref(step))
        return x, kept


def _structure(block: OfBlock, way_in: Tensor, way_out: Tensor) -> Block:
    return Block(
        way_in.data_ptr(), way_out.data_ptr(), block.factor.data_ptr(), block.norm.data_ptr(),
        None if block.shifts is None else block.shifts.data_ptr(), block.slopes.data_ptr(), block.windows.data_ptr(),
        pages_of(block.keys, block.values),
    )  # fmt: skip
