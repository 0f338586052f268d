"""What constraints allow, worked out by threads while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from andromeda.inference.engine.request import Constraint

THREADS = 4


class Masks:
    """Worker threads, and the masks of one step at a time.

    Args:
        vocab_size: a mask has a bit for each token below it.
    """

    def __init__(self, vocab_size: int) -> None:
        self._words = -(-vocab_size // 32)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="mask")
        self._rows: NDArray[np.int32] | None = None
        self._coming: list[tuple[slice, Future[None]]] = []

    def start(self, constraints: Sequence[tuple[Constraint | None, Sequence[int]]]) -> None:
        """Begins with the masks of texts and their drafts: one for what comes next, and one behind each draft."""
        self._rows, self._coming = None, []
        if all(constraint is None for constraint, _ in constraints):
            return
        total = sum(1 + len(drafts) for _, drafts in constraints)
        self._rows = np.full((total, self._words), -1, np.int32)
        first = 0
        for constraint, drafts in constraints:
            rows = slice(first, first + 1 + len(drafts))
            first = rows.stop
            if constraint is not None:
                job = self._threads.submit(fill, self._rows[rows], constraint, drafts)
                self._coming.append((rows, job))

    def finish(self) -> tuple[NDArray[np.int32] | None, dict[int, Exception]]:
        """All masks, (n, words), None where nothing is constrained; and what failed, by its first row."""
        failed = {}
        for rows, job in self._coming:
            error = job.exception()
            if isinstance(error, Exception):
                failed[rows.start] = error
            elif error is not None:
                raise error
        return self._rows, failed

    def close(self) -> None:
        self._threads.shutdown()


def fill(rows: NDArray[np.int32], constraint: Constraint, drafts: Sequence[int]) -> None:
    """Masks (1 + drafts, words) before each draft and behind the last; the constraint is left where it was.

    Behind a draft that may not come anything may: it is not drawn, and what follows it is not asked for.
    """
    moved = 0
    try:
        constraint.fill_mask(rows[0])
        for row, draft in zip(rows[1:], drafts, strict=True):
            if not constraint.advance([draft]):
                break
            moved += 1
            constraint.fill_mask(row)
    finally:
        constraint.rollback(moved)
