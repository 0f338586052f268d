"""A long text of given length with sentences hidden in it, at given or random depths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeAlias

from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.filler import Filler, everyday
from andromeda.data.synthetic.task import Task

Measure: TypeAlias = Callable[[str], int]  # the length of a text

MOST_LENGTH = 1 << 26


@dataclass(frozen=True, kw_only=True)
class HaystackTask(Task):
    """A task whose question stands behind a haystack.

    Attributes:
        length: the most that question, haystack and answer have together; they fall short of it by about a sentence
            of the filler.
        measure: what `length` counts: characters, or with `lambda text: len(tokenizer.encode(text))` tokens. What a
            chat template puts around the messages comes on top.
        filler: the hay.
    """

    length: int = 4096
    measure: Measure = field(default=len, repr=False, metadata={"plain": False})
    filler: Filler = field(default=everyday, repr=False, metadata={"plain": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_whole("length", 1, MOST_LENGTH)
        for name in ("measure", "filler"):
            self._require(callable(getattr(self, name)), f"{name} is a function, which only a program can give")

    @property
    def size(self) -> int:
        return self.length

    def _hide(
        self,
        draws: Draws,
        needles: Sequence[str],
        around: str,
        secrets: Sequence[str],
        *,
        depth: float | None = None,
        ordered: bool = False,
    ) -> str:
        """The haystack: needles at random places between sentences of the filler.

        Args:
            around: all else that counts: the question with what leads to the answer, and the answer.
            secrets: what the filler may not hold.
            depth: where the first needle stands.
            ordered: needles stand in their order.

        Raises:
            AndromedaError: the needles do not fit, or the filler is full of secrets.
        """
        spare = self.length - self.measure(around + "".join(f"{needle} " for needle in needles))
        hay, costs = self._hay(draws, spare, secrets)
        while True:
            places = [draws.between(0, len(hay)) for _ in needles]
            if depth is not None:
                places[0] = _place_at(hay, depth)
            text = _mixed(hay, needles, sorted(places) if ordered else places)
            over = self.measure(around + text) - self.length
            if over <= 0:
                return text
            self._require(bool(hay), f"length={self.length:,} is too short by {over:,} for what is hidden and asked")
            # The whole is longer than its parts, by its line breaks for example: so take away that share of it.
            excess = sum(costs) * over / self.measure(text)
            while hay and excess > 0:
                hay.pop()
                excess -= costs.pop()

    def _hay(self, draws: Draws, length: int, secrets: Sequence[str]) -> tuple[list[str], list[int]]:
        """Pieces of the filler that have the length together, and the length of each."""
        hay: list[str] = []
        costs: list[int] = []
        refused = 0
        for piece in self.filler(draws):
            if any(secret in piece for secret in secrets):
                refused += 1
                self._require(refused < 1000 + len(hay), "the filler holds the answers; use other documents")
                continue
            # With a blank in front, as tokens have it, and none behind: rather too little than too much.
            cost = max(1, self.measure(f" {piece.strip()}"))
            length -= cost
            if length < 0:
                break
            hay.append(piece)
            costs.append(cost)
        return hay, costs


def _place_at(hay: Sequence[str], depth: float) -> int:
    """The number of pieces nearest to that share of the characters."""
    begins = list(accumulate(map(len, hay), initial=0))
    wanted = depth * begins[-1]
    return min(range(len(begins)), key=lambda place: abs(begins[place] - wanted))


def _mixed(hay: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> str:
    """Each needle behind so many pieces, with the same blanks behind it as the piece before it has."""
    parts: list[str] = []
    done = 0
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: pair[0]):
        parts += hay[done:place]
        blanks = parts[-1][len(parts[-1].rstrip()) :] if parts else " "
        parts.append(needle + (blanks or " "))
        done = place
    return "".join([*parts, *hay[done:]]).rstrip()
