"""The token embedding: a gather, and a backward pass that is the same bit for bit each time.

`torch.nn.Embedding`'s backward on CUDA waits for the host to learn how many tokens differ. Here the tokens are sorted
by id, and each row of the gradient is one sum over its places, in their order and in float32: without atomics, without
the host, in static shapes (so that a CUDA graph can hold it). What a frequent token gets is summed in pieces, side by
side, and then over the pieces.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.kernels.launch import HAS_TRITON, on_device_of

PIECE = 128  # sorted places that make a piece of a long segment
GATHER_TILE = (4, 512)  # tokens, channels of a program
SUM_TILE = (8, 1024)
WARPS = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def embed(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of the table: ids (...) int64 or int32, weight (num_tokens, dim) -> (..., dim) in weight's dtype.

    On CUDA the gradient is repeatable bit for bit, and an id that is out of range gives NaN; elsewhere this is
    `F.embedding`, which raises IndexError.
    """
    if weight.is_cuda and HAS_TRITON and weight.dtype in DTYPES and ids.dtype in (torch.int32, torch.int64):
        return torch.ops.andromeda.embedding(ids, weight)
    return F.embedding(ids, weight)


@torch.library.custom_op("andromeda::embedding", mutates_args=())
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    from andromeda.kernels.embedding_kernels import gather_kernel

    ids, weight = ids.contiguous(), weight.contiguous()
    dim, (rows, columns) = weight.shape[1], _tile(GATHER_TILE, weight.shape[1])
    out = torch.empty(*ids.shape, dim, dtype=weight.dtype, device=weight.device)
    if out.numel() > 0:
        grid = (_blocks(ids.numel(), rows), _blocks(dim, columns))
        with on_device_of(weight):
            gather_kernel[grid](ids, weight, out, ids.numel(), len(weight), dim, rows, columns, num_warps=WARPS)
    return out


@torch.library.custom_op("andromeda::embedding_backward", mutates_args=())
def embedding_backward(grad: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    """grad (..., dim), ids (...) -> (num_tokens, dim): row v is the sum of grad where ids == v."""
    from andromeda.kernels.embedding_kernels import piece_kernel, segment_kernel

    dim, tokens = grad.shape[-1], ids.numel()
    if grad.numel() == 0:
        return grad.new_zeros(num_tokens, dim)
    grad = grad.contiguous()
    in_order, order = torch.sort(ids.flatten().to(torch.int32), stable=True)
    rows = torch.arange(num_tokens + 1, dtype=torch.int32, device=ids.device)
    starts = torch.searchsorted(in_order, rows, out_int32=True)  # (num_tokens + 1,)
    pieces = torch.empty(tokens // PIECE, dim, dtype=torch.float32, device=grad.device)
    out = torch.empty(num_tokens, dim, dtype=grad.dtype, device=grad.device)
    tile, columns = SUM_TILE[0], _tile(SUM_TILE, dim)[1]
    across = _blocks(dim, columns)
    with on_device_of(grad):
        if len(pieces) > 0:
            piece_kernel[(len(pieces), across)](
                in_order, order, grad, pieces, dim, PIECE, tile, columns, num_warps=WARPS
            )
        segment_kernel[(num_tokens, across)](
            starts, order, grad, pieces, out, dim, PIECE, tile, columns, num_warps=WARPS
        )
    return out


@embedding.register_fake
def _(ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


@embedding_backward.register_fake
def _(grad: Tensor, _ids: Tensor, num_tokens: int) -> Tensor:
    return grad.new_empty(num_tokens, grad.shape[-1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001 (called by name)
    ids, weight = inputs
    ctx.save_for_backward(ids)
    ctx.num_tokens = weight.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
    if not ctx.needs_input_grad[1]:
        return None, None
    return None, torch.ops.andromeda.embedding_backward(grad, ctx.saved_tensors[0], ctx.num_tokens)


embedding.register_autograd(_backward, setup_context=_save)


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _tile(tile: tuple[int, int], dim: int) -> tuple[int, int]:
    """No more channels than there are, in powers of two."""
    return tile[0], min(tile[1], 1 << (dim - 1).bit_length())
