"""Many texts at once: requests come and go at any time, each step moves all that run on by a token or more.

The texts are those that `generate` writes, one request at a time: whatever else runs, however prompts are cut, whether
a prefix was found in the cache, whether a text gave back its pages and was read again, and whatever was drafted.

    engine = Engine(model)
    number = engine.add(Request(ids, max_new_tokens=100, seed=1))
    while engine.busy:
        for number, update in engine.step():
            ...
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from andromeda.errors import AndromedaError
from andromeda.inference.engine.blocks import PAGE, PagePool
from andromeda.inference.engine.lookup import Lookup
from andromeda.inference.engine.masks import Masks
from andromeda.inference.engine.memory import default_num_pages, pages_in
from andromeda.inference.engine.pages import Pages
from andromeda.inference.engine.quantise import quantise
from andromeda.inference.engine.request import Constraint, FinishReason, Request, Stats, Token, Update
from andromeda.inference.engine.runner import Runner, can_record
from andromeda.inference.engine.sampler import Asking, Draws, draw, with_logprobs
from andromeda.inference.engine.scheduler import Row, Scheduler, Text
from andromeda.inference.sampling import why_none
from andromeda.kernels.paged import MAX_NEW
from andromeda.model import Andromeda, check_range

LOG = logging.getLogger(__name__)
MAX_RUNNING = 64
STEP_TOKENS = {"cpu": 512}  # of a step; on other devices
ACCELERATOR_STEP_TOKENS = 2048
FIRST_DRAFT = 4  # tokens drafted at first; twice as many when all were right, half when none was


@dataclass(eq=False)
class _Open:
    """A request that is being answered."""

    number: int
    request: Request
    text: Text
    most: int  # new tokens
    draws: Draws
    lookup: Lookup
    draft_tokens: int = FIRST_DRAFT

    def learn(self, drafted: int, right: int, most: int) -> None:
        """Drafts more where all was right, less where nothing was."""
        if right == drafted:
            self.draft_tokens = min(most, 2 * self.draft_tokens)
        elif right == 0:
            self.draft_tokens = max(1, self.draft_tokens // 2)


class Engine:
    """Continuous batching over one model. Not for several threads: see `service`.

    Args:
        model: in eval mode, on the device that it is to run on. It is the engine's from now on: it computes what it
            did, but its weights are packed (see `packed`).
        vocab_size: draw ids below it alone, for a tokenizer that has fewer than the model; None: any.
        max_running: texts that are written at a time; others wait.
        step_tokens: read in one step, of all texts; None: so many that what is being written does not stall.
        memory_bytes: of the cache; None: a share of what the device has free, and never more than useful.
        num_pages: of the cache, in place of memory_bytes.
        speculate: tokens that may be drafted for a text in a step; texts are the same. None: 15, and 0 where that makes
            CUDA graphs of the steps.
        prefix_cache: keep what was read for prompts that begin alike.
        static: whether steps in which each text is written by one token run over tensors that stay where they are;
            None: where that makes CUDA graphs of them.
        quantize: `int8` holds the model's weights in eight bits from now on.
        compile: whether what lies between products and attention goes through torch.compile, which takes half a minute
            at first, and on a CPU makes small steps slower.

    Raises:
        AndromedaError: an argument out of range, or no memory for a cache.
    """

    def __init__(
        self,
        model: Andromeda,
        *,
        vocab_size: int | None = None,
        max_running: int = MAX_RUNNING,
        step_tokens: int | None = None,
        memory_bytes: int | None = None,
        num_pages: int | None = None,
        speculate: int | None = None,
        prefix_cache: bool = True,
        static: bool | None = None,
        quantize: str | None = None,
        compile: bool = False,  # noqa: A002 - as torch has it
    ) -> None:
        if quantize is not None:
            quantise(model, quantize)
        config, weight = model.config, model.output_weight
        self.model, self.vocab_size = model, vocab_size or config.num_tokens
        step_tokens = step_tokens or STEP_TOKENS.get(weight.device.type, ACCELERATOR_STEP_TOKENS)
        if speculate is None:
            speculate = 0 if can_record(model, max_running) else MAX_NEW - 1
        _require(max_running >= 1, f"max_running={max_running} must be at least 1")
        _require(step_tokens >= 1, f"step_tokens={step_tokens} must be at least 1")
        _require(0 <= speculate < MAX_NEW, f"speculate={speculate} must lie between 0 and {MAX_NEW - 1}")
        if num_pages is None and memory_bytes is None:
            num_pages = default_num_pages(config, weight.dtype, weight.device, max_running)
        elif num_pages is None:
            assert memory_bytes is not None
            num_pages = pages_in(memory_bytes, config, weight.dtype)
        _require(
            num_pages >= 2,
            f"the cache has room for {max(0, num_pages - 1)} pages of {PAGE} tokens; give it more memory",
        )
        self.speculate = speculate
        self._pool = PagePool(num_pages, prefix_cache)
        draft = self._draft if speculate else None
        self._scheduler = Scheduler(self._pool, max_running, max(step_tokens, 2 * max_running), draft)
        pages = Pages(config, num_pages, weight.dtype, weight.device)
        self._runner = Runner(model, pages, max_running, self.max_tokens - 1, static, compile)
        self._masks = Masks(self.vocab_size)
        self._open: dict[int, _Open] = {}
        self._of_text: dict[Text, _Open] = {}
        self._numbers = 0
        self._totals = dict.fromkeys(("prompt", "cached", "new", "drafted", "accepted", "steps"), 0)

    @property
    def max_tokens(self) -> int:
        """That one text may have, prompt and new ones: as many as the cache holds, and one more, which is not read."""
        held = (self._pool.num_pages - 1) * PAGE
        config = self.model.config
        return 1 + (min(held, config.max_seq_len) if config.use_abs_pos_emb else held)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._open)

    def check(self, request: Request) -> None:
        """Raises AndromedaError for a request that could never be answered."""
        config, tokens = self.model.config, len(request.ids)
        _require(tokens > 0, "the prompt is empty; give at least one token")
        check_range(config, min(request.ids), max(request.ids))
        request.sampling.check(self.vocab_size)
        most = request.max_new_tokens
        _require(most >= 1, f"max_new_tokens={most} must be at least 1")
        seed, top = request.seed, request.top_logprobs
        _require(seed is None or 0 <= seed < 2**63, f"seed={seed} must lie between 0 and 2^63 - 1")
        _require(top is None or top >= 0, f"top_logprobs={top} must be 0 or more")
        if config.use_abs_pos_emb:
            most = min(most, config.max_seq_len + 1 - tokens)
            _require(
                most >= 1,
                f"the prompt has {tokens} tokens, but with use_abs_pos_emb=True max_seq_len={config.max_seq_len} is a "
                "hard limit; shorten it",
            )
        _require(
            tokens + most <= self.max_tokens,
            f"a prompt of {tokens} tokens and {most} new ones do not fit in the cache, which has room for "
            f"{self.max_tokens}; shorten the prompt, ask for fewer, or give the engine more memory",
        )

    def add(self, request: Request) -> int:
        """Takes a request; returns the number that its updates come under.

        Raises:
            AndromedaError: as of `check`.
        """
        self.check(request)
        self._numbers += 1
        ids, most = list(request.ids), request.max_new_tokens
        if self.model.config.use_abs_pos_emb:
            most = min(most, self.model.config.max_seq_len + 1 - len(ids))  # the last one is not read
        draws = Draws(request, self.vocab_size, self.model.output_weight.device)
        entry = _Open(self._numbers, request, Text(ids, len(ids)), most, draws, Lookup())
        self._open[entry.number] = self._of_text[entry.text] = entry
        self._scheduler.add(entry.text)
        self._totals["prompt"] += len(ids)
        return entry.number

    def abort(self, number: int) -> None:
        """Ends a request, if it has not ended; nothing comes of it any more, and what it held is free."""
        if number in self._open:
            self._end(self._open[number])

    def step(self) -> list[tuple[int, Update]]:
        """Moves all that run on, and lets in who waits; returns what came of it, by the requests' numbers.

        An exception on the way ends the requests of this step with an error, not the engine.
        """
        rows = self._scheduler.plan()
        if not rows:
            return []
        self._totals["steps"] += 1
        try:
            return self._step(rows)
        except Exception as error:  # such as memory that ran out; what was not in this step goes on
            LOG.exception("a step failed; it ends %d requests", len(rows))
            left = [self._of_text[row.text] for row in rows if row.text in self._of_text]
            return [self._fail(entry, _in_a_line(error)) for entry in left]

    def stats(self) -> Stats:
        totals = self._totals
        return Stats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            used_pages=self._pool.used,
            cached_pages=self._pool.kept,
            num_pages=self._pool.num_pages - 1,
            total_prompt_tokens=totals["prompt"],
            total_cached_tokens=totals["cached"],
            total_new_tokens=totals["new"],
            total_drafted_tokens=totals["drafted"],
            total_accepted_tokens=totals["accepted"],
            total_preemptions=self._scheduler.preemptions,
            total_steps=totals["steps"],
        )

    def close(self) -> None:
        """Ends all requests and the engine's threads."""
        for entry in list(self._open.values()):
            self._end(entry)
        self._masks.close()

    def _step(self, rows: Sequence[Row]) -> list[tuple[int, Update]]:
        step = self._runner.lay_out(rows)
        drawing = [(row, self._of_text[row.text]) for row in step.rows if row.draws]
        self._masks.start([(entry.request.constraint, row.text.drafts) for row, entry in drawing])
        logits = self._runner.run(step)[:, : self.vocab_size]
        masks, failed = self._masks.finish()
        asking = [
            Asking(entry.draws, _new_tokens(row.text) + place, row.text.drafts[:place])
            for row, entry in drawing
            for place in range(row.draws)
        ]
        ids = draw(asking, logits, None if masks is None else torch.from_numpy(masks).to(logits.device))
        ends = list(itertools.accumulate(row.draws for row in step.rows))
        drawn = [slice(end - row.draws, end) for row, end in zip(step.rows, ends, strict=True)]
        right = [_right(row.text.drafts, ids[span]) for row, span in zip(step.rows, drawn, strict=True)]
        self._runner.keep(step, [count for row, count in zip(step.rows, right, strict=True) if row.text.drafts])
        updates = []
        for row, span, count in zip(step.rows, drawn, right, strict=True):
            if not row.draws:
                self._scheduler.advance(row, [])
            elif span.start in failed:
                updates.append(self._fail(self._of_text[row.text], _in_a_line(failed[span.start])))
            else:
                updates.append(self._taken(row, ids[span][:count], logits[span]))
        return updates

    def _taken(self, row: Row, ids: Sequence[int], logits: Tensor) -> tuple[int, Update]:
        """As `_take`; what goes wrong ends this text alone: others of the step may have had their last token."""
        entry = self._of_text[row.text]
        try:
            return self._take(row, ids, logits)
        except Exception as error:
            LOG.exception("a step failed for one text, and ends it")
            return self._fail(entry, _in_a_line(error))

    def _take(self, row: Row, ids: Sequence[int], logits: Tensor) -> tuple[int, Update]:
        """A text goes on by what was drawn behind its last token and the drafts that were right."""
        text, entry = row.text, self._of_text[row.text]
        request, drafts = entry.request, text.drafts
        new = _up_to_stop(ids, request.stop_ids)
        if new[-1] < 0:
            return self._fail(entry, f"sampling: {_why_none(logits[len(new) - 1])}")
        stopped = new[-1] in request.stop_ids
        if request.constraint is not None:
            moving = new[: len(new) - stopped]
            try:
                moved = request.constraint.advance(moving)
            except Exception as error:  # noqa: BLE001 - whatever it raises ends this text alone
                return self._fail(entry, _in_a_line(error))
            if moved < len(moving):
                return self._fail(entry, f"engine: the constraint takes back token {moving[moved]}, which it allowed")
        if drafts:
            entry.learn(len(drafts), len(new) - 1, self.speculate)
            self._totals["drafted"] += len(drafts)
            self._totals["accepted"] += len(new) - 1
        if _new_tokens(text) == 0:
            self._totals["cached"] += text.cached_tokens or 0
        self._totals["new"] += len(new)
        tokens = self._tokens(request, new, logits)
        entry.draws.record(new)
        self._scheduler.advance(row, new)
        reason: FinishReason | None = "stop" if stopped else None
        if reason is None and _new_tokens(text) >= entry.most:
            reason = "length"
        if reason is not None:
            self._end(entry)
        return entry.number, Update(tokens, reason, text.cached_tokens or 0)

    def _tokens(self, request: Request, new: Sequence[int], logits: Tensor) -> tuple[Token, ...]:
        if request.top_logprobs is None:
            return tuple(map(Token, new))
        return tuple(with_logprobs(new, logits[: len(new)], request.top_logprobs))

    def _draft(self, text: Text, most: int) -> list[int]:
        """What may come next: what must, or what came the last time."""
        entry = self._of_text[text]
        most = min(most, self.speculate, entry.most - _new_tokens(text) - 1)
        if most < 1:
            return []
        return _forced(entry.request.constraint)[:most] or entry.lookup.draft(text.ids, min(most, entry.draft_tokens))

    def _fail(self, entry: _Open, reason: str) -> tuple[int, Update]:
        self._end(entry)
        return entry.number, Update((), "error", entry.text.cached_tokens or 0, reason)

    def _end(self, entry: _Open) -> None:
        del self._open[entry.number], self._of_text[entry.text]
        self._scheduler.end(entry.text)


def _forced(constraint: Constraint | None) -> list[int]:
    """None where it fails: its masks then fail as well, and that ends the text."""
    if constraint is None:
        return []
    try:
        return constraint.forced()
    except Exception:  # noqa: BLE001
        return []


def _new_tokens(text: Text) -> int:
    return len(text.ids) - text.prompt_tokens


def _right(drafts: Sequence[int], ids: Sequence[int]) -> int:
    """How many of the tokens drawn count: up to the first that is not what was drafted."""
    for place, draft in enumerate(drafts):
        if ids[place] != draft:
            return place + 1
    return len(drafts) + 1


def _up_to_stop(ids: Sequence[int], stop_ids: frozenset[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in stop_ids:
            return list(ids[: place + 1])
    return list(ids)


def _why_none(logits: Tensor) -> str:
    """Why nothing was drawn, given the model's own logits (vocab_size,)."""
    if bool(logits.amax().isfinite()):
        return "the constraint allows no token any more"
    return why_none(logits, "a row")


def _in_a_line(error: Exception) -> str:
    text = str(error) if isinstance(error, AndromedaError) else f"{type(error).__name__}: {error}"
    return f"engine: {text}".splitlines()[0]


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AndromedaError(f"engine: {what}")
