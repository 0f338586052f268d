"""Drafts of what comes next, found in the text itself: what followed the last time that its end occurred. No tensors.

Prompt-lookup decoding (Saxena 2023). It costs nothing and is right where a text repeats itself or its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3  # tokens of the end that must have occurred before


class Lookup:
    """Where in a growing text each run of NGRAM tokens last occurred."""

    def __init__(self) -> None:
        self._behind: dict[tuple[int, ...], int] = {}  # run -> the place behind it
        self._indexed = NGRAM  # runs that end before this place are there

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """At most so many tokens that may follow `ids`, which is the text given last time or goes on from it."""
        for end in range(self._indexed, len(ids)):
            self._behind[tuple(ids[end - NGRAM : end])] = end
        self._indexed = max(self._indexed, len(ids))
        start = self._behind.get(tuple(ids[-NGRAM:]))
        if start is None:
            return []
        period = len(ids) - start  # behind the text's end it goes on as a loop
        return [ids[start + i % period] for i in range(most)]
