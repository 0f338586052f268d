"""From the rows of a step to logits: lays their tokens flat, runs the model over them once. No policy.

Shapes: R rows, T tokens, n tokens that ask for the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from andromeda.inference.engine.batch import Batch, Few, Part, Shift, Single
from andromeda.inference.engine.blocks import PAGE
from andromeda.inference.engine.packed import pack
from andromeda.inference.engine.pages import Pages
from andromeda.inference.engine.scheduler import Row, Text
from andromeda.inference.engine.static import StaticSteps
from andromeda.inference.engine.written import cpu_blocks
from andromeda.kernels import Geometry, PageLayout, choose_backend
from andromeda.kernels.cpu.blocks import Blocks, StepRows
from andromeda.kernels.cpu.linear import MOST_ROWS, PackedLinear
from andromeda.kernels.paged import MAX_NEW, MAX_UNITS
from andromeda.model import Andromeda, Certificate, Pass
from andromeda.positions import rotary

FIRST_WIDTH = 16  # pages of a text that the page table has room for at first


class Runner:
    """The model and the tensors of its cache.

    Args:
        max_running: slots of texts.
        longest: tokens that a text may have.
        static: whether steps of one token a text run over tensors that stay where they are; None: as CUDA graphs, where
            the decode kernel runs.
        compiled: as of `pack`.
    """

    def __init__(
        self,
        model: Andromeda,
        pages: Pages,
        max_running: int,
        longest: int,
        static: bool | None = None,
        compiled: bool = False,
    ) -> None:
        self.model, self.pages, self.max_running = model, pages, max_running
        self.device = model.output_weight.device
        self._blocks = pack(model, compiled)
        self._writing = None if self._blocks is None else cpu_blocks(model, self._blocks, pages)
        self._to_logits = None if self._writing is None else PackedLinear(model.output_weight)
        self._certificates: dict[int, Certificate] = {}
        self._table = np.zeros((max_running, FIRST_WIDTH), np.int32)  # the pages of the text at each slot
        self._entered: list[tuple[list[int], int]] = [([], 0)] * max_running  # whose, and how many of them
        graphs = can_record(model, max_running)
        self._static = None
        if graphs if static is None else static:
            self._static = StaticSteps(self._forward, pages, max_running, longest, graphs)

    def lay_out(self, rows: Sequence[Row]) -> Step:
        """Where everything is in a step; the texts' slots and pages are then as they are now."""
        return Step(rows, self._enter(rows), self.pages.shifts is not None)

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """Reads a step's rows: logits (n, num_tokens) of the tokens that ask for the next one, in the order of rows."""
        if step.shifts and step.fresh.any():
            self.pages.clear_shifts(self._on_device(step.before[step.fresh]))
        if self._static is not None and step.only_singles:
            return self._static.run(step.slots, step.numbers())
        asking = step.asking()
        wanted = None if asking is None else self._on_device(asking)
        if self._writing is not None and step.only_few:
            return self._write(step, self._writing, wanted)
        step.batch = self._batch(step)
        return self._forward(self._on_device(step.ids), step.batch, wanted)

    def _forward(self, ids: Tensor, batch: Batch, wanted: Tensor | None = None) -> Tensor:
        """ids (T,) -> logits (T, num_tokens), or those of the tokens wanted, (n,)."""
        hidden = self.model.hidden(ids[None], ragged=batch, blocks=self._blocks)[0]
        return self.model.logits(hidden if wanted is None else hidden[wanted])

    def _write(self, step: Step, blocks: Blocks, wanted: Tensor | None) -> Tensor:
        """As `_forward`, by the C++ kernels: blocks in one call, with the model's own around them."""
        rows = step.as_rows()
        longest = int(rows.lengths.max())
        batch = step.batch = Batch(self.pages, rows.positions, longest, {}, rows.cells, [], rows.before)

        def all_blocks(x: Tensor, shared: Pass) -> Tensor:
            out, kept = blocks(x[0], rows, None if shared.q_scale is None else shared.q_scale[0, :, :, 0])
            batch.kept = [] if kept is None else list(kept)
            return out[None]

        ids = torch.from_numpy(step.ids)
        hidden = self.model.hidden(ids[None], ragged=batch, blocks=[all_blocks])[0]
        assert self._to_logits is not None
        return self._to_logits(hidden if wanted is None else hidden[wanted])

    @torch.inference_mode()
    def keep(self, step: Step, taken: Sequence[int]) -> None:
        """After the draw: how many tokens of each row that had drafts belong to its text, in the order of rows.

        Shift states behind them could not be known before.
        """
        if step.drafted and self.pages.shifts is not None:
            assert step.batch is not None
            states, pages = step.states_of_drafted(taken, self.pages.shifts.shape[3])
            step.batch.keep(self._on_device(states), self._on_device(pages))

    def _enter(self, rows: Sequence[Row]) -> NDArray[np.int32]:
        """The page table, with what is new of these rows' texts."""
        for row in rows:
            slot, pages = row.text.slot, row.text.pages
            whose, known = self._entered[slot]
            if whose is pages and known == len(pages):
                continue
            if whose is not pages:
                known = 0
            if len(pages) > self._table.shape[1]:
                grown = np.zeros((self.max_running, max(len(pages), 2 * self._table.shape[1])), np.int32)
                grown[:, : self._table.shape[1]] = self._table
                self._table = grown
            self._table[slot, known : len(pages)] = pages[known:]
            if self._static is not None:
                self._static.enter(slot, known, pages[known:])
            self._entered[slot] = pages, len(pages)
        return self._table

    def _batch(self, step: Step) -> Batch:
        config, device = self.model.config, self._on_device
        singles, few = step.singles, step.few
        parts: list[Single | Few | Part] = []
        lengths = step.starts + step.counts
        width = -(-int(lengths.max()) // PAGE)
        tables = step.table[:, :width]
        if singles:
            parts.append(Single(slice(0, singles), self._layout(tables[:singles], lengths[:singles])))
        if few:
            tokens, places = step.few_tokens()
            rows = slice(singles, singles + few)
            parts.append(Few(device(tokens), device(places), self._layout(tables[rows], lengths[rows])))
        for row in range(singles + few, len(step.rows)):
            first, length = int(step.firsts[row]), int(lengths[row])
            pages = step.table[row, : -(-length // PAGE)].astype(np.int64)
            parts.append(Part(slice(first, first + int(step.counts[row])), device(pages), length, config.attn_flash))
        batch = Batch(
            self.pages, device(step.positions), int(lengths.max()), self._certificates, device(step.cells), parts, None
        )
        if self.pages.shifts is not None:
            batch.before = device(step.before)
            if step.only_singles:
                batch.ends = device(step.ends)
            else:
                batch.by_index = self._shift(step, self.pages.shifts.shape[3])
        return batch

    def _shift(self, step: Step, amount: int) -> Shift:
        device = self._on_device
        delayed = [step.behind(np.arange(len(step.ids)), i, amount) for i in range(1, amount + 1)]
        tokens = step.state_tokens()
        return Shift(
            [device(source) for source in delayed],
            device(step.states(tokens, amount)),
            device(step.pages[tokens]),
            device(step.kept(amount)) if step.drafted else None,
        )

    def _layout(self, table: NDArray[np.int32], lengths: NDArray[np.int64]) -> PageLayout:
        return PageLayout(self._on_device(table), lengths.tolist(), PAGE)

    def _on_device(self, x: NDArray[np.int64] | NDArray[np.int32]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(x))
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)


def can_record(model: Andromeda, rows: int) -> bool:
    """Whether steps of so many rows can be CUDA graphs: where the decode kernel runs, without the host."""
    weight, config = model.output_weight, model.config
    geometry = Geometry(rotary=rotary(config))
    backend = choose_backend(weight.device, weight.dtype, config.dim_head, 1, geometry, flash=True, step=True)
    return backend == "decode" and 2 * rows * config.kv_heads <= MAX_UNITS


class Step:
    """Where everything is in one step, as arrays on the host.

    Rows are in this order: those of one token; of a few, with drafts and then without; parts of prompts.

    Attributes:
        slots: (R,) of the rows' texts.
        starts, counts: (R,) a row's first position, and its tokens. firsts: which of the T its first token is.
        ids, positions, cells, pages: (T,) cells are places in the cache, counted in tokens of all pages.
        table: (R, width) pages of each row's text.
        before, ends: (R,) the page that holds the shift state before a row, and that of the token of a row of one.
        fresh: (R,) whether a row begins its text.
        singles, few, drafted: how many rows are of one token, of a few, and of these with drafts.
    """

    def __init__(self, rows: Sequence[Row], table: NDArray[np.int32], shifts: bool) -> None:
        self.batch: Batch | None = None
        self.only_singles = all(row.count == row.draws == 1 for row in rows)
        self.rows = list(rows) if self.only_singles else sorted(rows, key=_kind)
        self.slots = np.array([row.text.slot for row in self.rows], np.int64)
        self.starts = np.array([row.start for row in self.rows], np.int64)
        self.counts = np.array([row.count for row in self.rows], np.int64)
        self.table = table[self.slots]
        if self.only_singles:
            self._lay_out_singles()
        else:
            self._lay_flat()
        self.pages = self.table[self.row_of, self.positions // PAGE].astype(np.int64)
        self.cells = self.pages * PAGE + self.positions % PAGE
        self.shifts = shifts
        if shifts:
            self.fresh = self.starts == 0
            self.before = self.table[np.arange(len(rows)), np.maximum(self.starts - 1, 0) // PAGE].astype(np.int64)
            self.ends = self.pages  # of rows of one token

    def _lay_out_singles(self) -> None:
        self.singles, self.drafted, self.few = len(self.rows), 0, 0
        self.ids = np.array([row.text.ids[row.start] for row in self.rows], np.int64)
        self.firsts = self.row_of = np.arange(len(self.rows))
        self.positions = self.starts

    def _lay_flat(self) -> None:
        kinds = [_kind(row) for row in self.rows]
        self.singles, self.drafted = kinds.count(0), kinds.count(1)
        self.few = self.drafted + kinds.count(2)
        self.ids = np.array([token for row in self.rows for token in _tokens(row)], np.int64)
        self.firsts = np.cumsum(self.counts) - self.counts
        self.row_of = np.repeat(np.arange(len(self.rows)), self.counts)
        self.positions = np.arange(len(self.ids)) - (self.firsts - self.starts)[self.row_of]

    def numbers(self) -> dict[str, NDArray[np.int64]]:
        """Of rows of one token each, as `StaticSteps` takes them."""
        numbers = {"ids": self.ids, "positions": self.positions, "cells": self.cells, "lengths": self.starts + 1}
        return numbers | ({"before": self.before, "ends": self.ends} if self.shifts else {})

    def asking(self) -> NDArray[np.int64] | None:
        """(n,) tokens that ask for the next one, in the order of rows; None: all do."""
        if self.only_singles:
            return None
        ends = self.firsts + self.counts
        return np.concatenate(
            [np.arange(end - row.draws, end) for row, end in zip(self.rows, ends.tolist(), strict=True)]
        )

    @property
    def only_few(self) -> bool:
        """Whether all rows are of one token or of a few, and not too many for the C++ kernels."""
        return self.singles + self.few == len(self.rows) and len(self.ids) <= MOST_ROWS

    def as_rows(self) -> StepRows:
        """As the C++ kernels take them."""
        lengths = self.starts + self.counts
        firsts, counts, ends = (torch.from_numpy(x.astype(np.int32)) for x in (self.firsts, self.counts, lengths))
        table, positions, cells = (torch.from_numpy(x) for x in (self.table, self.positions, self.cells))
        before = torch.from_numpy(self.before) if self.shifts else None
        drafted = range(self.singles, self.singles + self.drafted)
        return StepRows(firsts, counts, ends, table, positions, cells, before, drafted)

    def few_tokens(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As `Few.tokens` and `Few.places`."""
        rows = slice(self.singles, self.singles + self.few)
        counts, ends = self.counts[rows, None], (self.firsts + self.counts)[rows, None]
        column = np.arange(counts.max())[::-1]  # tokens before the last
        inside = column < counts
        return ends - 1 - np.minimum(column, counts - 1), np.flatnonzero(inside)

    def behind(self, tokens: NDArray[np.int64], by: int, amount: int) -> NDArray[np.int64]:
        """Where the token `by` before each of these is, as `Shift` counts."""
        row = self.row_of[tokens]
        offset = tokens - self.firsts[row] - by
        return np.where(offset >= 0, len(self.rows) * amount + tokens - by, row * amount + amount + offset)

    def states(self, tokens: NDArray[np.int64], amount: int) -> NDArray[np.int64]:
        """(n, s) where the last `amount` tokens up to each of these are."""
        return np.stack([self.behind(tokens, by, amount) for by in range(amount - 1, -1, -1)], axis=1)

    def state_tokens(self) -> NDArray[np.int64]:
        """Tokens whose shift states are kept: the last of each page and of each row, but for rows with drafts."""
        last = self.positions % PAGE == PAGE - 1
        last[self.firsts + self.counts - 1] = True
        first, end = self._drafted_tokens()
        last[first:end] = False
        return np.flatnonzero(last)

    def kept(self, amount: int) -> NDArray[np.int64]:
        """(k,) what is before the rows with drafts, and their tokens."""
        rows, (first, end) = slice(self.singles, self.singles + self.drafted), self._drafted_tokens()
        before = np.arange(len(self.rows) * amount).reshape(-1, amount)[rows]
        return np.concatenate([before.ravel(), len(self.rows) * amount + np.arange(first, end)])

    def states_of_drafted(self, taken: Sequence[int], amount: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As `Batch.keep` wants them, of so many tokens of each row with drafts."""
        rows, (first, end) = slice(self.singles, self.singles + self.drafted), self._drafted_tokens()
        tokens = np.arange(first, end)
        last = self.firsts[rows] + np.array(taken) - 1  # of each row
        row = self.row_of[first:end] - self.singles
        keeps = (tokens == last[row]) | ((self.positions[first:end] % PAGE == PAGE - 1) & (tokens < last[row]))
        tokens = tokens[keeps]
        place = self.states(tokens, amount)
        before = place < len(self.rows) * amount
        return np.where(
            before,
            place - self.singles * amount,
            place - len(self.rows) * amount - first + self.drafted * amount,
        ), self.pages[tokens]

    def _drafted_tokens(self) -> tuple[int, int]:
        """The first of the tokens of rows with drafts, and the end."""
        counts = self.counts[self.singles : self.singles + self.drafted]
        return self.singles, self.singles + int(counts.sum())


def _kind(row: Row) -> int:
    if row.count == 1:
        return 0
    if row.count > MAX_NEW:
        return 3
    return 1 if row.text.drafts else 2


def _tokens(row: Row) -> list[int]:
    text: Text = row.text
    return (text.ids[row.start : row.start + row.count] + text.drafts)[: row.count]
