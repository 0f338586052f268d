"""Copying of lines: as they are, backwards, or some of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.split import Split, within
from andromeda.data.synthetic.task import Draft, Sample, Task, tidy
from andromeda.data.synthetic.words import invented_word, listed

Order = Literal["same", "lines reversed", "words reversed", "selected"]
REQUESTS: dict[Order, tuple[str, ...]] = {
    "same": ("Copy these lines.", "Repeat the following lines exactly.", "Write these lines out once more."),
    "lines reversed": ("Copy these lines from the last to the first.", "Write these lines in reverse order."),
    "words reversed": (
        "Copy these lines, with the words of each from the last to the first.",
        "Write each of these lines with its words in reverse order.",
    ),
    "selected": ("Copy only {} of these lines.", "Of the following lines, write {} and leave out the others."),
}
SYLLABLES = (1, 3)  # of a word


@dataclass(frozen=True, kw_only=True)
class Copying(Task):
    """Lines of invented words to be copied, in one of four orders; selected lines are asked for by their numbers.

    Answers are compared line by line, with blank lines left out and runs of blanks taken as one. No line of training
    is in testing, be it forwards or backwards.

    Attributes:
        lines: least and most of them.
        words: least and most of a line.
    """

    name: ClassVar[str] = "copying"
    order: Order = "same"
    lines: tuple[int, int] = (2, 8)
    words: tuple[int, int] = (2, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of("order", get_args(Order))
        self._require_range("lines", 1, 100_000)
        self._require_range("words", 1, 1000)

    @property
    def size(self) -> int:
        return 10 * self.lines[1] * self.words[1]  # shown and copied

    def draw(self, draws: Draws, split: Split) -> Draft:
        lines = [within(split, lambda: self._line(draws), _content) for _ in range(draws.between(*self.lines))]
        request, shown, copied = draws.choice(REQUESTS[self.order]), lines, lines
        if self.order == "lines reversed":
            copied = lines[::-1]
        elif self.order == "words reversed":
            copied = [_backwards(line) for line in lines]
        elif self.order == "selected":
            places = sorted(draws.sample(range(len(lines)), draws.between(1, max(1, len(lines) // 2))))
            numbers = listed([str(place + 1) for place in places])
            request = request.format(("line " if len(places) == 1 else "lines ") + numbers)
            shown = [f"{number}. {line}" for number, line in enumerate(lines, start=1)]
            copied = [lines[place] for place in places]
        question, answer = "\n".join([request, "", *shown, ""]), "\n".join(copied)
        return Draft(self._body(question.rstrip(), answer, lead="\n\nCopy:"), answer, tuple(map(_content, lines)))

    def check(self, sample: Sample, text: str) -> bool:
        """Whether the text is the lines of the answer and nothing else, blank lines and runs of blanks aside."""
        return _lines(text) == _lines(sample.answer)

    def _line(self, draws: Draws) -> str:
        return " ".join(invented_word(draws, draws.between(*SYLLABLES)) for _ in range(draws.between(*self.words)))


def _content(line: str) -> str:
    """The same forwards and backwards."""
    return f"line {min(line, _backwards(line))}"


def _backwards(line: str) -> str:
    return " ".join(line.split()[::-1])


def _lines(text: str) -> list[str]:
    return [tidy(line) for line in text.splitlines() if line.strip()]
