"""Steps of one token a text over tensors that stay where they are: on a GPU, CUDA graphs.

A step has a row for each slot up to a power of two; a slot whose text is not in the step reads padding. What a step
changes is copied into the tensors, and the graph of that many rows is replayed. Without graphs the same code runs as it
is, which is how it is tested on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from andromeda.inference.engine.batch import Batch, Single
from andromeda.inference.engine.blocks import PAGE
from andromeda.inference.engine.pages import Pages
from andromeda.kernels import PageLayout
from andromeda.model import Certificate

NAMES = ("ids", "positions", "cells", "lengths", "before", "ends")  # what a step changes, a number a row each
WARM_UPS = 2  # passes before a graph is recorded: kernels are compiled, and what is computed once is computed

Forward = Callable[[Tensor, Batch], Tensor]  # ids (T,) and their batch -> logits (T, num_tokens)


class StaticSteps:
    """The graphs of one model and cache, each recorded when first needed.

    Args:
        longest: tokens that a text may have.
        graphs: whether to record; else each step runs as it is.
    """

    def __init__(self, forward: Forward, pages: Pages, max_running: int, longest: int, graphs: bool) -> None:
        self._forward, self._pages, self._longest, self._graphs = forward, pages, longest, graphs
        device = pages.keys.device
        rows = 1 << (max_running - 1).bit_length()
        self._table = torch.zeros(rows, -(-longest // PAGE), dtype=torch.int32, device=device)
        self._numbers = torch.zeros(len(NAMES), rows, dtype=torch.int64, device=device)
        self._certificates: dict[int, Certificate] = {}
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None  # memory that the graphs share

    def enter(self, slot: int, first: int, pages: list[int]) -> None:
        """The text at this slot has these pages, from its page `first` on."""
        self._table[slot, first : first + len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def run(self, slots: NDArray[np.int64], numbers: Mapping[str, NDArray[np.int64]]) -> Tensor:
        """Logits (R, num_tokens) of texts at these slots.

        Args:
            numbers: (R,) each of NAMES; `cells`, `before` and `ends` as of `Batch`.
        """
        rows = 1 << int(slots.max()).bit_length()
        if self._graphs and rows not in self._recorded:
            self._copy(rows, slots[:0], {})
            self._recorded[rows] = self._record(rows)
        self._copy(rows, slots, numbers)
        if self._graphs:
            graph, logits = self._recorded[rows]
            graph.replay()
        else:
            logits = self._pass(rows)
        if slots.tolist() == list(range(len(slots))):
            return logits[: len(slots)]
        return logits[torch.from_numpy(slots).to(logits.device)]

    def _copy(self, rows: int, slots: NDArray[np.int64], numbers: Mapping[str, NDArray[np.int64]]) -> None:
        """Into the tensors; what is not at these slots is padding, one token at the beginning of page 0."""
        host = np.zeros((len(NAMES), rows), np.int64)
        host[NAMES.index("lengths")] = 1
        for name, values in numbers.items():
            host[NAMES.index(name), slots] = values
        changed = torch.from_numpy(host)
        if self._numbers.is_cuda:
            changed = changed.pin_memory()
        self._numbers[:, :rows].copy_(changed, non_blocking=True)

    def _pass(self, rows: int) -> Tensor:
        ids, positions, cells, lengths, before, ends = self._numbers[:, :rows]
        layout = PageLayout(self._table[:rows], lengths.to(torch.int32), PAGE)
        shifted = self._pages.shifts is not None
        batch = Batch(
            self._pages, positions, self._longest, self._certificates, cells, [Single(slice(0, rows), layout)],
            before if shifted else None, ends if shifted else None,
        )  # fmt: skip
        return self._forward(ids, batch)

    def _record(self, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """With padding alone: to run a step twice would shift its tokens twice."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._pass(rows)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._pass(rows)
        self._pool = graph.pool()
        return graph, logits
