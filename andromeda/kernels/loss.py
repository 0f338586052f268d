"""The loss head: cross-entropy of hidden states against a vocabulary, without the (N, V) logits.

`chunked_cross_entropy` is plain PyTorch: a chunk of tokens at a time, computed again for the backward pass. On CUDA
`fused_cross_entropy` does the same with cuBLAS products and two kernels between them, which read a chunk's logits once
for the losses and turn them into their gradient in place, for any gradient of the single losses: exact for weighted
tokens. Of liger-kernel and cut-cross-entropy neither serves; docs/decisions.md has the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from andromeda.kernels.launch import HAS_TRITON, on_device_of

LOSS_CHUNK = 2**26  # logits held at once in plain PyTorch: 256 MiB in float32
SHARE = 64  # on CUDA a chunk's logits take one part in so many of the device's memory
ROW_MULTIPLE = 128  # tokens: a tile of the matrix product
BLOCK = 4096  # logits of a row that a program reads at once
WARPS = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """Cross-entropy in nats of each target under the logits hidden @ weight.T: (N,), 0 where it is ignored.

    Float32, or float64 of float64. The logits are rounded to hidden's dtype, as those of `F.linear`, and never held for
    all tokens.

    Args:
        hidden: (N, dim).
        weight: (V, dim).
        targets: (N,) int64, each below V or ignore_index. Another one raises IndexError on CPU, and is NaN on CUDA.
        smoothing: share of the target's probability that goes to all V alike (Szegedy et al. 2016).
        z_loss: times the square of the log-sum-exp, added (PaLM, section 5).

    Raises:
        ValueError: shapes that do not fit together.
    """
    if hidden.dim() != 2 or weight.shape[1:] != hidden.shape[1:] or targets.shape != hidden.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, targets))
        raise ValueError(f"loss: hidden (N, dim), weight (V, dim) and targets (N,) do not fit together: {shapes}")
    if hidden.is_cuda and HAS_TRITON and _product_dtype(hidden) in DTYPES:
        return fused_cross_entropy(hidden, weight, targets, ignore_index, smoothing, z_loss)
    return chunked_cross_entropy(hidden, weight, targets, ignore_index, smoothing, z_loss)


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """`linear_cross_entropy` in plain PyTorch, on any device."""
    rows = max(1, LOSS_CHUNK // len(weight))
    if len(hidden) <= rows:
        return _cross_entropy(hidden, weight, targets, ignore_index, smoothing, z_loss)
    losses = [
        checkpoint(_cross_entropy, part, weight, goals, ignore_index, smoothing, z_loss, use_reentrant=False)
        for part, goals in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(losses)


def _cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, smoothing: float, z_loss: float
) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype is torch.float64 else logits.float()
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=ignore_index, label_smoothing=smoothing)
    if z_loss == 0:
        return losses
    return losses + z_loss * (logits.logsumexp(-1) ** 2).masked_fill(targets == ignore_index, 0.0)


def fused_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """`linear_cross_entropy` with Triton kernels; float32, bfloat16 or float16."""
    dtype = _product_dtype(hidden)
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    return torch.ops.andromeda.linear_cross_entropy(hidden, weight, targets, ignore_index, smoothing, z_loss, learns)[0]


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """What autocast would take for the matrix products."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


@torch.library.custom_op("andromeda::linear_cross_entropy", mutates_args=())
def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, smoothing: float, z_loss: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,), and for the backward pass both parts of the log-sum-exp (2, N) and the last chunk's logits."""
    from andromeda.kernels.loss_kernels import losses_kernel

    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    lse = losses.new_empty(2, len(hidden))
    logits = hidden.new_empty(0, len(weight))
    block = min(BLOCK, 1 << (len(weight) - 1).bit_length())
    with torch.autocast(hidden.device.type, enabled=False), on_device_of(hidden):
        for at in _chunks(len(hidden), len(weight), hidden):
            del logits  # before the next are made
            logits = F.linear(hidden[at], weight)
            losses_kernel[(len(logits),)](
                logits, targets[at], losses[at], *lse[:, at], len(weight), ignore_index, smoothing, z_loss, block,
                num_warps=WARPS,
            )  # fmt: skip
    return losses, lse, logits if keep else hidden.new_empty(0, len(weight))


@torch.library.custom_op("andromeda::linear_cross_entropy_backward", mutates_args=())
def backward(
    upstream: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, kept: Tensor, ignore_index: int,
    smoothing: float, z_loss: float, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and weight, empty where not needed; upstream (N,) is that of the losses."""
    from andromeda.kernels.loss_kernels import gradient_kernel

    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    upstream = upstream.float().contiguous()
    d_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    d_weight: Tensor | None = None
    block = min(BLOCK, 1 << (len(weight) - 1).bit_length())
    with torch.autocast(hidden.device.type, enabled=False), on_device_of(hidden):
        for at in _chunks(len(hidden), len(weight), hidden):
            if at.stop == len(hidden) and len(kept) > 0:
                logits, grad = kept, torch.empty_like(kept)  # a second backward pass may need them
            else:
                logits = grad = F.linear(hidden[at], weight)
            gradient_kernel[(len(logits), -(-len(weight) // block))](
                logits, targets[at], *lse[:, at], upstream[at], grad, len(weight), ignore_index, smoothing, z_loss,
                block, num_warps=WARPS,
            )  # fmt: skip
            if need_hidden:
                torch.mm(grad, weight, out=d_hidden[at])
            if need_weight:
                d_weight = _add_product(d_weight, grad, hidden[at], alone=len(grad) == len(hidden))
            del logits, grad  # before the next are made
    if d_weight is None:
        d_weight = torch.zeros_like(weight) if need_weight else weight.new_empty(0)
    return d_hidden, d_weight.to(weight.dtype)


def _add_product(total: Tensor | None, grad: Tensor, hidden: Tensor, alone: bool) -> Tensor:
    """total + grad.T @ hidden, summed in float32 over the chunks; in one product where there is one."""
    if alone:
        return grad.t() @ hidden
    if grad.is_cuda and grad.dtype is not torch.float32:
        product = torch.mm(grad.t(), hidden, out_dtype=torch.float32)
    else:
        product = grad.t().float() @ hidden.float()
    return product if total is None else total.add_(product)


def chunk_rows(tokens: int, vocabulary: int, budget: int) -> int:
    """Tokens of a chunk, all but the last of which are equal: as few as `budget` logits allow, of whole tiles."""
    most = max(ROW_MULTIPLE, budget // vocabulary // ROW_MULTIPLE * ROW_MULTIPLE)
    chunks = max(1, -(-tokens // most))
    return -(-tokens // (chunks * ROW_MULTIPLE)) * ROW_MULTIPLE


def _budget(like: Tensor) -> int:
    """Logits held at once. From the size of the device, not from what is free: runs are to be repeatable."""
    if not like.is_cuda:
        return LOSS_CHUNK
    return torch.cuda.get_device_properties(like.device).total_memory // (SHARE * like.element_size())


def _chunks(tokens: int, vocabulary: int, like: Tensor) -> Iterator[slice]:
    rows = chunk_rows(tokens, vocabulary, _budget(like))
    for first in range(0, tokens, max(1, rows)):
        yield slice(first, min(first + rows, tokens))


@forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, _t: Tensor, _i: int, _s: float, _z: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    last = 0
    if keep and tokens > 0:
        rows = chunk_rows(tokens, vocabulary, _budget(hidden))
        last = tokens - (tokens - 1) // rows * rows
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    return losses, losses.new_empty(2, tokens), hidden.new_empty(last, vocabulary)


@backward.register_fake
def _(
    _u: Tensor, hidden: Tensor, weight: Tensor, _t: Tensor, _l: Tensor, _k: Tensor, _i: int, _s: float, _z: float,
    need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, *ctx.constants, _ = inputs
    _, lse, kept = output
    ctx.mark_non_differentiable(lse, kept)
    ctx.set_materialize_grads(False)  # of zeros for the kept logits
    ctx.save_for_backward(hidden, weight, targets, lse, kept)


def _backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    d_hidden, d_weight = torch.ops.andromeda.linear_cross_entropy_backward(
        upstream, *ctx.saved_tensors, *ctx.constants, need_hidden, need_weight
    )
    return (d_hidden if need_hidden else None, d_weight if need_weight else None, *[None] * 5)


forward.register_autograd(_backward, setup_context=_save)
