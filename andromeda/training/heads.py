"""What each head does while it learns: its bound and its window, read off the weights, and how widely it looks.

A line of heads.jsonl has `step` and `tokens`, and of each block a list with a number for each head:

bounds      B, which no logit without its bias exceeds (absent without QK norm)
windows     tokens that the bound certifies, the query's own among them; null: it reaches everywhere
entropies   nats, the mean of -sum p ln p over queries of one validation text (absent without one)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from andromeda.kernels.entropy import attention_entropy
from andromeda.model import Andromeda, Attention, Pass
from andromeda.positions import NO_WINDOW
from andromeda.training.objective import Batch

SPANS, SPAN = 4, 128  # of a long text, so many times so many queries in a row
DIGITS = 4  # behind the point


def certificates(model: Andromeda) -> dict[str, Any]:
    """Bounds and windows of all heads, as the weights are now; all of them must be here."""
    found: dict[str, Any] = {}
    bounds = [block.attention.bounds() for block in model.blocks]
    windows = [block.attention.windows() for block in model.blocks]
    if bounds[0] is not None:
        found["bounds"] = [_rounded(x) for x in bounds if x is not None]
    if windows[0] is not None:
        found["windows"] = [[None if w == NO_WINDOW else w for w in x.tolist()] for x in windows if x is not None]
    return found


def entropies(
    model: Andromeda, run: Callable[[Batch], Tensor], text: Batch, compiled: bool = False
) -> list[list[float]]:
    """(depth, heads) nats, means over the queries of `spans`.

    Args:
        run: sends a batch through the model, in the precision of training.
        text: one sequence.
        compiled: whether blocks are, who do not let anybody look into them then.
    """
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with _watched(model) as seen, torch.no_grad(), eager:
        run(text)
    return [_rounded(seen[block]) for block in range(len(model.blocks))]


def spans(tokens: int) -> list[range]:
    """Which queries of a text are asked: all of a short one; of a long one the last of each quarter."""
    if tokens <= SPANS * SPAN:
        return [range(tokens)]
    ends = [tokens * (n + 1) // SPANS for n in range(SPANS)]
    return [range(end - SPAN, end) for end in ends]


@contextmanager
def _watched(model: Andromeda) -> Iterator[dict[int, Tensor]]:
    """Within it each pass leaves every block's entropies, (heads,), under the block's number."""
    seen: dict[int, Tensor] = {}

    def look(attention: Attention, inputs: tuple[Tensor, Pass]) -> None:
        seen[attention.block] = _mean_entropy(attention, *inputs)

    handles = [block.attention.register_forward_pre_hook(look) for block in model.blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _mean_entropy(attention: Attention, x: Tensor, step: Pass) -> Tensor:
    """(heads,) of x (1, T, dim), or, in a context, of the whole sequence of which x is this process' part."""
    q, k, _, geometry = attention.project(x, step)
    q, k = attention.normalise(q, k, step)
    context, starts = step.context, geometry.starts
    asked = spans(x.shape[1] if context is None else context.tokens)
    if context is None:
        mine = [(slice(span.start, span.stop), span.stop) for span in asked]
    else:
        k = context.gather(k)
        mine = [part for span in asked for part in context.rows(span)]
    total = torch.zeros(q.shape[2], device=q.device)
    for rows, end in mine:
        seen = replace(geometry, starts=None if starts is None else starts[:, :end])
        total += attention_entropy(q[:, rows], k[:, :end], seen).sum((0, 1))
    if context is not None:
        dist.all_reduce(total, group=context.group)
    return total / sum(map(len, asked))


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]
