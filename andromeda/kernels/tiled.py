"""Attention in plain PyTorch whose memory grows with T, not T^2, and which skips the tiles a window rules out.

FlashAttention-2's scheme (Dao 2023): a tile of queries walks over chunks of keys, and the backward pass recomputes the
probabilities from the saved log-sum-exp. Heads with windows of like size walk together as a band.

Positions enter relative to the first query of the tile, i0: queries are rotated by i - i0 and decayed by zeta^(i - i0),
keys rotated by j - i0 and decayed by zeta^(i0 - j). Every exponent is bounded by the tile, so any position works.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from andromeda.kernels.geometry import Geometry
from andromeda.kernels.rotation import longest_span, relative_table, rotate

QUERY_TILE = 128
KEY_CHUNK = 1024
ACCELERATOR_TILES = 4  # where each launch costs as much as much arithmetic, tiles and chunks are so many times larger
# Below this bound exp(logit) neither overflows in a float32 sum over millions of keys nor loses the key a query
# holds for itself, so the running maximum is left out.
MAX_BOUND_WITHOUT_MAXIMUM = 40.0


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
    """The function of `reference_attention`, in tiles; float32 (float64 for float64 inputs) inside."""
    out: Tensor = _TiledAttention.apply(q, k, v, geometry)
    return out


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The types inside are chosen by hand; autocast would take the products back to low precision."""

    @functools.wraps(function)
    def run(ctx: Any, first: Tensor, *others: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(ctx, first, *others)

    return run


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    @_without_autocast
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
        walk = Walk(q, k, v, geometry)
        out = torch.empty_like(q)
        log_sum = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=walk.dtype)
        for tile in walk.tiles():
            for band in walk.bands:
                walk.forward(tile, band, out, log_sum)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.geometry = geometry
        return out

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; what follows is not recorded, and would count as constant
            raise RuntimeError(
                "attention: the tiled path has no second derivatives; take the reference (attn_flash=False)"
            )
        q, k, v, out, log_sum = ctx.saved_tensors
        walk = Walk(q, k, v, ctx.geometry)
        gradients = _Gradients(
            dq=torch.empty_like(q, dtype=walk.dtype),
            dk=torch.zeros_like(walk.k),
            dv=torch.zeros_like(walk.v),
            dout=grads[0],
            # (B, heads, T): the softmax's own part of the gradient, sum_j p_ij dp_ij
            delta=(grads[0].to(walk.dtype) * out.to(walk.dtype)).sum(-1).transpose(1, 2),
            log_sum=log_sum,
        )
        for tile in walk.tiles():
            walk.backward(tile, gradients)
        dk, dv = gradients.dk.transpose(1, 2), gradients.dv.transpose(1, 2)
        return gradients.dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


@dataclass(frozen=True)
class _Band:
    """Heads that walk over the same keys."""

    heads: Tensor  # (n,) indices
    kv_heads: Tensor | None  # (n,) indices; None: the one k/v head
    rotated: bool
    bounded: bool
    slopes: Tensor | None  # (n, 1, 1)
    windows: Tensor | None  # (n, 1, 1)
    shortest_window: int
    reach: int | None  # the longest window; None: everything


@dataclass(frozen=True)
class _Tile:
    """Queries first..last - 1 of the keys' positions, and the relative tables for rotating them and their keys."""

    first: int
    last: int
    document_start: int  # no query of the tile sees a key before it
    latest_start: int  # some query of the tile sees no key before it
    rows: slice  # the same queries, counted from the first query


@dataclass
class _Gradients:
    dq: Tensor  # (B, T, heads, dim_head)
    dk: Tensor  # (B, kv_heads, S, dim_head)
    dv: Tensor
    dout: Tensor
    delta: Tensor
    log_sum: Tensor


class Walk:
    """The tiles and bands of one call, and what is done in each."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> None:
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.q, self.geometry, self.rotary = q, geometry, geometry.rotary
        self.k, self.v = (x.transpose(1, 2).to(self.dtype) for x in (k, v))  # (B, kv_heads, S, dim_head)
        self.queries, self.keys = q.shape[1], k.shape[1]
        scale = 1 if q.device.type == "cpu" else ACCELERATOR_TILES
        self.tile, self.chunk = int(min(scale * QUERY_TILE, longest_span(self.rotary))), scale * KEY_CHUNK
        self.bands = self._bands()

    def _bands(self) -> list[_Band]:
        """Heads whose windows span as many tiles, and that are alike otherwise, form a band."""
        heads, geometry = self.q.shape[2], self.geometry
        windows = _on_host(geometry.windows, heads, self.keys)
        slopes, bounds = _on_host(geometry.slopes, heads, 0.0), _on_host(geometry.bounds, heads, math.inf)
        groups: dict[tuple[bool, bool, bool, int], list[int]] = {}
        for h in range(heads):
            rotated = self.rotary is not None and h < self.rotary.heads
            tiles = 0 if windows[h] >= self.keys else -(-int(windows[h]) // self.tile)
            key = (rotated, bounds[h] <= MAX_BOUND_WITHOUT_MAXIMUM, slopes[h] != 0, tiles)
            groups.setdefault(key, []).append(h)
        return [self._band(members, *key, windows) for key, members in groups.items()]

    def _band(
        self, members: list[int], rotated: bool, bounded: bool, sloped: bool, tiles: int, windows: list[float]
    ) -> _Band:
        index = torch.tensor(members, device=self.q.device)
        kv_heads, geometry = self.k.shape[1], self.geometry
        return _Band(
            heads=index,
            kv_heads=None if kv_heads == 1 else index // (self.q.shape[2] // kv_heads),
            rotated=rotated,
            bounded=bounded,
            slopes=geometry.slopes[index, None, None].to(self.dtype)
            if sloped and geometry.slopes is not None
            else None,
            windows=geometry.windows[index, None, None] if tiles and geometry.windows is not None else None,
            shortest_window=int(min(windows[h] for h in members)),
            reach=int(max(windows[h] for h in members)) if tiles else None,
        )

    def tiles(self) -> Iterator[_Tile]:
        """The longest documents' starts are read once, on the host."""
        offset = self.keys - self.queries
        starts = None if self.geometry.starts is None else self.geometry.starts[:, offset:]
        for row in range(0, self.queries, self.tile):
            rows = slice(row, min(row + self.tile, self.queries))
            earliest = latest = 0
            if starts is not None:
                earliest, latest = (int(x) for x in torch.aminmax(starts[:, rows]))
            yield _Tile(offset + rows.start, offset + rows.stop, earliest, latest, rows)

    def forward(self, tile: _Tile, band: _Band, out: Tensor, log_sum: Tensor) -> None:
        top = None  # (B, n, R, 1) running maximum
        total: Tensor | float = 0.0
        acc: Tensor | float = 0.0
        for keys, p in self.logits(tile, band):
            if not band.bounded:
                new_top = p.amax(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).min)  # a chunk may be all unseen
                if top is not None:
                    new_top = torch.maximum(new_top, top)
                    scale = torch.exp(top - new_top)
                    total, acc = total * scale, acc * scale
                p -= new_top
                top = new_top
            p.exp_()
            total = total + p.sum(-1, keepdim=True)
            acc = acc + _heads_times_keys(p, self._of_band(self.v[:, :, keys], band))
        assert isinstance(total, Tensor) and isinstance(acc, Tensor)  # a query sees at least itself
        out[:, tile.rows].index_copy_(2, band.heads, (acc / total).transpose(1, 2).to(out.dtype))
        log = total.log() if top is None else total.log() + top
        log_sum[:, :, tile.rows].index_copy_(1, band.heads, log.squeeze(-1))

    def logits(self, tile: _Tile, band: _Band) -> Iterator[tuple[slice, Tensor]]:
        """Chunk by chunk: which keys, and (B, n, R, S) logits, -inf where unseen, which are the caller's to change."""
        q = self._queries(tile, band)  # (B, n, R, D)
        lo = self._first_key(tile, band)
        k_rotated = self._rotated_keys(tile, lo) if band.rotated else None
        for j0, j1 in self._chunks(lo, tile.last):
            k = self.k[:, :, j0:j1] if k_rotated is None else k_rotated[:, :, j0 - lo : j1 - lo]
            yield slice(j0, j1), self._logits(q, k, tile, band, j0, j1)

    def backward(self, tile: _Tile, grads: _Gradients) -> None:
        """Adds the tile's share to dk and dv, and writes its dq."""
        rotated_bands = [band for band in self.bands if band.rotated]
        lo_rotated = min((self._first_key(tile, band) for band in rotated_bands), default=tile.last)
        k_rotated = self._rotated_keys(tile, lo_rotated) if rotated_bands else None
        dk_rotated = None if k_rotated is None else torch.zeros_like(k_rotated)
        for band in self.bands:
            keys, dk, base = self.k, grads.dk, 0
            if band.rotated and k_rotated is not None and dk_rotated is not None:
                keys, dk, base = k_rotated, dk_rotated, lo_rotated
            self._backward_band(tile, band, grads, keys, dk, base)
        if dk_rotated is not None:
            grads.dk[:, :, lo_rotated : tile.last] += rotate(dk_rotated, *self._table(tile, lo_rotated), adjoint=True)

    def _backward_band(
        self, tile: _Tile, band: _Band, grads: _Gradients, keys: Tensor, dk: Tensor, base: int
    ) -> None:  # keys and dk: (B, kv_heads, S - base, D), counted from position base
        q = self._queries(tile, band)
        dout = grads.dout[:, tile.rows].index_select(2, band.heads).transpose(1, 2).to(self.dtype)
        delta = grads.delta[:, :, tile.rows].index_select(1, band.heads)[..., None]
        log_sum = grads.log_sum[:, :, tile.rows].index_select(1, band.heads)[..., None]
        dq = torch.zeros_like(q)
        for j0, j1 in self._chunks(self._first_key(tile, band), tile.last):
            k, v = keys[:, :, j0 - base : j1 - base], self._of_band(self.v[:, :, j0:j1], band)
            p = self._logits(q, k, tile, band, j0, j1).sub_(log_sum).exp_()
            self._add_to_keys(grads.dv[:, :, j0:j1], p, dout, band)
            ds = _queries_times_keys(dout, v).sub_(delta).mul_(p)
            dq += _heads_times_keys(ds, self._of_band(k, band))
            self._add_to_keys(dk[:, :, j0 - base : j1 - base], ds, q, band)
        if band.rotated:
            dq = rotate(dq, *self._table(tile, tile.first, queries=True), adjoint=True)
        grads.dq[:, tile.rows].index_copy_(2, band.heads, dq.transpose(1, 2))

    def _first_key(self, tile: _Tile, band: _Band) -> int:
        lo = 0 if band.reach is None else max(0, tile.first - band.reach + 1)
        return max(lo, tile.document_start)

    def _queries(self, tile: _Tile, band: _Band) -> Tensor:
        q = self.q[:, tile.rows].index_select(2, band.heads).transpose(1, 2).to(self.dtype)
        return rotate(q, *self._table(tile, tile.first, queries=True)) if band.rotated else q

    def _rotated_keys(self, tile: _Tile, lo: int) -> Tensor:
        return rotate(self.k[:, :, lo : tile.last], *self._table(tile, lo))

    def _table(self, tile: _Tile, lo: int, queries: bool = False) -> tuple[Tensor, Tensor]:
        """(last - lo, pairs) cosines and sines for positions lo..last - 1 relative to the tile's first."""
        assert self.rotary is not None
        back = 0 if queries else max(self.tile, 1 << max(0, self.keys - 1).bit_length())
        cos, sin = relative_table(self.rotary, back, self.tile, queries, self.q.device, self.dtype)
        span = slice(back + lo - tile.first, back + tile.last - tile.first)
        return cos[span], sin[span]

    def _of_band(self, keys: Tensor, band: _Band) -> Tensor:
        """(B, kv_heads, S, D) -> (B, 1 or n, S, D)."""
        return keys if band.kv_heads is None else keys.index_select(1, band.kv_heads)

    def _logits(self, q: Tensor, k: Tensor, tile: _Tile, band: _Band, j0: int, j1: int) -> Tensor:
        """(B, n, R, j1 - j0), -inf where unseen."""
        logits = _queries_times_keys(q, self._of_band(k, band))
        i = torch.arange(tile.first, tile.last, device=q.device)
        j = torch.arange(j0, j1, device=q.device)
        distance = i[:, None] - j
        if band.slopes is not None:
            logits.addcmul_(distance.to(self.dtype), band.slopes, value=-1.0)
        if j1 - 1 > tile.first:
            logits.masked_fill_(distance < 0, -torch.inf)
        if band.windows is not None and tile.last - 1 - j0 >= band.shortest_window:
            logits.masked_fill_(distance >= band.windows, -torch.inf)
        if tile.latest_start > j0:
            assert self.geometry.starts is not None
            logits.masked_fill_((j < self.geometry.starts[:, tile.first : tile.last, None])[:, None], -torch.inf)
        return logits

    def _chunks(self, lo: int, hi: int) -> Iterator[tuple[int, int]]:
        for j0 in range(lo, hi, self.chunk):
            yield j0, min(j0 + self.chunk, hi)

    @staticmethod
    def _add_to_keys(target: Tensor, weights: Tensor, rows: Tensor, band: _Band) -> None:
        """target[b, g, j] += sum over the heads of k/v head g and rows of weights[b, h, i, j] * rows[b, h, i]."""
        if band.kv_heads is None:
            target += (weights.flatten(1, 2).transpose(1, 2) @ rows.flatten(1, 2))[:, None]
        else:
            target.index_add_(1, band.kv_heads, weights.transpose(2, 3) @ rows)


def _on_host(values: Tensor | None, heads: int, otherwise: float) -> list[float]:
    return [otherwise] * heads if values is None else values.tolist()


def _queries_times_keys(q: Tensor, k: Tensor) -> Tensor:
    """(B, n, R, D), (B, 1 or n, S, D) -> (B, n, R, S); the one k/v head is one product for all heads."""
    if k.shape[1] == 1:
        return (q.flatten(1, 2) @ k[:, 0].transpose(1, 2)).unflatten(1, q.shape[1:3])
    return q @ k.transpose(2, 3)


def _heads_times_keys(p: Tensor, v: Tensor) -> Tensor:
    """(B, n, R, S), (B, 1 or n, S, D) -> (B, n, R, D)."""
    if v.shape[1] == 1:
        return (p.flatten(1, 2) @ v[:, 0]).unflatten(1, p.shape[1:3])
    return p @ v
