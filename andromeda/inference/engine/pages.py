"""The tensors of the cache: keys, values and token-shift states in pages. No policy.

A page holds keys and values of PAGE tokens of all blocks, and what token shift needs to go on behind its last token.
So what is found in the cache needs nothing computed again, and a text has no state of its own: the state behind its
last token is that of its last page, full or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from andromeda.config import AndromedaConfig
from andromeda.inference.engine.blocks import PAGE


class Pages:
    """Room for so many pages, page 0 among them.

    Attributes:
        keys, values: (depth, num_pages, PAGE, kv_heads, dim_head), keys neither rotated nor decayed.
        shifts: (depth, slots, num_pages, shift_tokens, dim), the inputs of each token shift at a page's last tokens;
            one slot a block, two where attention and feed-forward come in sequence; None without token shift.
    """

    def __init__(self, config: AndromedaConfig, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = config.depth, num_pages, PAGE, config.kv_heads, config.dim_head
        self.num_pages = num_pages
        self.keys, self.values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.shifts: Tensor | None = None
        if config.shift_tokens:
            state = config.shift_tokens, config.dim
            self.shifts = torch.empty(config.depth, _slots(config), num_pages, *state, dtype=dtype, device=device)
        # What a step looks at, block by block: views, made once.
        self.keys_of, self.values_of = list(self.keys), list(self.values)
        self.key_cells, self.value_cells = (
            [x.flatten(0, 1) for x in those] for those in (self.keys_of, self.values_of)
        )
        self.shifts_of = [] if self.shifts is None else [list(of_block) for of_block in self.shifts]
        for pages in (self.keys[:, :1], self.values[:, :1], None if self.shifts is None else self.shifts[:, :, :1]):
            if pages is not None:
                pages.zero_()  # padding reads page 0

    def clear_shifts(self, pages: Tensor) -> None:
        """What stands before a text's first token, (n,) pages that begin one."""
        if self.shifts is not None:
            self.shifts[:, :, pages] = 0

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.keys, self.values, self.shifts) if x is not None)


def page_bytes(config: AndromedaConfig, bytes_per_element: int) -> int:
    """Bytes of one page of all blocks."""
    shift = config.depth * _slots(config) * config.shift_tokens * config.dim
    return PAGE * config.kv_bytes_per_token(bytes_per_element) + shift * bytes_per_element


def _slots(config: AndromedaConfig) -> int:
    return 1 if config.parallel_blocks else 2
