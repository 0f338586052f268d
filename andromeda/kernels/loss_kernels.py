"""The Triton kernels of loss.py: what happens to a chunk of logits, (R, V), between the matrix products."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def losses_kernel(
    logits_ptr, targets_ptr, losses_ptr, top_ptr, log_sum_ptr, vocabulary, ignore_index, smoothing, z_loss,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """losses[i] = -log softmax(logits[i])[targets[i]], reading row i once; 0 where ignored, NaN for no such target.

    Smoothed, the target's logit is mixed with the mean of all; z_loss times the square of the log-sum-exp is added.

    The log-sum-exp is kept in two parts, the largest logit and the logarithm of the sum over exp(x - it): their own sum
    would cost as many digits as a large logit has before the point.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocabulary
    top = float("-inf")  # of what was read so far
    sums = tl.zeros((BLOCK,), dtype=tl.float32)  # of exp(x - top), lane by lane
    totals = tl.zeros((BLOCK,), dtype=tl.float32)  # of x
    for v0 in range(0, vocabulary, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + v, mask=v < vocabulary, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, axis=0))
        sums = sums * tl.exp(top - new_top) + tl.exp(x - new_top)
        totals += tl.where(v < vocabulary, x, 0.0)
        top = new_top
    log_sum = tl.log(tl.sum(sums, axis=0))
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < vocabulary)
    counts = target != ignore_index
    logit = tl.load(logits_ptr + target, mask=known & counts, other=float("nan")).to(tl.float32)
    gap = (top - logit) * (1 - smoothing)
    if smoothing > 0:  # without, a logit of -inf is nothing to worry about
        gap += (top - tl.sum(totals, axis=0) / vocabulary) * smoothing
    lse = top + log_sum
    tl.store(losses_ptr + row, tl.where(counts, gap + log_sum + z_loss * lse * lse, 0.0))
    tl.store(top_ptr + row, tl.where(known | (target == ignore_index), top, float("nan")))
    tl.store(log_sum_ptr + row, log_sum)


@triton.jit
def gradient_kernel(
    logits_ptr, targets_ptr, top_ptr, log_sum_ptr, upstream_ptr, out_ptr, vocabulary, ignore_index, smoothing, z_loss,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i, v] = upstream[i] * the derivative of losses[i] by logits[i, v], 0 where ignored; out may be logits.

    Without smoothing and z_loss it is softmax(logits[i])[v] - (v == targets[i]).
    """
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    top, log_sum = tl.load(top_ptr + row), tl.load(log_sum_ptr + row)
    upstream = tl.load(upstream_ptr + row)
    x = tl.load(logits_ptr + row * vocabulary + v, mask=v < vocabulary, other=0.0).to(tl.float32)
    wanted = tl.where(v == target, 1 - smoothing, 0.0) + smoothing / vocabulary
    x = (tl.exp((x - top) - log_sum) * (1 + 2 * z_loss * (top + log_sum)) - wanted) * upstream
    x = tl.where(target == ignore_index, 0.0, x)
    tl.store(out_ptr + row * vocabulary + v, x.to(out_ptr.dtype.element_ty), mask=v < vocabulary)
