"""Associative recall: many keys, each with a value; what is the value of one of them?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.split import Split, several_within
from andromeda.data.synthetic.task import Draft, Sample, Task, tidy
from andromeda.data.synthetic.words import invented_word

KEY_SYLLABLES = (2, 4)  # 4,900 and 24 million keys; an eighth of them for testing
MOST_SHORT_KEYS = 200
MOST_PAIRS = 100_000
VALUE_DIGITS = 3


@dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """Pairs of an invented word and a number, then a question for the numbers of some of the words, in that order.

    Answers are compared as in `Task.check`, but that blanks around commas do not count. A word that is a key in
    training is none in testing.
    """

    name: ClassVar[str] = "recall"
    pairs: int = 16
    queries: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_whole("pairs", 1, MOST_PAIRS)
        self._require_whole("queries", 1, self.pairs)

    @property
    def size(self) -> int:
        return 14 * self.pairs

    def draw(self, draws: Draws, split: Split) -> Draft:
        syllables = KEY_SYLLABLES[self.pairs > MOST_SHORT_KEYS]
        keys = several_within(split, draws, partial(invented_word, syllables=syllables), "recall", self.pairs)
        values = {key: str(draws.digits(VALUE_DIGITS)) for key in keys}
        asked = draws.sample(keys, self.queries)
        pairs = "\n".join(f"{key}: {value}" for key, value in values.items())
        question = f"{pairs}\n\nWhich number stands behind {asked[0]}?"
        if self.queries > 1:
            question = f"{pairs}\n\nWhich numbers stand behind these words: {', '.join(asked)}?"
        answer = ", ".join(values[key] for key in asked)
        return Draft(self._body(question, answer), answer, tuple(f"recall {key}" for key in keys))

    def check(self, sample: Sample, text: str) -> bool:
        """Whether the first line that is not blank has the numbers, in their order."""
        first = next((line for line in text.splitlines() if line.strip()), "")
        return [tidy(number) for number in first.split(",")] == sample.answer.split(", ")
