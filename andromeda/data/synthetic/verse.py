"""Verse to order: so many lines, of so many words or syllables, with given first letters and last words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.lexicon import (
    ACROSTICS,
    ADJECTIVES,
    ADVERBS,
    OBJECTS,
    PREPOSITIONS,
    RHYMES,
    SUBJECTS,
    THE,
    VERBS,
    BySyllables,
    syllables,
)
from andromeda.data.synthetic.split import Split, Unlucky, within
from andromeda.data.synthetic.task import Draft, Sample, Task
from andromeda.data.synthetic.words import listed

Count = Literal["nothing", "words", "syllables"]

PARTS: Mapping[str, BySyllables] = {
    "A": ADJECTIVES, "S": SUBJECTS, "V": VERBS, "D": ADVERBS, "P": PREPOSITIONS, "T": THE, "O": OBJECTS,
}  # fmt: skip
PATTERNS = (  # old owls wander slowly under the silent bridge
    "ASV", "SVD", "TSV", "ASVD", "TASV", "AASV", "SVPTO", "TASVD", "AASVD", "ASVPTO", "SVPTAO", "PTOASV", "SVDPTO",
    "ASVPTAO", "TASVPTO", "ASVDPTO", "PTAOASV", "TASVPTAO", "ASVDPTAO", "AASVPTAO",
)  # fmt: skip
COUNTS: dict[tuple[Count, bool], tuple[int, int]] = {  # of a line, without and with its last word given
    ("words", False): (3, 8), ("words", True): (6, 8), ("syllables", False): (5, 10), ("syllables", True): (9, 12),
}  # fmt: skip
TOPICS = tuple(word for words in SUBJECTS.values() for word in words)
REQUESTS = (
    "Write a poem of {} lines in which the word {} stands.",
    "I would like a poem of {} lines; the word {} must be in it.",
    "Compose a verse of exactly {} lines that has the word {} in it.",
)
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


@dataclass(frozen=True)
class Order:
    """What is asked for; `counts`, `letters` and `ends` are those of the lines, where they are given."""

    topic: str
    lines: int
    counts: tuple[int, ...] | None
    letters: str | None
    ends: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class VerseForm(Task):
    """A request for a poem, and one that does what it says, from a small grammar.

    Any text that does is right: so many lines that are not blank, the topic's word in them, and what else is asked
    for. Syllables are those of `lexicon.syllables`. The topics of training, its acrostics and its lists
    of last words are not those of testing.

    Attributes:
        lines: least and most; an acrostic has 3 to 6.
        count: what a line has a given number of: all of them the same, or each its own.
        acrostic: the first letters of the lines spell a word.
        rhymes: the last words of the lines are given; they rhyme in couplets or alternate, in a quatrain.
    """

    name: ClassVar[str] = "verse_form"
    lines: tuple[int, int] = (3, 6)
    count: Count = "syllables"
    acrostic: bool = False
    rhymes: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_range("lines", 1, 100)
        self._require_one_of("count", get_args(Count))
        for name in ("acrostic", "rhymes"):
            self._require(isinstance(getattr(self, name), bool), f"{name}={getattr(self, name)!r}; use true or false")
        sizes = {len(word) for word in ACROSTICS}
        least, most = self.lines
        if self.acrostic:
            self._require(
                least <= max(sizes) and most >= min(sizes),
                f"lines={self.lines} allow for no acrostic; those have {min(sizes)} to {max(sizes)}",
            )
        longest = 2 * len(RHYMES)
        self._require(not self.rhymes or most <= longest, f"lines={self.lines}: at most {longest} lines can be rhymed")

    def draw(self, draws: Draws, split: Split) -> Draft:
        order = self._order(draws, split)
        content = [f"topic {order.topic}"]
        content += [f"acrostic {order.letters}"] if order.letters else []
        content += [f"last words {' '.join(order.ends)}"] if order.ends else []
        poem = _poem(draws, order, self.count)
        return Draft(self._body(self._request(draws, order), poem, lead="\nPoem:"), poem, tuple(content))

    def check(self, sample: Sample, text: str) -> bool:
        """Whether the text does what the answer does, as far as it was asked for; marks and capitals do not count."""
        topic = sample.content[0].removeprefix("topic ")
        said, wanted = self._measured(text, topic), self._measured(sample.answer, topic)
        return said is not None and said == wanted

    def _measured(self, text: str, topic: str) -> Order | None:
        """The order that a text fulfils; None where it does not hold the topic, or a line holds no word."""
        lines = [WORD.findall(line.lower()) for line in text.splitlines() if line.strip()]
        if not all(lines) or topic not in {word for line in lines for word in line}:
            return None
        words, sounds = tuple(map(len, lines)), tuple(sum(map(syllables, line)) for line in lines)
        counts = {"nothing": None, "words": words, "syllables": sounds}[self.count]
        letters = "".join(line[0][0] for line in lines) if self.acrostic else None
        ends = tuple(line[-1] for line in lines) if self.rhymes else None
        return Order(topic, len(lines), counts, letters, ends)

    def _order(self, draws: Draws, split: Split) -> Order:
        topic = within(split, lambda: draws.choice(TOPICS), lambda word: f"topic {word}")
        letters, lines = None, draws.between(*self.lines)
        if self.acrostic:
            fitting = [word for word in ACROSTICS if self.lines[0] <= len(word) <= self.lines[1]]
            letters = within(split, lambda: draws.choice(fitting), lambda word: f"acrostic {word}")
            lines = len(letters)
        counts, ends = None, None
        if self.count != "nothing":
            limits = COUNTS[self.count, self.rhymes]
            same = draws.between(*limits)
            alike = draws.chance(2)
            counts = tuple(same if alike else draws.between(*limits) for _ in range(lines))
        if self.rhymes:
            ends = within(split, lambda: _rhymes(draws, lines), lambda words: f"last words {' '.join(words)}")
        return Order(topic, lines, counts, letters, ends)

    def _request(self, draws: Draws, order: Order) -> str:
        wishes = [draws.choice(REQUESTS).format(order.lines, f'"{order.topic}"')]
        if order.counts and len(set(order.counts)) == 1:
            wishes.append(f"Every line has {order.counts[0]} {self.count}.")
        elif order.counts:
            wishes.append(
                f"The lines have {listed([str(count) for count in order.counts])} {self.count}, in this order."
            )
        if order.letters:
            wishes.append(f"The first letters of the lines spell {order.letters.upper()}.")
        if order.ends:
            wishes.append(f"The lines end in these words, in this order: {', '.join(order.ends)}.")
        return " ".join(wishes)


def _rhymes(draws: Draws, lines: int) -> tuple[str, ...]:
    """Last words: couplets, or alternate ones in each four lines; what is left over rhymes with nothing."""
    groups = iter(draws.shuffled(RHYMES))
    pairs = [draws.sample([word for words in next(groups).values() for word in words], 2) for _ in range(0, lines, 2)]
    if draws.chance(2):
        for place in range(0, len(pairs) - 1, 2):
            (a, b), (c, d) = pairs[place : place + 2]
            pairs[place : place + 2] = [[a, c], [b, d]]
    return tuple(word for pair in pairs for word in pair)[:lines]


def _poem(draws: Draws, order: Order, count: Count) -> str:
    """Raises Unlucky where the grammar has no such lines."""
    for place in draws.shuffled(range(order.lines)):  # the first line that can hold the topic does
        topical = _line(draws, order, count, place, order.topic)
        if topical:
            break
    else:
        raise Unlucky
    lines = [topical if line == place else _line(draws, order, count, line) for line in range(order.lines)]
    if not all(lines):
        raise Unlucky
    return ",\n".join(f"{line[0].upper()}{line[1:]}" for line in lines if line) + "."


def _line(draws: Draws, order: Order, count: Count, place: int, topic: str | None = None) -> str | None:
    """A line as ordered for that place, around the topic if it is given; None where the grammar has none."""
    for pattern in draws.shuffled(PATTERNS):
        slots = [PARTS[part] for part in pattern]
        if order.counts and count == "words" and len(pattern) != order.counts[place]:
            continue
        if order.ends:
            if pattern[-1] != "O":
                continue
            slots[-1] = _only(order.ends[place])
        if topic:
            slots[pattern.index("S")] = _only(topic)
        if order.letters:
            slots[0] = {n: tuple(w for w in words if w[0] == order.letters[place]) for n, words in slots[0].items()}
        words = _filled(draws, slots, order.counts[place] if order.counts and count == "syllables" else None)
        if words:
            return " ".join(words)
    return None


def _only(word: str) -> BySyllables:
    return {syllables(word): (word,)}


def _filled(draws: Draws, slots: list[BySyllables], total: int | None) -> list[str] | None:
    """A word for each slot, all different but for `the`, with so many syllables in all; None where there are none."""
    if not all(any(slot.values()) for slot in slots):
        return None
    after = [{0}]  # sums of syllables behind each slot
    for slot in slots[:0:-1]:
        after.insert(0, {number + rest for number, words in slot.items() if words for rest in after[0]})
    chosen: list[str] = []
    left = total
    for slot, rests in zip(slots, after, strict=True):
        sizes = [number for number in slot if left is None or left - number in rests]
        fitting = [word for number in sizes for word in slot[number]]
        if not fitting:
            return None
        chosen.append(draws.choice([word for word in fitting if word not in chosen] or fitting))
        left = left if left is None else left - syllables(chosen[-1])
    return chosen
