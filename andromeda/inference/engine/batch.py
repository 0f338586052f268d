"""The tokens of one step, of many texts laid flat: what the model asks of them (`model.Ragged`). No policy.

Norms, products and feed-forward know nothing of texts; token shift and attention do. Rows come in three parts, which
attend in their own ways: one token each; a few each; and parts of prompts, one by one.

Shapes: R rows (texts), T tokens of all rows, s = shift_tokens, H query heads, D dim_head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from andromeda.inference.engine.pages import Pages
from andromeda.kernels import Geometry, PageLayout, attention, paged_attention
from andromeda.model import Certificate


@dataclass(frozen=True)
class Single:
    """Rows of one token each.

    Attributes:
        tokens: which of the T are theirs.
        layout: of their pages and of the lengths of their texts, the new token included.
    """

    tokens: slice
    layout: PageLayout

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, geometry: Geometry) -> Tensor:
        """q (T, H, D) and the pages of a block -> (tokens, H, D)."""
        return _paged(q[self.tokens, None], keys, values, self.layout, geometry)[:, 0]


@dataclass(frozen=True)
class Few:
    """Rows of N tokens each, or fewer, which stand at the end of N.

    Attributes:
        tokens: (rows, N) which of the T they are; in front of a row's first, again that one.
        places: (tokens,) where in rows * N each token stands.
    """

    tokens: Tensor
    places: Tensor
    layout: PageLayout

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, geometry: Geometry) -> Tensor:
        return _paged(q[self.tokens], keys, values, self.layout, geometry).flatten(0, 1)[self.places]


@dataclass(frozen=True)
class Part:
    """A part of one prompt: tokens of the T, and its text's pages up to its end, (pages,) int64, of `length` tokens."""

    tokens: slice
    pages: Tensor
    length: int
    flash: bool

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, geometry: Geometry) -> Tensor:
        k, v = (x[self.pages].flatten(0, 1)[None, : self.length] for x in (keys, values))
        return attention(q[None, self.tokens], k, v, geometry, flash=self.flash)[0]


@dataclass
class Shift:
    """Token shift of rows of any length, by index. What is indexed is the R * s tokens before all rows, then the T.

    Attributes:
        delayed: for i = 1 .. s, (T,) where the token i before each is.
        states: (n, s) where those are that make the state behind a token, for each that ends a row or a page.
        pages: (n,) to which these states belong.
        kept: (k,) what `Batch.keep` may need, of rows whose end is not known before the draw; None: all are.
    """

    delayed: Sequence[Tensor]
    states: Tensor
    pages: Tensor
    kept: Tensor | None = None


@dataclass
class Batch:
    """One step. Attributes as of `model.Ragged`, and:

    Attributes:
        cells: (T,) where keys and values go, counted in tokens of all pages.
        before: (R,) pages that hold the shift state before each row's first token.
        ends: (R,) pages in which rows of one token end; `shift` is for rows of any length, and None with them.
        kept: (k, dim) of each block and slot, for rows whose end is not known before the draw.
    """

    pages: Pages
    positions: Tensor
    longest: int
    certificates: dict[int, Certificate]
    cells: Tensor
    parts: Sequence[Single | Few | Part]
    before: Tensor | None
    ends: Tensor | None = None
    by_index: Shift | None = None
    kept: list[Tensor] = field(default_factory=list)

    def attention(self, block: int, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
        keys, values = self.pages.keys_of[block], self.pages.values_of[block]
        self.pages.key_cells[block].index_copy_(0, self.cells, k[0])
        self.pages.value_cells[block].index_copy_(0, self.cells, v[0])
        outs = [part.attend(q[0], keys, values, geometry) for part in self.parts]
        return (outs[0] if len(outs) == 1 else torch.cat(outs))[None]

    def shift(self, block: int, slot: int, x: Tensor) -> Tensor:
        assert self.before is not None
        states = self.pages.shifts_of[block][slot]  # (num_pages, s, dim)
        amount, before = states.shape[1], states.index_select(0, self.before)
        width = x.shape[-1] // (amount + 1)
        if self.by_index is None:
            assert self.ends is not None
            new = x[0, :, None]  # (R, 1, dim)
            states.index_copy_(0, self.ends, torch.cat([before[:, 1:], new], dim=1) if amount > 1 else new)
            delayed = [before[None, :, amount - i, i * width : (i + 1) * width] for i in range(1, amount + 1)]
        else:
            known = torch.cat([before.flatten(0, 1), x[0]])
            states.index_copy_(0, self.by_index.pages, known[self.by_index.states])
            if self.by_index.kept is not None:
                self.kept.append(known[self.by_index.kept])
            sources = enumerate(self.by_index.delayed, 1)
            delayed = [known[:, i * width : (i + 1) * width][source][None] for i, source in sources]
        return torch.cat([x[..., :width], *delayed, x[..., (amount + 1) * width :]], dim=-1)

    def keep(self, states: Tensor, pages: Tensor) -> None:
        """States of rows whose end was not known: (n, s) where in what is kept, and (n,) pages to which they belong."""
        shifts = self.pages.shifts
        assert shifts is not None
        kept = torch.stack(self.kept)[:, states]  # (depth * slots, n, s, dim)
        shifts[:, :, pages] = kept.view(*shifts.shape[:2], *kept.shape[1:])


def _paged(q: Tensor, keys: Tensor, values: Tensor, layout: PageLayout, geometry: Geometry) -> Tensor:
    return paged_attention(q, keys, values, layout.page_table, layout.given, geometry, layout=layout)
