"""Variable tracking: which variables hold a value, through chains of assignments (multi-hop, as in RULER)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.haystack import HaystackTask
from andromeda.data.synthetic.split import Split, several_within
from andromeda.data.synthetic.task import Draft, Sample, tidy
from andromeda.data.synthetic.words import invented_word

LEAD = "\n\nAnswer:"
NAME_SYLLABLES, VALUE_DIGITS = 3, 5


@dataclass(frozen=True, kw_only=True)
class Variables(HaystackTask):
    """`let kavomi = 48213` ... `let tirela = kavomi` in a haystack; name all variables that hold 48213.

    Every chain has a value of its own; its assignments stand in their order, mixed with those of the others. Answers
    are compared as sets of names, with commas between them, on the first line that is not blank. No name and no value
    of training is in testing.

    Attributes:
        chains: one is asked for, the others distract.
        hops: assignments from one variable to the next.
    """

    name: ClassVar[str] = "variables"
    chains: int = 2
    hops: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_whole("chains", 1, 100)
        self._require_whole("hops", 0, 100)

    def draw(self, draws: Draws, split: Split) -> Draft:
        size = self.hops + 1
        draw_name = partial(invented_word, syllables=NAME_SYLLABLES)
        names = several_within(split, draws, draw_name, "variable", self.chains * size)
        values = several_within(split, draws, lambda draws: str(draws.digits(VALUE_DIGITS)), "number", self.chains)
        chains = [names[start : start + size] for start in range(0, len(names), size)]
        needles = self._assignments(draws, chains, values)
        opening = "Variables are assigned in the following text. Follow them."
        question = f"Which variables hold {values[0]} at the end? Name them all, in the order of their assignment."
        answer = ", ".join(chains[0])
        around = f"{opening}\n\n\n\n{question}{LEAD} {answer}"
        hay = self._hide(draws, needles, around, [*names, *values], ordered=True)
        content = (*(f"variable {name}" for name in names), *(f"number {value}" for value in values))
        return Draft(self._body(f"{opening}\n\n{hay}\n\n{question}", answer, LEAD), answer, content)

    def check(self, sample: Sample, text: str) -> bool:
        """Whether the first line that is not blank names the same variables, each once, in any order."""
        first = next((line for line in text.splitlines() if line.strip()), "")
        return _names(first) == _names(sample.answer)

    def _assignments(self, draws: Draws, chains: list[list[str]], values: list[str]) -> list[str]:
        """In the order of each chain, the chains mixed at random."""
        turns = draws.shuffled([number for number, chain in enumerate(chains) for _ in chain])
        left = [list(zip(chain, [value, *chain], strict=False)) for chain, value in zip(chains, values, strict=True)]
        return ["Let {} = {}.".format(*left[turn].pop(0)) for turn in turns]


def _names(text: str) -> list[str]:
    return sorted(tidy(name) for name in text.split(","))
