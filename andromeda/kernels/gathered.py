"""Attention of a few new tokens over a paged cache in plain PyTorch: the function of `decode_reference`, by batches.

Rows of like length form a group and stand right-aligned in it: column c of a width W lies W - 1 - c tokens behind each
row's last token. So one table of rotations and one of biases serve all rows, and with one new token a row its query is
not rotated at all. Decay is counted from the last token: keys only shrink, new tokens grow by `longest_span` at most.
Heads with windows look at the last columns alone. Long rows go by in pieces, which is what bounds the memory.
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from andromeda.kernels.geometry import Geometry, Rotary
from andromeda.kernels.rotation import longest_span, relative_table, rotate

EVERYTHING = 2**31 - 1  # tokens; the reach of a head without a window
MAX_BOUND_WITHOUT_MAXIMUM = 40.0  # as in tiled.py
# Of keys and values, by measurement on a CPU:
PIECE_BYTES = 2**21  # gathered at a time
ALONE_BYTES = 2**21  # a row of so many is a group of its own, whose pages need no gathering where they lie in a run
WASTED_BYTES = 2**18  # read in vain by a group, which costs less than a group more
SMALLEST_DECAY = 1e-30  # what is less is 0: arithmetic with denormal numbers is slow


class PageLayout:
    """Where the rows of a batch lie in a paged cache: made once, it serves all calls of a step, one a block.

    Args:
        page_table: (B, max_pages) int32: token j of row b is in page page_table[b, j // page_size].
        lengths: (B,) int32, or so many integers on the host, which spares waiting for the device.
    """

    def __init__(self, page_table: Tensor, lengths: Tensor | Sequence[int], page_size: int) -> None:
        self.page_table, self.given, self.page_size = page_table, lengths, page_size
        self.checked: object = None  # what it was last found to go with
        self._groups: dict[int, Groups] = {}

    @functools.cached_property
    def lengths(self) -> Tensor:
        """(B,) int32, where the page table is."""
        if isinstance(self.given, Tensor):
            return self.given
        return torch.tensor(self.given, dtype=torch.int32, device=self.page_table.device)

    @functools.cached_property
    def host_lengths(self) -> list[int]:
        return self.given.tolist() if isinstance(self.given, Tensor) else list(self.given)

    @functools.cached_property
    def longest(self) -> int:
        return max(self.host_lengths)

    def groups(self, token_bytes: int) -> Groups:
        """Given the bytes of a token's keys and values."""
        if token_bytes not in self._groups:
            self._groups[token_bytes] = self._grouped(token_bytes)
        return self._groups[token_bytes]

    def _grouped(self, token_bytes: int) -> Groups:
        lengths, table = self.host_lengths, self.page_table.long()
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        ends = []  # of groups, in rows
        longest, wasted = 0, 0
        for row, length in enumerate([lengths[row] for row in order if lengths[row] > 0]):
            wasted += (longest - length) * token_bytes
            if row == 0 or wasted > WASTED_BYTES or longest * token_bytes >= ALONE_BYTES:
                ends.append(row)
                longest, wasted = length, 0
        ends.append(sum(length > 0 for length in lengths))
        if ends == [0, len(lengths)]:
            return Groups(None, [Group(0, len(lengths), lengths, table, self.page_size)])
        index = torch.tensor(order, device=table.device)
        lengths, table = [lengths[row] for row in order], table[index]
        groups = [
            Group(first, end, lengths[first:end], table[first:end], self.page_size)
            for first, end in itertools.pairwise(ends)
        ]
        return Groups(index, groups)


@dataclass
class Groups:
    """Rows of like length together.

    Attributes:
        order: (B,) rows, the longest first, those without tokens last and in no group; None: as they are.
    """

    order: Tensor | None
    groups: list[Group]


@dataclass
class Group:
    """Rows first..end - 1 of an order, right-aligned: the longest fills all columns."""

    first: int
    end: int
    lengths: list[int]
    table: Tensor  # (rows, max_pages) int64
    page_size: int
    places: dict[object, Tensor] = field(default_factory=dict)

    @functools.cached_property
    def width(self) -> int:
        return max(self.lengths)

    @functools.cached_property
    def shortest(self) -> int:
        return min(self.lengths)

    @functools.cached_property
    def shifts(self) -> Tensor:
        """(rows, 1): a row's position in column 0, 0 or less."""
        return torch.tensor(self.lengths, device=self.table.device)[:, None] - self.width

    @functools.cached_property
    def breaks(self) -> list[int]:
        """Pages of a lone row that do not lie behind the one before."""
        pages = self.table[0, : -(-self.width // self.page_size)].tolist()
        return [page for page in range(1, len(pages)) if pages[page] != pages[page - 1] + 1]

    def run(self, columns: tuple[int, int]) -> int | None:
        """The page that begins a run which holds all these columns; None where there are several, or several rows."""
        if len(self.lengths) > 1:
            return None
        first, last = columns[0] // self.page_size, (columns[1] - 1) // self.page_size
        at = bisect_left(self.breaks, first + 1)
        if at < len(self.breaks) and self.breaks[at] <= last:
            return None
        return int(self.table[0, first])

    def pages(self, columns: tuple[int, int]) -> Tensor:
        """Of a lone row, whose pieces begin where a page does."""
        return self.table[0, columns[0] // self.page_size : -(-columns[1] // self.page_size)]

    def index(self, columns: tuple[int, int], strides: tuple[int, int, int], kv: tuple[int, int]) -> Tensor:
        """(rows * kv heads * columns,): where keys lie, given the strides of pages, tokens and heads.

        Columns before a row's first token stand for that token.
        """
        key = (columns, strides, kv)
        if key not in self.places:
            position = (torch.arange(*columns, device=self.table.device) + self.shifts).clamp_(min=0)
            place = self.table.gather(1, position // self.page_size).mul_(strides[0])
            place += (position % self.page_size).mul_(strides[1])
            if kv != (0, 1):
                place = place[:, None] + torch.arange(*kv, device=place.device)[:, None] * strides[2]
            self.places[key] = place.flatten()
        return self.places[key]

    def unseen(self, columns: tuple[int, int]) -> Tensor | None:
        """(rows, 1, columns) booleans: before a row's first token. None: none is."""
        if columns[0] >= self.width - self.shortest:
            return None
        key = ("unseen", columns)
        if key not in self.places:
            self.places[key] = (torch.arange(*columns, device=self.table.device) + self.shifts < 0)[:, None]
        return self.places[key]


def gathered_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, layout: PageLayout, geometry: Geometry) -> Tensor:
    """As `paged_attention` says, of inputs that fit; float32 inside, float64 for float64.

    It reads lengths and the geometry's numbers on the host, so on a GPU it waits for these.
    """
    new = q.shape[1]
    span = longest_span(geometry.rotary)
    if new > span:
        return _in_spans(q, k_pages, v_pages, layout, geometry, int(span))
    grouped = layout.groups(2 * k_pages.shape[2] * k_pages.shape[3] * q.element_size())
    sets = _head_sets(q.shape[2], k_pages.shape[2], geometry.rotary, *_on_host(geometry))
    if new > 1:
        q = q.flip(1)  # the last token first, which _biases wants
    if grouped.order is None:
        out = _Walk(grouped.groups[0], q, k_pages, v_pages, geometry).attend(sets)
    else:
        q = q.index_select(0, grouped.order)
        outs = [
            _Walk(group, q[group.first : group.end], k_pages, v_pages, geometry).attend(sets)
            for group in grouped.groups
        ]
        seen = sum(out.shape[0] for out in outs)
        out = torch.empty_like(q).index_copy_(0, grouped.order, torch.cat([*outs, torch.zeros_like(q[seen:])]))
    return out.flip(1) if new > 1 else out


def _in_spans(q: Tensor, k_pages: Tensor, v_pages: Tensor, layout: PageLayout, geometry: Geometry, span: int) -> Tensor:
    """New tokens a few at a time, as of a decay so steep that it could not be counted from one place for all."""
    parts, new = [], q.shape[1]
    for first in range(0, new, span):
        part = q[:, first : first + span]
        left = new - first - part.shape[1]
        lengths = [max(0, length - left) for length in layout.host_lengths]
        part_layout = PageLayout(layout.page_table, lengths, layout.page_size)
        parts.append(gathered_attention(part, k_pages, v_pages, part_layout, geometry))
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class _HeadSet:
    """Heads that are alike: first..end - 1, as many of each of their kv heads."""

    first: int
    end: int
    kv: tuple[int, int]
    rotated: bool
    reach: int  # tokens, the longest window
    slopes: tuple[float, ...] | None
    windows: tuple[int, ...] | None


def _on_host(geometry: Geometry) -> tuple[tuple[float, ...] | None, tuple[int, ...] | None]:
    """Slopes and windows; from a CPU that takes a microsecond each."""
    slopes, windows = geometry.slopes, geometry.windows
    return None if slopes is None else tuple(slopes.tolist()), None if windows is None else tuple(windows.tolist())


@functools.lru_cache(maxsize=256)
def _head_sets(
    heads: int, kv_heads: int, rotary: Rotary | None, slopes: tuple[float, ...] | None,
    windows: tuple[int, ...] | None,
) -> list[_HeadSet]:  # fmt: skip
    """All heads, cut where the rotated ones end, where the local ones end, and so that kv heads have equal parts."""
    rotated = 0 if rotary is None else rotary.heads
    slopes, reaches = slopes or (0.0,) * heads, windows or (EVERYTHING,) * heads
    local = max((h + 1 for h in range(heads) if slopes[h] or reaches[h] < EVERYTHING), default=0)
    cuts, group = {0, rotated, local, heads}, heads // kv_heads
    for first, end in itertools.pairwise(sorted(cuts)):
        cuts |= {cut for cut in (-(-first // group) * group, end // group * group) if first < cut < end}
    return [
        _HeadSet(
            first, end, (first // group, (end - 1) // group + 1), first < rotated, max(reaches[first:end]),
            slopes[first:end] if any(slopes[first:end]) else None,
            reaches[first:end] if min(reaches[first:end]) < EVERYTHING else None,
        )
        for first, end in itertools.pairwise(sorted(cuts))
    ]  # fmt: skip


class _Walk:
    """One group's queries over its keys, piece by piece."""

    def __init__(self, group: Group, q: Tensor, k_pages: Tensor, v_pages: Tensor, geometry: Geometry) -> None:
        self.group, self.q, self.rotary, self.bounds = group, q, geometry.rotary, geometry.bounds
        self.k_pages, self.v_pages = _rows_of(k_pages), _rows_of(v_pages)
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.new = q.shape[1]
        self.turns: tuple[Tensor, Tensor] | None = None  # of the rotated keys' columns

    def attend(self, sets: list[_HeadSet]) -> Tensor:
        """(rows, N, heads, dim_head)."""
        firsts = [self._first_column(heads) for heads in sets]
        pieces = self._pieces(sets, firsts)
        if self.rotary is not None:
            seen = self.group.width - min(first for first, heads in zip(firsts, sets, strict=True) if heads.rotated)
            self.turns = _turns(self.rotary, _table_length(seen), self.q.device, self.dtype)
        parts = self._at_once(sets, pieces[0]) if len(pieces) == 1 else self._in_pieces(sets, firsts, pieces)
        shape = self.q.shape[0], -1, self.new, self.q.shape[3]
        out = parts[0].view(shape) if len(parts) == 1 else torch.cat([part.view(shape) for part in parts], dim=1)
        out = out.transpose(1, 2).to(self.q.dtype)
        if self.group.shortest < self.new:
            for row, length in enumerate(self.group.lengths):
                out[row, length:] = 0.0  # the last token comes first; those before position 0 see nothing
        return out

    def _at_once(self, sets: list[_HeadSet], columns: tuple[int, int]) -> list[Tensor]:
        """Of the sets of each range of kv heads, (rows * kv heads, heads of each * N, dim_head)."""
        piece, parts = _Piece(self, columns), []
        for kv, members in itertools.groupby(sets, key=lambda heads: heads.kv):
            logits = [self._logits(heads, self._queries(heads), piece) for heads in members]
            one = logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)
            parts.append(torch.bmm(self._hide_before(one, columns).softmax(-1), piece.values(kv)))
        return parts

    def _in_pieces(self, sets: list[_HeadSet], firsts: list[int], pieces: list[tuple[int, int]]) -> list[Tensor]:
        """Of each set, (rows * kv heads, heads of each * N, dim_head)."""
        bounds = [math.inf] * self.q.shape[2] if self.bounds is None else self.bounds.tolist()
        highest = [max(bounds[heads.first : heads.end]) for heads in sets]
        states = [
            _State(self._queries(heads), bound <= MAX_BOUND_WITHOUT_MAXIMUM)
            for heads, bound in zip(sets, highest, strict=True)
        ]
        for columns in pieces:
            piece = _Piece(self, columns)
            for heads, first, state in zip(sets, firsts, states, strict=True):
                if first < columns[1]:
                    logits = self._hide_before(self._logits(heads, state.q, piece), columns)
                    state.add(logits, piece.values(heads.kv))
        return [state.result() for state in states]

    def _pieces(self, sets: list[_HeadSet], firsts: list[int]) -> list[tuple[int, int]]:
        """Columns to take at a time: each piece is seen by a set as a whole, or not at all."""
        cuts = sorted({*firsts, self.group.width})
        kv_heads = max(heads.kv[1] - heads.kv[0] for heads in sets)
        token_bytes = 2 * self.q.shape[0] * kv_heads * self.q.shape[3] * self.dtype.itemsize
        most = max(self.group.page_size, PIECE_BYTES // token_bytes // self.group.page_size * self.group.page_size)
        return [
            (first, min(first + most, end))
            for begin, end in itertools.pairwise(cuts)
            for first in range(begin, end, most)
        ]

    def _first_column(self, heads: _HeadSet) -> int:
        """A page's first token, of a lone row, so that pieces end where pages do."""
        column = max(0, self.group.width - heads.reach - self.new + 1)
        return column // self.group.page_size * self.group.page_size

    def _queries(self, heads: _HeadSet) -> Tensor:
        """(rows * kv heads, heads of each * N, dim_head)."""
        q = self.q[:, :, heads.first : heads.end].to(self.dtype)
        if self.new > 1:
            q = q.transpose(1, 2)
            if heads.rotated:
                assert self.rotary is not None
                cos, sin = relative_table(self.rotary, self.new - 1, 1, True, q.device, self.dtype)
                q = rotate(q, cos.flip(0), sin.flip(0))
        return q.reshape(q.shape[0] * (heads.kv[1] - heads.kv[0]), -1, q.shape[3])

    def _logits(self, heads: _HeadSet, q: Tensor, piece: _Piece) -> Tensor:
        """(rows * kv heads, heads of each * N, columns), -inf where unseen but before a row's first token."""
        keys = (piece.rotated_keys if heads.rotated else piece.keys)(heads.kv).transpose(1, 2)
        bias = self._biases(heads, piece.columns, q.shape[1])
        if bias is None:
            logits = torch.bmm(q, keys)
        elif bias.shape[0] == 1:
            logits = torch.baddbmm(bias, q, keys)
        else:
            logits = torch.bmm(q, keys)
            logits.view(-1, *bias.shape).add_(bias)
        if bias is None and self.new > 1 and piece.columns[1] > self.group.width - self.new + 1:
            self._hide_future(logits, piece.columns)
        return logits

    def _biases(self, heads: _HeadSet, columns: tuple[int, int], rows: int) -> Tensor | None:
        """(kv heads, heads of each * N, columns), cut out of a table in which the distance falls from left to right."""
        if heads.slopes is None and heads.windows is None:
            return None
        distances = _table_length(min(self.group.width, heads.reach + self.new + self.group.page_size))
        device, count = self.q.device, heads.end - heads.first
        table = _bias_table(heads.slopes, heads.windows, count, distances, self.new, device, self.dtype)
        shape = (count, self.new, columns[1] - columns[0])
        bias = table.as_strided(shape, (table.stride(0), 1, 1), distances - self.group.width + columns[0])
        return bias.reshape(heads.kv[1] - heads.kv[0], rows, shape[2])

    def _hide_before(self, logits: Tensor, columns: tuple[int, int]) -> Tensor:
        unseen = self.group.unseen(columns)
        if unseen is not None:
            logits.view(unseen.shape[0], -1, logits.shape[2]).masked_fill_(unseen, -torch.inf)
        return logits

    def _hide_future(self, logits: Tensor, columns: tuple[int, int]) -> None:
        """Token n, counted from the last, stands in column width - 1 - n."""
        token = torch.arange(self.new, device=logits.device)[:, None]
        ahead = torch.arange(*columns, device=logits.device) + token >= self.group.width
        logits.view(-1, *ahead.shape).masked_fill_(ahead, -torch.inf)


@dataclass(frozen=True)
class _Rows:
    """Pages as (anything, dim_head), with the strides of pages, tokens and heads in it."""

    rows: Tensor
    strides: tuple[int, int, int]


def _rows_of(pages: Tensor) -> _Rows:
    """A view; a copy where vectors do not lie on multiples of their length, which no cache should do."""
    count, page_size, kv_heads, dim_head = pages.shape
    if pages.is_contiguous():
        return _Rows(pages.view(-1, dim_head), (page_size * kv_heads, kv_heads, 1))
    page, token, head, channel = pages.stride()
    if channel != 1 or page % dim_head or token % dim_head or head % dim_head:
        return _rows_of(pages.contiguous())
    page, token, head = page // dim_head, token // dim_head, head // dim_head
    extent = 1 + (count - 1) * page + (page_size - 1) * token + (kv_heads - 1) * head
    return _Rows(pages.as_strided((extent, dim_head), (dim_head, 1)), (page, token, head))


class _Piece:
    """Keys and values of some columns, gathered once for all sets of heads that share them."""

    def __init__(self, walk: _Walk, columns: tuple[int, int]) -> None:
        self.walk, self.columns = walk, columns
        self.run = walk.group.run(columns)
        self.held: dict[tuple[str, tuple[int, int]], Tensor] = {}

    def keys(self, kv: tuple[int, int]) -> Tensor:
        """(rows * kv heads, columns, dim_head)."""
        return self._held("keys", self.walk.k_pages, kv)

    def values(self, kv: tuple[int, int]) -> Tensor:
        return self._held("values", self.walk.v_pages, kv)

    def rotated_keys(self, kv: tuple[int, int]) -> Tensor:
        """Each by its distance to the last column."""
        if ("rotated keys", kv) not in self.held:
            self.held["rotated keys", kv] = self._rotated(self.keys(kv))
        return self.held["rotated keys", kv]

    def _rotated(self, keys: Tensor) -> Tensor:
        turns = self.walk.turns
        assert turns is not None
        first = turns[0].shape[0] - self.walk.group.width + self.columns[0]
        cos, sin = (table.narrow(0, first, keys.shape[1]) for table in turns)
        k1, k2 = keys.chunk(2, dim=-1)
        return torch.cat([k2, k1], dim=-1).mul_(sin).addcmul_(keys, cos)  # `rotate` in passes without strides

    def _held(self, what: str, pages: _Rows, kv: tuple[int, int]) -> Tensor:
        if (what, kv) not in self.held:
            self.held[what, kv] = self._read(pages, kv).to(self.walk.dtype)
        return self.held[what, kv]

    def _read(self, pages: _Rows, kv: tuple[int, int]) -> Tensor:
        group, columns, dim_head = self.walk.group, self.columns[1] - self.columns[0], pages.rows.shape[1]
        page, token, head = pages.strides
        if self.run is not None and page == token * group.page_size:
            first = self.run * page + kv[0] * head
            shape, strides = (kv[1] - kv[0], columns, dim_head), (head * dim_head, token * dim_head, 1)
            return pages.rows.as_strided(shape, strides, pages.rows.storage_offset() + first * dim_head)
        if len(group.lengths) == 1 and pages.strides == (group.page_size, 1, 1):
            whole = pages.rows.view(-1, page * dim_head).index_select(0, group.pages(self.columns))
            return whole.view(1, -1, dim_head)[:, :columns]
        index = group.index(self.columns, pages.strides, kv)
        return pages.rows.index_select(0, index).view(-1, columns, dim_head)


class _State:
    """Softmax over pieces, by running maximum and sum (Milakov & Gimelshein 2018); no maximum where it is bounded."""

    def __init__(self, q: Tensor, bounded: bool) -> None:
        self.q, self.bounded = q, bounded
        self.top: Tensor | None = None
        self.total: Tensor | None = None
        self.acc: Tensor | None = None

    def add(self, logits: Tensor, values: Tensor) -> None:
        """The logits are changed."""
        if not self.bounded:
            self._lower(logits)
        p = logits.exp_()
        total = p.sum(-1, keepdim=True)
        self.total = total if self.total is None else self.total + total
        self.acc = torch.bmm(p, values) if self.acc is None else torch.baddbmm(self.acc, p, values)

    def _lower(self, logits: Tensor) -> None:
        top = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)  # a piece may be all unseen
        if self.top is not None and self.acc is not None and self.total is not None:
            top = torch.maximum(top, self.top)
            scale = torch.exp(self.top - top)
            self.acc, self.total = self.acc * scale, self.total * scale
        self.top = top
        logits -= top

    def result(self) -> Tensor:
        assert self.acc is not None and self.total is not None
        return self.acc / self.total


def _table_length(tokens: int) -> int:
    """A power of two, so that growing rows need few tables."""
    return 1 << max(6, (tokens - 1).bit_length())


@functools.lru_cache(maxsize=64)
def _bias_table(
    slopes: tuple[float, ...] | None, windows: tuple[int, ...] | None, heads: int, distances: int, new: int,
    device: torch.device, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(heads, distances + N - 1): at distances from `distances` - 1 down to 1 - N, -inf where a head sees nothing."""
    with torch.inference_mode(False):
        distance = torch.arange(distances - 1, -new, -1, device=device).expand(heads, -1)
        bias = torch.zeros(heads, distance.shape[1], dtype=dtype, device=device)
        unseen = distance < 0
        if slopes is not None:
            bias = -torch.tensor(slopes, dtype=dtype, device=device)[:, None] * distance
        if windows is not None:
            unseen = unseen | (distance >= torch.tensor(windows, device=device)[:, None])
        return bias.masked_fill(unseen, -torch.inf)


@functools.lru_cache(maxsize=8)
def _turns(rotary: Rotary, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(tokens, dim_head) each: what a key, and what its swapped halves are multiplied by, the last at distance 0."""
    with torch.inference_mode(False):
        cos, sin = relative_table(rotary, tokens - 1, 1, False, device, dtype)
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return cos.masked_fill(cos.abs() < SMALLEST_DECAY, 0.0), sin.masked_fill(sin.abs() < SMALLEST_DECAY, 0.0)
