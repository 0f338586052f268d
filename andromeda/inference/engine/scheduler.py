"""Who reads how many tokens in each step, and who holds which pages. No tensors.

Each step: first a token for each text that is being written, with drafts where there is room; then parts of prompts, in
order of arrival, those of new texts that fit among them. Each prompt takes half of what is left, so that a short one
does not wait for a long one; what nobody behind has a use for goes to the first. When a text that is being written
needs a page and there is none, the one that arrived last gives back its own and waits; it is read again later.
So texts that run arrived before all that wait, and the first always moves on.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from andromeda.inference.engine.blocks import PAGE, PagePool, extend_hashes

WAITING, ENDED = -1, -2  # in place of a slot


@dataclass(eq=False)
class Text:
    """One text that is read and written.

    Attributes:
        ids: the prompt, and what came since.
        prompt_tokens: of ids.
        slot: its place among those that run.
        pages: that hold the first `computed` tokens, and have room for those to come.
        drafts: that are read in this step behind ids.
        cached_tokens: of the prompt, found in the cache when it first ran.
    """

    ids: list[int]
    prompt_tokens: int
    slot: int = WAITING
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    drafts: list[int] = field(default_factory=list)
    cached_tokens: int | None = None
    hashes: list[bytes] = field(default_factory=list)  # of full pages


@dataclass(frozen=True)
class Row:
    """What one text reads in a step: tokens start .. start + count - 1 of ids and drafts.

    Attributes:
        draws: how many of its last tokens ask for the next one: none before a prompt's end.
    """

    text: Text
    start: int
    count: int
    draws: int


class Scheduler:
    """Texts that wait and that run.

    Args:
        max_running: texts at a time.
        step_tokens: of a step, at least max_running.
        draft: what may follow a text, at most so many tokens; None: no drafts.
    """

    def __init__(
        self,
        pool: PagePool,
        max_running: int,
        step_tokens: int,
        draft: Callable[[Text, int], list[int]] | None = None,
    ) -> None:
        self.pool, self.step_tokens = pool, step_tokens
        self.waiting: deque[Text] = deque()
        self.running: list[Text] = []
        self.preemptions = 0
        self._draft = draft
        self._slots = list(range(max_running))  # a heap: the lowest are taken, so that few rows hold all
        self._coming: dict[bytes, Text] = {}  # full pages of prompts that running texts have yet to read

    def add(self, text: Text) -> None:
        self.waiting.append(text)

    def plan(self) -> list[Row]:
        """The next step; none where nothing is to be done."""
        rows = self._written()
        budget = self.step_tokens - sum(row.count for row in rows)
        parts: list[Row] = []
        for text in self.running:
            if budget and not _is_written(text):
                parts.append(_part(text, _share(budget)))
                budget -= parts[-1].count
        while budget and self.waiting and self._slots and self._admit(self.waiting[0]):
            text = self.waiting.popleft()
            parts.append(_part(text, _share(budget)))
            budget -= parts[-1].count
        for place, row in enumerate(parts):
            parts[place] = _part(row.text, row.count + budget)
            budget -= parts[place].count - row.count
        return rows + parts

    def advance(self, row: Row, new: Sequence[int]) -> None:
        """A row was read, and these tokens came of it: the drafts that were right, and one more."""
        text = row.text
        text.drafts = []
        text.computed = row.start + row.count if not new else len(text.ids) + len(new) - 1
        text.ids += new
        if self.pool.prefix_cache:
            first, end = row.start // PAGE, text.computed // PAGE
            extend_hashes(text.hashes, text.ids, end)
            for page, known in zip(text.pages[first:end], text.hashes[first:end], strict=True):
                self.pool.register(page, known)
                self._coming.pop(known, None)

    def end(self, text: Text) -> None:
        """Takes a text out, wherever it is; what it held is free."""
        if text.slot == WAITING:
            self.waiting.remove(text)
        elif text.slot != ENDED:
            self.running.remove(text)
            self._give_back(text)
        text.slot = ENDED

    def _written(self) -> list[Row]:
        """Rows of texts of which all but the last token has been read."""
        rows: list[Row] = []
        for text in [text for text in self.running if _is_written(text)]:
            if text.slot == WAITING:  # preempted by one before it
                continue
            while not self._grow(text, len(text.ids)):
                self._preempt(self.running[-1])
                if text.slot == WAITING:
                    break
            else:
                rows.append(Row(text, text.computed, 1, 1))
        if self._draft is None:
            return rows
        room = (self.step_tokens - len(rows)) // 2  # the rest is for prompts
        return [self._with_drafts(row, room // len(rows)) for row in rows]

    def _with_drafts(self, row: Row, most: int) -> Row:
        text = row.text
        assert self._draft is not None
        drafts = self._draft(text, most) if most else []
        while drafts and not self._grow(text, len(text.ids) + len(drafts)):
            drafts.pop()
        text.drafts = drafts
        return Row(text, row.start, 1 + len(drafts), 1 + len(drafts))

    def _grow(self, text: Text, tokens: int) -> bool:
        """Room for so many tokens, or False."""
        while len(text.pages) * PAGE < tokens:
            page = self.pool.take()
            if page is None:
                return False
            text.pages.append(page)
        return True

    def _admit(self, text: Text) -> bool:
        """Lets a text run if there is room for all that it has to read, and a page for each that runs to go on."""
        shared = self._shared(text)
        if shared is None:
            return False
        needed = -(-len(text.ids) // PAGE) - len(shared)
        self.pool.hold(shared)
        if needed + len(self.running) > self.pool.free:
            self.pool.release(shared)
            return False
        for known in text.hashes[len(shared) :]:
            self._coming.setdefault(known, text)
        text.pages, text.computed, text.slot = shared, len(shared) * PAGE, heapq.heappop(self._slots)
        self._grow(text, len(text.ids))
        if text.cached_tokens is None:
            text.cached_tokens = text.computed
        self.running.append(text)
        return True

    def _shared(self, text: Text) -> list[int] | None:
        """Pages that are there already; None: wait, for the next one is just being computed."""
        if not self.pool.prefix_cache:
            return []
        useful_pages = (len(text.ids) - 1) // PAGE  # one token at least is to be read
        extend_hashes(text.hashes, text.ids, useful_pages)
        useful = text.hashes[:useful_pages]
        shared = self.pool.find(useful)
        return None if len(shared) < len(useful) and useful[len(shared)] in self._coming else shared

    def _preempt(self, text: Text) -> None:
        self.running.pop()
        self._give_back(text)
        text.slot = WAITING
        self.waiting.appendleft(text)
        self.preemptions += 1

    def _give_back(self, text: Text) -> None:
        self.pool.release(text.pages)
        heapq.heappush(self._slots, text.slot)
        text.pages, text.drafts = [], []
        for known in text.hashes:
            if self._coming.get(known) is text:
                del self._coming[known]


def _is_written(text: Text) -> bool:
    return text.computed == len(text.ids) - 1


def _share(budget: int) -> int:
    """That one prompt takes at first; a few large parts cost less than many small ones."""
    return min(budget, max(budget // 2, PAGE))


def _part(text: Text, most: int) -> Row:
    left = len(text.ids) - text.computed
    return Row(text, text.computed, min(most, left), int(left <= most))
