"""Context parallelism: one sequence over several processes, which share its keys and values.

The sequence is cut into 2R chunks, and rank r of R has chunks r and 2R - 1 - r: one that sees few keys and one that
sees many, so that causal attention is the same work on each (zig-zag; Llama 3, section 3.3.2, and Megatron's context
parallelism). Keys and values of all chunks are gathered in each block, for with one head of them they are few, and a
chunk's queries attend to those up to its own end. Token shift takes the tokens before a chunk from its neighbour.
Everything else in the model is done token by token.

Shapes: B batch, T tokens, R ranks, C = ceil(T / 2R) tokens of a chunk; a rank holds 2C tokens, the sequence's end is
padded to 2RC. What is padded stands behind everything else, so nothing sees it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from andromeda import kernels
from andromeda.cache import shift_tokens
from andromeda.errors import AndromedaError
from andromeda.kernels import Geometry


class Context:
    """How a sequence of `tokens` is split over the ranks of a process group; all of them make the same calls.

        context = Context(ids.shape[1], group)
        losses = model.token_losses(context.split(ids), context.split(targets), context=context)
        losses.sum().backward()  # parameters' gradients are then to be summed over the ranks, not averaged

    Args:
        tokens: T, of the whole sequence, padding not counted.
        group: its processes; None: all of them.

    Raises:
        AndromedaError: no tokens, no process group, or one that this process is no part of.
    """

    def __init__(self, tokens: int, group: dist.ProcessGroup | None = None) -> None:
        if tokens < 1:
            raise AndromedaError(f"context: a sequence must have at least one token to be split; got {tokens}")
        if not (dist.is_available() and dist.is_initialized()):
            raise AndromedaError(
                "context: there is no process group to split a sequence over; start with torchrun and call "
                "torch.distributed.init_process_group() first, or give the model no context"
            )
        self.group: dist.ProcessGroup = dist.group.WORLD if group is None else group  # type: ignore[assignment]
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise AndromedaError("context: this process is not in the group; give it the group that it is part of")
        self.tokens = tokens
        self.chunk = -(-tokens // (2 * self.ranks))
        self._own = (self.rank, 2 * self.ranks - 1 - self.rank)  # chunks, counted in the sequence

    @property
    def local_tokens(self) -> int:
        """2C: tokens that each rank holds, padding among them."""
        return 2 * self.chunk

    @property
    def padding(self) -> int:
        """Tokens that fill the last chunks, fewer than 2R."""
        return 2 * self.ranks * self.chunk - self.tokens

    @property
    def last(self) -> slice:
        """Which of this rank's tokens is the sequence's last; empty on the ranks that do not have it."""
        chunk, row = divmod(self.tokens - 1, self.chunk)
        if chunk not in self._own:
            return slice(0, 0)
        row += self._own.index(chunk) * self.chunk
        return slice(row, row + 1)

    def rows(self, span: range) -> list[tuple[slice, int]]:
        """Which of this rank's tokens lie in a part of the sequence: rows in a row, and the position behind them."""
        found = []
        for place, chunk in enumerate(self._own):
            before = (place - chunk) * self.chunk  # from a position to its row
            start, stop = max(span.start, chunk * self.chunk), min(span.stop, (chunk + 1) * self.chunk)
            if start < stop:
                found.append((slice(start + before, stop + before), stop))
        return found

    def from_last(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What the rank with the sequence's last token has, of this shape, on all. No gradients."""
        chunk = (self.tokens - 1) // self.chunk
        owner = chunk if chunk < self.ranks else 2 * self.ranks - 1 - chunk
        shared = x.detach().contiguous() if self.rank == owner else x.new_empty(shape)
        dist.broadcast(shared, group=self.group, group_src=owner)
        return shared

    def positions(self, device: torch.device) -> Tensor:
        """(2C,) where this rank's tokens stand in the sequence; padding stands where its last token does."""
        return self._unclamped(device).clamp(max=self.tokens - 1)

    def split(self, x: Tensor, padding: int = 0) -> Tensor:
        """This rank's tokens of what all ranks have: (B, T, ...) -> (B, 2C, ...), padded with `padding`.

        Raises:
            AndromedaError: not of as many tokens as the context was made for.
        """
        if x.dim() < 2 or x.shape[1] != self.tokens:
            raise AndromedaError(
                f"context: made for sequences of {self.tokens} tokens, (batch, {self.tokens}, ...); got "
                f"{tuple(x.shape)}; make one for each length"
            )
        taken = x[:, self.positions(x.device)]
        return self.fill(taken, padding)

    def fill(self, x: Tensor, padding: int) -> Tensor:
        """(B, 2C, ...) with `padding` where the sequence has ended."""
        if self.padding == 0:
            return x
        beyond = self._unclamped(x.device) >= self.tokens
        return x.masked_fill(beyond.view(-1, *[1] * (x.dim() - 2)), padding)

    def join(self, x: Tensor) -> Tensor:
        """All ranks' tokens in the order of the sequence, on each of them: (B, 2C, ...) -> (B, T, ...). No gradients.

        Raises:
            AndromedaError: not of as many tokens as `split` gives.
        """
        self.check(x)
        return self.gather(x.detach())[:, : self.tokens]

    def check(self, x: Tensor) -> None:
        """Raises AndromedaError unless x is (B, 2C, ...)."""
        if x.dim() < 2 or x.shape[1] != self.local_tokens:
            raise AndromedaError(
                f"context: of {self.tokens} tokens over {self.ranks} ranks each has {self.local_tokens}, (batch, "
                f"{self.local_tokens}, ...); got {tuple(x.shape)}; give what context.split returns"
            )

    def gather(self, x: Tensor) -> Tensor:
        """As `join`, padding included, and with gradients: (B, 2C, ...) -> (B, 2RC, ...)."""
        return torch.cat(self._all_chunks(x), dim=1)

    def keys_and_values(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both by `gather`, in one exchange: (B, 2C, kv_heads, dim_head) -> (B, 2RC, kv_heads, dim_head), views."""
        gathered_k, gathered_v = self.gather(torch.cat([k, v], dim=-1)).chunk(2, dim=-1)
        return gathered_k, gathered_v

    def attention(self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, *, flash: bool = True) -> Tensor:
        """`kernels.attention` of this rank's queries over all keys up to each.

        Args:
            q: (B, 2C, heads, dim_head). k, v: (B, 2RC, kv_heads, dim_head), gathered.
            geometry: its `starts` are those of the whole sequence, (B, 2RC).

        Returns:
            (B, 2C, heads, dim_head).
        """
        starts, outs = geometry.starts, []
        for queries, chunk in zip(q.chunk(2, dim=1), self._own, strict=True):
            end = (chunk + 1) * self.chunk
            seen = replace(geometry, starts=None if starts is None else starts[:, :end])
            outs.append(kernels.attention(queries, k[:, :end], v[:, :end], seen, flash=flash))
        return torch.cat(outs, dim=1)

    def shift(self, x: Tensor, amount: int, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """`cache.shift_tokens` of the whole sequence: (B, 2C, dim) -> (B, 2C, dim).

        Args:
            starts: those of the whole sequence, (B, 2RC).

        Returns:
            What is shifted, and (B, amount, dim), the last tokens of the sequence, which the next ones would need.
        """
        width = min(amount + self.padding, self.chunk)  # of each chunk's end, what later ones and the state may need
        ends = x.unflatten(1, (2, self.chunk))[:, :, self.chunk - width :].flatten(1, 2)
        before = torch.cat([x.new_zeros(len(x), amount, x.shape[2]), *self._all_chunks(ends)], dim=1)
        parts = []
        for part, chunk in zip(x.chunk(2, dim=1), self._own, strict=True):
            first, at = chunk * self.chunk, chunk * width
            of_part = None if starts is None else starts[:, first : first + self.chunk] - first
            parts.append(shift_tokens(part, amount, before[:, at : at + amount], of_part))
        end = before.shape[1] - self.padding
        return torch.cat(parts, dim=1), before[:, end - amount : end]

    def _unclamped(self, device: torch.device) -> Tensor:
        """(2C,) positions, those of padding going on behind the last token."""
        first, second = (chunk * self.chunk for chunk in self._own)
        steps = torch.arange(self.chunk, device=device)
        return torch.cat([first + steps, second + steps])

    def _all_chunks(self, x: Tensor) -> list[Tensor]:
        """(B, 2n, ...), n tokens of each of this rank's chunks -> 2R tensors (B, n, ...) in the sequence's order."""
        own = torch.stack(x.chunk(2, dim=1))
        early, late = _Gather.apply(own, self.group).unbind(1)
        return [*early.unbind(), *reversed(late.unbind())]


# The first is its name from torch 2.13 on, where the second warns; a torch built for one process has neither.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))


class _Gather(torch.autograd.Function):
    """What every rank has, on every rank: (...) -> (R, ...).

    The gradient of a rank's part is the sum of what all ranks have of it. That is a reduce-scatter, done as an exchange
    of as many bytes and a sum in the order of the ranks, in float32: repeatable and rounded once, whatever the backend.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ranks = dist.get_world_size(group)
        gathered = x.new_empty(ranks * len(x), *x.shape[1:])
        _all_gather(gathered, x.contiguous(), group=group)
        return gathered.unflatten(0, (ranks, len(x)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        received = torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, grads[0].contiguous(), group=ctx.group)
        wide = torch.promote_types(received.dtype, torch.float32)
        return received.sum(0, dtype=wide).to(received.dtype), None
