"""The runner of a model's prompts: kernels where they can run, else the model; directly, or recorded and replayed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from andromeda.cache import Cache
from andromeda.context import Context
from andromeda.errors import AndromedaError
from andromeda.inference.prefill.coverage import PRECISIONS, heads_in_fp8, why_not
from andromeda.inference.prefill.weights import pack
from andromeda.model import Andromeda

if TYPE_CHECKING:
    from andromeda.inference.prefill.blocks import Step
    from andromeda.inference.prefill.memory import Space


@dataclass(frozen=True)
class _Recording:
    """A prompt's kernels as a CUDA graph, which reads `ids` and writes `logits`."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor  # (B, T)
    logits: Tensor  # (B, 1, num_tokens)
    space: Space  # has to live as long as the graph


class Prefill:
    """A runner of one model's prompts. Weights are packed once: after a change of the model build a new one.

    Where its kernels cannot run (no CUDA device, a configuration that they do not cover) the model itself does the
    work; `reason` says why.

    Args:
        model: its parameters stay as they are.
        precision: 'bf16', or 'fp8' (products in e4m3, the rest in bf16); 'fp32' for tests under Triton's interpreter.
        graph: without a cache, record a prompt length's kernels as a CUDA graph and replay them: it saves the time
            to launch them, which counts for short prompts.

    Raises:
        AndromedaError: no such precision.
    """

    def __init__(self, model: Andromeda, precision: str = "bf16", *, graph: bool = False) -> None:
        if precision not in PRECISIONS:
            raise AndromedaError(f"prefill: precision={precision!r} is not one of {', '.join(PRECISIONS)}")
        self.model, self.config, self.precision = model, model.config, precision
        self.device = model.output_weight.device
        self.reason = why_not(self.config, precision, self.device)
        self.graph = graph and self.device.type == "cuda"
        self.heads8 = heads_in_fp8(self.config) if precision == "fp8" else 0
        self._space: tuple[tuple[int, int, int], Space] | None = None
        self._recording: _Recording | None = None
        if self.reason is None:
            on_gpu = self.device.type == "cuda" and precision != "fp32"
            self.dtype = torch.bfloat16 if on_gpu or precision == "bf16" else torch.float32
            with torch.no_grad():
                self._layers = pack(model, self.dtype, in_fp8=precision == "fp8")

    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: Cache | None = None, context: Context | None = None) -> Tensor:
        """Logits (B, 1, num_tokens) of the last of the tokens ids (B, T).

        Args:
            ids: token ids.
            cache: what came before; it is extended by these tokens.
            context: processes that share the work on one prompt, which all of them are given whole; all return the
                logits, and fill their caches with all of it. By the model, for the kernels of this package know whole
                prompts alone.

        Raises:
            AndromedaError: a context that was made for another number of tokens, or beside a cache that is not empty.
        """
        if context is not None:
            last = self.model(context.split(ids), cache=cache, context=context, last_only=True)
            return context.from_last(last, (len(ids), 1, last.shape[2]))
        if self.reason is not None:
            return self.model(ids, cache=cache, last_only=True)
        self.model._check_ids(ids)
        with self._on_device():
            if self.graph and cache is None:
                return self._replay(ids)
            return self._run(ids, cache)

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """Output of the last block for all tokens, normalised: (B, T, dim). For measures of quality."""
        if self.reason is not None:
            return self.model.hidden(ids)
        with self._on_device():
            return self._normalised(self.begin(ids).all_blocks())

    def begin(self, ids: Tensor, cache: Cache | None = None) -> Step:
        """The embedding of ids (B, T) where the first block looks for it; what comes next is up to the caller."""
        from andromeda.inference.prefill.blocks import Step

        held = 0 if cache is None else cache.length
        step = Step(self.config, self._layers, self._memory(ids, held), ids.shape[1], held, cache)
        step.enter(self.model.embedding(ids).to(self.dtype))
        return step

    def _run(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        step = self.begin(ids, cache)
        for n in range(self.config.depth - 1):
            step.block(n)
        hidden = step.last_block()
        if cache is not None:
            cache.advance(step.tokens)
        return self.model.logits(self._normalised(hidden))

    def _normalised(self, hidden: Tensor) -> Tensor:
        return self.model.norm(hidden.to(self.model.output_weight.dtype))

    def _memory(self, ids: Tensor, held: int) -> Space:
        from andromeda.inference.prefill.memory import allocate

        shape = ids.shape[0], ids.shape[1], held
        if self._space is None or self._space[0] != shape:
            self._space = None  # gives the old one's memory back first
            self._space = shape, allocate(self.config, self._layers, self.dtype, *shape)
        return self._space[1]

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _replay(self, ids: Tensor) -> Tensor:
        if self._recording is None or self._recording.ids.shape != ids.shape:
            self._recording = None
            self._recording = self._record(ids)
        recording = self._recording
        recording.ids.copy_(ids)
        recording.graph.replay()
        return recording.logits.clone()

    def _record(self, ids: Tensor) -> _Recording:
        source, graph, side = ids.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets libraries set up what cannot be recorded
            self._run(source)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            logits = self._run(source)
        return _Recording(graph, source, logits, self._memory(ids, 0))
