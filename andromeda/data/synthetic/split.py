"""Train or test: decided by what an instance is about, never by its number or its seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

from andromeda.data.synthetic.draws import Draws

T = TypeVar("T")
Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

TEST_BYTES = 32  # of the 256 first bytes a hash can have: an eighth of every space is for testing
MOST_TRIES = 64


class Unlucky(Exception):  # noqa: N818 - no error: the sample is drawn anew
    """What was drawn so far cannot be completed within the split."""


def split_of(content: str) -> Split:
    """The one split that a content belongs to, in every task and for every seed.

    A function of the content alone, so no content is in both splits. Content is written in a canonical form, with the
    kind of its space in front: `sum 12 34`, `key amber falcon`.
    """
    return "test" if hashlib.sha256(content.encode()).digest()[0] < TEST_BYTES else "train"


def within(split: Split, draw: Callable[[], T], content: Callable[[T], str]) -> T:
    """The first thing drawn whose content is of the split.

    Raises:
        Unlucky: none of MOST_TRIES is.
    """
    for _ in range(MOST_TRIES):
        drawn = draw()
        if split_of(content(drawn)) == split:
            return drawn
    raise Unlucky


def several_within(
    split: Split, draws: Draws, draw: Callable[[Draws], str], kind: str, count: int, avoid: tuple[str, ...] = ()
) -> list[str]:
    """`count` different words whose content, `kind word`, is of the split; none of those to avoid.

    Raises:
        Unlucky: there are not enough, or they are hard to come by.
    """
    found: dict[str, None] = {}
    for _ in range(MOST_TRIES * count):
        word = draw(draws)
        if word not in found and word not in avoid and split_of(f"{kind} {word}") == split:
            found[word] = None
            if len(found) == count:
                return list(found)
    raise Unlucky
