"""What every way of changing a document is: a step before its text becomes ids, and one behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from andromeda.data.synthetic.draws import Draws

Ids: TypeAlias = list[int]
Learned: TypeAlias = list[bool] | None  # of each id; None: all


def unchanged(parts: Sequence[Ids], _draws: Draws, _sentinels: Sequence[int]) -> tuple[Ids, Learned]:
    """For what is done with the text alone."""
    (ids,) = parts
    return ids, None


@dataclass(frozen=True)
class Technique:
    """A way of changing a document.

    Attributes:
        parts: (text, draws) -> the texts that are encoded one by one.
        joined: (their ids, draws, ids of the sentinels) -> the document's ids, and which of them are learned.
        sentinels: control tokens that it puts between the parts, by name.
        masks: not all ids are learned.
    """

    parts: Callable[[str, Draws], Sequence[str]]
    joined: Callable[[Sequence[Ids], Draws, Sequence[int]], tuple[Ids, Learned]] = unchanged
    sentinels: tuple[str, ...] = ()
    masks: bool = False
