"""The way into a feed-forward in e4m3, as one kernel: product, squared ReLU, and rounding to e4m3 again.

What goes in has a certain bound, and with it what comes out; so a scale is known before the product, nothing is
measured, and the numbers between, twice as wide, never go to memory.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from andromeda.kernels.flash import INTERPRETED
from andromeda.kernels.flash_forward import dot
from andromeda.kernels.launch import on_device_of, written

ROWS, COLUMNS, DEPTH = (16, 32, 32) if INTERPRETED else (128, 256, 128)  # of a tile, and of a step towards it
BAND = 8  # tiles of rows that share what they read of b


@triton.jit
def _squared_relu_kernel(
    a_desc, b_desc, out_desc, rows, columns, depth, scale,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Grid: programs that take tiles in turns; what the next one multiplies is asked for while a tile is written."""
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        first = tile // (BAND * column_tiles) * BAND
        height = min(row_tiles - first, BAND)
        place = tile % (BAND * column_tiles)
        i, j = (first + place % height) * ROWS, place // height * COLUMNS
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):
            acc = dot(a_desc.load([i, k]), b_desc.load([j, k]).T, acc, WIDEN)
        acc = tl.maximum(acc, 0.0)
        out_desc.store([i, j], (acc * acc * scale).to(out_desc.dtype))


def squared_relu_product(a: Tensor, b: Tensor, out: Tensor, scale: float) -> None:
    """out = relu(a @ b.T)^2 * scale, rounded to e4m3; what is above its range becomes its largest number.

    Args:
        a: (rows, depth), b: (columns, depth), out: (rows, columns), all float8_e4m3fn; rows, which may lie apart, begin
            at multiples of 16 bytes.
    """
    (rows, depth), columns = a.shape, b.shape[0]
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS)
    with on_device_of(a), written(out) as target:
        assert target is not None
        _squared_relu_kernel[(min(tiles, _programs(a.device)),)](
            _descriptor(a, ROWS, DEPTH), _descriptor(b, COLUMNS, DEPTH), _descriptor(target, ROWS, COLUMNS),
            rows, columns, depth, scale,
            WIDEN=INTERPRETED, ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, BAND=BAND, num_warps=8, num_stages=3,
        )  # fmt: skip


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


@cache
def has_squared_relu_product(device: torch.device) -> bool:
    """Whether it runs there: a GPU whose copy engine and products take e4m3 tiles (Hopper), or the interpreter."""
    return INTERPRETED or (device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9)


@cache
def _programs(device: torch.device) -> int:
    """One a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
