"""What a model remembers between calls: keys, values and token-shift states, as one object."""

from __future__ import annotations

import torch
from torch import Tensor

from andromeda.kernels.paged import DEFAULT_PAGE


class Cache:
    """Keys (neither rotated nor decayed), values, and the last tokens before each token shift. Gradients stop here.

    A forward pass appends to every block and then commits with `advance`, so a pass that is broken off
    leaves the cache as it was.

    Attributes:
        length: tokens held.
    """

    def __init__(self) -> None:
        self.length = 0
        # block -> what follows from its weights, which do not change while a cache lives
        self.certificates: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        self._keys: dict[int, Tensor] = {}  # block -> (B, capacity, kv_heads, dim_head)
        self._values: dict[int, Tensor] = {}
        self._shifts: dict[tuple[int, int], Tensor] = {}  # (block, slot) -> (B, shift_tokens, dim)
        self._pending: dict[tuple[int, int], Tensor] = {}

    def append(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, T, kv_heads, dim_head) behind what is held; returns all (B, length + T, kv_heads, dim_head)."""
        end = self.length + k.shape[1]
        for store, new in ((self._keys, k), (self._values, v)):
            held = store.get(block)
            if held is None or held.shape[1] < end:
                tokens = end if held is None else max(end, 2 * held.shape[1])
                capacity = -(-tokens // DEFAULT_PAGE) * DEFAULT_PAGE  # so that it can be seen as pages
                grown = new.new_empty(new.shape[0], capacity, *new.shape[2:])
                if held is not None:
                    grown[:, : self.length] = held[:, : self.length]
                store[block] = held = grown
            held[:, self.length : end] = new.detach()
        return self._keys[block][:, :end], self._values[block][:, :end]

    def shift_state(self, block: int, slot: int) -> Tensor | None:
        """(B, shift_tokens, dim): the tokens before the next one; None before the first."""
        return self._shifts.get((block, slot))

    def set_shift_state(self, block: int, slot: int, state: Tensor) -> None:
        self._pending[block, slot] = state

    def advance(self, tokens: int) -> None:
        """Commits a forward pass over `tokens` tokens."""
        self._shifts.update(self._pending)
        self._pending.clear()
        self.length += tokens

    def expand(self, copies: int) -> None:
        """Repeats each row, next to itself: (B, ...) -> (B * copies, ...)."""
        for kept in (self._keys, self._values):
            kept.update({block: held.repeat_interleave(copies, 0) for block, held in kept.items()})
        self._shifts = {place: state.repeat_interleave(copies, 0) for place, state in self._shifts.items()}

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        tensors = [*self._keys.values(), *self._values.values(), *self._shifts.values()]
        return sum(tensor.nbytes for tensor in tensors)


def shift_tokens(x: Tensor, amount: int, before: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
    """Token shift: of amount + 1 equal parts of the channels, part i is delayed by i tokens.

    Channels left over by the division stay where they are. Nothing crosses a document's border.

    Args:
        x: (B, T, dim).
        before: (B, amount, dim), the tokens before x; None: zeros.
        starts: (B, T) index into x at which each token's document begins; None: before x.
    """
    if amount == 0:
        return x
    width = x.shape[-1] // (amount + 1)
    if before is None:
        before = x.new_zeros(x.shape[0], amount, x.shape[2])
    longer = torch.cat([before, x], dim=1)  # token t of x is token t + amount here
    parts = [x[..., :width]]
    for i in range(1, amount + 1):
        part = longer[:, amount - i : longer.shape[1] - i, i * width : (i + 1) * width]
        if starts is not None:
            source = torch.arange(x.shape[1], device=x.device) - i
            part = part.masked_fill((source < starts)[..., None], 0.0)
        parts.append(part)
    parts.append(x[..., (amount + 1) * width :])
    return torch.cat(parts, dim=-1)


def next_shift_state(x: Tensor, amount: int, before: Tensor | None) -> Tensor:
    """(B, amount, dim): the last tokens of before and x, zeros where there are none yet."""
    if x.shape[1] >= amount:
        return x[:, x.shape[1] - amount :].detach().clone()
    if before is None:
        before = x.new_zeros(x.shape[0], amount, x.shape[2])
    return torch.cat([before, x], dim=1)[:, -amount:].detach()
