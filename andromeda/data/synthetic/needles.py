"""Retrieval from a haystack: a passkey, or facts of which one, some or all are asked for.

The kinds are those of RULER (Hsieh et al. 2024): single, multi-key, multi-value and multi-query; the wording is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Literal, get_args

from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.haystack import HaystackTask
from andromeda.data.synthetic.split import Split, several_within
from andromeda.data.synthetic.task import Draft, Sample, tidy
from andromeda.data.synthetic.words import invented_word, listed, pair_of_words

Kind = Literal["digits", "hexadecimal", "word"]
VALUES: dict[Kind, Callable[[Draws], str]] = {
    "digits": lambda draws: str(draws.digits(7)),
    "hexadecimal": lambda draws: f"{draws.below(1 << 64):016x}",
    "word": lambda draws: invented_word(draws, 4),
}
LEAD = "\n\nAnswer:"
MOST_NEEDLES = 500

PASSKEY = (
    ("The passkey is {0}. Remember it: {0} is the passkey.", "What is the passkey?"),
    ("Keep this passkey in mind: {0}.", "Which passkey were you to keep in mind?"),
    ("Important: the passkey that opens the door is {0}.", "Which passkey opens the door?"),
)
NEEDLES = (  # a fact, and how its value is called
    ("The code of the {} is {}.", "code"),
    ("For the {}, the code is {}.", "code"),
    ("Write it down: the password of the {} is {}.", "password"),
    ("The secret number of the {} is {}.", "secret number"),
    ("It was agreed that the {} has the label {}.", "label"),
)


@dataclass(frozen=True, kw_only=True)
class Passkey(HaystackTask):
    """One passkey in a haystack. No passkey of training is one of testing.

    Answers are compared as in `Task.check`.

    Attributes:
        digits: of the passkey.
        depth: where it stands, from 0 (the beginning) to 1 (the end), to the nearest sentence; None: anywhere.
    """

    name: ClassVar[str] = "passkey"
    digits: int = 6
    depth: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_whole("digits", 1, 100)
        _require_depth(self, self.depth)

    def draw(self, draws: Draws, split: Split) -> Draft:
        (key,) = several_within(split, draws, lambda draws: str(draws.digits(self.digits)), "passkey", 1)
        needle, asked = draws.choice(PASSKEY)
        opening = "A passkey is hidden in the following text. Find it."
        around = f"{opening}\n\n\n\n{asked}"
        hay = self._hide(draws, [needle.format(key)], f"{around}{LEAD} {key}", [key], depth=self.depth)
        return Draft(self._body(f"{opening}\n\n{hay}\n\n{asked}", key, LEAD), key, (f"passkey {key}",))


@dataclass(frozen=True, kw_only=True)
class Needles(HaystackTask):
    """Facts in a haystack: `The code of the amber falcon is 4821907.`

    Several are asked for as one line each, `amber falcon: 4821907`. Answers are compared line by line, in any order;
    several values of one key stand with commas between them, in any order. What has a code in training has none in
    testing, and no value of training is in testing.

    Attributes:
        keys: things that have a value; with more than are asked for, the others distract (multi-key).
        values: how many each thing asked for has (multi-value).
        queries: how many things are asked for (multi-query).
        kind: of the values: 7 digits, 16 hexadecimal ones, or an invented word.
        depth: where the fact asked for stands, as in Passkey; only where there is one.
    """

    name: ClassVar[str] = "needles"
    keys: int = 1
    values: int = 1
    queries: int = 1
    kind: Kind = "digits"
    depth: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of("kind", get_args(Kind))
        self._require_whole("keys", 1, MOST_NEEDLES)
        self._require_whole("values", 1, MOST_NEEDLES)
        self._require_whole("queries", 1, self.keys)
        _require_depth(self, self.depth)
        one = self.values == self.queries == 1
        self._require(one or self.depth is None, "depth places one fact; leave it out where several are asked for")

    def draw(self, draws: Draws, split: Split) -> Draft:
        keys = several_within(split, draws, pair_of_words, "key", self.keys)
        asked, others = keys[: self.queries], keys[self.queries :]
        count = self.queries * self.values + len(others)
        values = several_within(split, draws, VALUES[self.kind], f"value {self.kind}", count)
        supply = iter(values)
        held = {key: list(islice(supply, self.values)) for key in asked} | {key: [next(supply)] for key in others}
        wording, called = draws.choice(NEEDLES)
        needles = [wording.format(key, value) for key, several in held.items() for value in several]
        question, answer = self._question(asked, called), self._answer(asked, held)
        opening = f"Some things in the following text have a {called}. Read it, then answer the question."
        around = f"{opening}\n\n\n\n{question}{LEAD} {answer}"
        hay = self._hide(draws, needles, around, [*keys, *values], depth=self.depth)
        content = (*(f"key {key}" for key in keys), *(f"value {self.kind} {value}" for value in values))
        return Draft(self._body(f"{opening}\n\n{hay}\n\n{question}", answer, LEAD), answer, content)

    def check(self, sample: Sample, text: str) -> bool:
        """Whether the lines are those of the answer, in any order, with the values of each in any order."""
        if self.queries == 1:
            first = next((line for line in text.splitlines() if line.strip()), "")
            return _items(first) == _items(sample.answer)
        lines = [line.partition(":") for line in text.splitlines() if line.strip()]
        wanted = [line.partition(":") for line in sample.answer.splitlines()]
        return sorted((tidy(key), _items(rest)) for key, _, rest in lines) == sorted(
            (key, _items(rest)) for key, _, rest in wanted
        )

    def _question(self, asked: list[str], called: str) -> str:
        several = "s" if self.values > 1 else ""
        if self.queries == 1:
            verb = "are all the" if several else "is the"
            return f"What {verb} {called}{several} of the {asked[0]}?"
        things = listed([f"the {key}" for key in asked])
        how = f"all its {called}s" if several else f"its {called}"
        return f"What do these have: {things}? Write a line for each: its name, a colon and {how}."

    def _answer(self, asked: list[str], held: dict[str, list[str]]) -> str:
        if self.queries == 1:
            return ", ".join(held[asked[0]])
        return "\n".join(f"{key}: {', '.join(held[key])}" for key in asked)


def _items(text: str) -> list[str]:
    return sorted(tidy(item) for item in text.split(","))


def _require_depth(task: HaystackTask, depth: float | None) -> None:
    good = depth is None or (isinstance(depth, int | float) and not isinstance(depth, bool) and 0 <= depth <= 1)
    task._require(good, f"depth={depth!r} must be a number from 0, the beginning, to 1, the end")
