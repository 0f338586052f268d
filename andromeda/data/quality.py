"""Is it text? Rules of Gopher and C4, and a measure of English; each says why a text fails it.

Gopher: Rae et al. 2021, appendix A.1.1 and table A1, https://arxiv.org/abs/2112.11446.
C4: Raffel et al. 2020, section 2.2, https://arxiv.org/abs/1910.10683.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from andromeda.data import repetition
from andromeda.errors import AndromedaError

LETTERS = re.compile(r"[^\W\d_]+")


class Failure(NamedTuple):
    """Why a text is dropped: a few words to count by, and the figures."""

    reason: str
    figures: str


def check_shares(rules: Any, what: str) -> None:
    """
    Raises:
        AndromedaError: a field that is a float, and so a share, outside 0 to 1; a minimum above its maximum.
    """
    values = {field.name: getattr(rules, field.name) for field in fields(rules)}
    for name, value in values.items():
        if "length" not in name and isinstance(value, float) and not 0 <= value <= 1:
            raise AndromedaError(f"{what}: `{name}` is a share; {value} must lie between 0 and 1")
        most = values.get(name.replace("min_", "max_"))
        if name.startswith("min_") and most is not None and not 0 <= value <= most:
            raise AndromedaError(
                f"{what}: `{name}` {value} must lie between 0 and `{name.replace('min_', 'max_')}` {most}"
            )


def outside(checks: Iterable[tuple[str, float, float | None, float | None]]) -> Failure | None:
    """The first of (reason, value, least, most) whose value lies outside."""
    for reason, value, least, most in checks:
        if least is not None and value < least:
            return Failure(reason, f"{value:.4g} < {least:g}")
        if most is not None and value > most:
            return Failure(reason, f"{value:.4g} > {most:g}")
    return None


# ---- Gopher --------------------------------------------------------------------------------------

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
BULLETS = ("•", "-", "*", "‣", "◦")


@dataclass(frozen=True)
class Gopher:
    """The paper's rules and limits, but for the most words, 100,000 there: long texts are what long contexts are for.

    Raises:
        AndromedaError: a share outside 0 to 1, a minimum above its maximum.
    """

    min_words: int = 50
    max_words: int | None = None
    min_word_length: float = 3.0  # mean, characters
    max_word_length: float = 10.0
    max_symbols: float = 0.1  # of # and of ellipses, by words
    max_bullets: float = 0.9  # of lines that begin with one
    max_ellipses: float = 0.3  # of lines that end in one
    min_alphabetic: float = 0.8  # of words with a letter
    min_stop_words: int = 2  # different ones

    def __post_init__(self) -> None:
        check_shares(self, "gopher")

    def failure(self, text: str) -> Failure | None:
        words = text.split()
        n = len(words)
        if n < max(1, self.min_words) or (self.max_words is not None and n > self.max_words):
            return outside([("gopher: words", n, max(1, self.min_words), self.max_words)])
        lines = [line.strip() for line in text.split("\n") if not line.isspace() and line]
        bullets = sum(line.startswith(BULLETS) for line in lines) / len(lines)
        ellipses = sum(line.endswith(("...", "…")) for line in lines) / len(lines)
        return outside(
            [
                ("gopher: word length", sum(map(len, words)) / n, self.min_word_length, self.max_word_length),
                ("gopher: hashes", text.count("#") / n, None, self.max_symbols),
                ("gopher: ellipses", (text.count("...") + text.count("…")) / n, None, self.max_symbols),
                ("gopher: bullet lines", bullets, None, self.max_bullets),
                ("gopher: ellipsis lines", ellipses, None, self.max_ellipses),
                ("gopher: alphabetic words", _alphabetic(words), self.min_alphabetic, None),
                ("gopher: stop words", _stop_words(words), self.min_stop_words, None),
            ]
        )


def _alphabetic(words: list[str]) -> float:
    """The share of words with a letter."""
    others = [word for word in words if not word.isalpha()]
    return 1 - sum(LETTERS.search(word) is None for word in others) / len(words)


def _stop_words(words: list[str]) -> int:
    """How many different ones there are."""
    different = set(words)
    return sum(not different.isdisjoint((word, word.capitalize(), word.upper())) for word in STOP_WORDS)


@dataclass(frozen=True)
class Repetition:
    """The paper's limits on what a text repeats; refrains reach some of them.

    Attributes:
        min_words: of a text that is judged at all. The paper has dropped those below 50 words by then; a pair of words
            that stands twice is a fifth of a question.

    Raises:
        AndromedaError: a share outside 0 to 1, or not one limit for each length of n-grams.
    """

    min_words: int = 50
    max_lines: float = 0.3  # of lines that stood before
    max_line_characters: float = 0.2
    max_paragraphs: float = 0.3
    max_paragraph_characters: float = 0.2
    max_top: tuple[float, ...] = (0.2, 0.18, 0.16)  # of characters in the commonest 2-, 3-, 4-gram of words
    max_repeated: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.1)  # in 5- to 10-grams that stood before

    def __post_init__(self) -> None:
        check_shares(self, "repetition")
        for name, number in (("max_top", 3), ("max_repeated", 6)):
            limits = getattr(self, name)
            if len(limits) != number or not all(0 <= limit <= 1 for limit in limits):
                raise AndromedaError(f"repetition: `{name}` takes {number} shares between 0 and 1; got {list(limits)}")

    def failure(self, text: str) -> Failure | None:
        words = text.split()
        if len(words) < self.min_words:
            return None
        lines = repetition.repeated(line.strip() for line in text.split("\n"))
        paragraphs = repetition.repeated(part.strip() for part in re.split(r"\n[^\S\n]*\n", text))
        return outside(
            [
                ("repetition: lines", lines.number, None, self.max_lines),
                ("repetition: characters of lines", lines.characters, None, self.max_line_characters),
                ("repetition: paragraphs", paragraphs.number, None, self.max_paragraphs),
                ("repetition: characters of paragraphs", paragraphs.characters, None, self.max_paragraph_characters),
            ]
        ) or outside(self._grams(words))

    def _grams(self, words: list[str]) -> Iterable[tuple[str, float, None, float]]:
        for found in repetition.grams(words, 10):
            n = found.n
            if n <= 4:
                yield f"repetition: top {n}-gram", repetition.commonest(found), None, self.max_top[n - 2]
            else:
                yield f"repetition: {n}-grams", repetition.later(found), None, self.max_repeated[n - 5]


# ---- C4 ------------------------------------------------------------------------------------------

TERMINAL = tuple(".!?\"'”’")


@dataclass(frozen=True)
class C4:
    """The rules of C4 that apply to more than web pages.

    Attributes:
        lorem_ipsum, braces: texts that hold "lorem ipsum" or a curly brace are dropped.
        javascript: lines that name JavaScript are taken out.
        terminal_punctuation: so are lines that end in none. Verse and headings are such lines, so it is off.
    """

    lorem_ipsum: bool = True
    braces: bool = True
    javascript: bool = True
    terminal_punctuation: bool = False

    def without_lines(self, text: str, changes: Counter[str]) -> str:
        if self.javascript and "javascript" in text.lower():
            text = _without(
                text, [("javascript" in line.lower()) for line in text.split("\n")], "c4: javascript", changes
            )
        if self.terminal_punctuation:
            open_ended = [bool(line.strip()) and not line.rstrip().endswith(TERMINAL) for line in text.split("\n")]
            text = _without(text, open_ended, "c4: terminal punctuation", changes)
        return text

    def failure(self, text: str) -> Failure | None:
        if self.lorem_ipsum and "lorem ipsum" in text.lower():
            return Failure("c4: lorem ipsum", "")
        if self.braces and "{" in text:
            return Failure("c4: braces", f"{text.count('{')} of them")
        return None


def _without(text: str, marked: list[bool], reason: str, changes: Counter[str]) -> str:
    changes[f"lines out, {reason}"] += sum(marked)
    return "\n".join(line for line, out in zip(text.split("\n"), marked, strict=True) if not out)


# ---- English -------------------------------------------------------------------------------------

SAMPLE = 20_000  # characters that tell the language of a text
# Frequent, of any century, and not words of the languages around the North Sea or of the Romance ones.
_ENGLISH = """
the and to that it with his not are from have this which you all she there their they been has when who more out
said what its about into than them only other some could time these two may then any my such our most made after
also did many before must through thou thy thee shall upon your how yet be by he him of were would should where
"""
ENGLISH = frozenset(_ENGLISH.split())


def english(text: str) -> float:
    """The share of words that are frequent in English alone; quickly, from the beginning of the text."""
    words = LETTERS.findall(text[:SAMPLE].lower())
    return sum(word in ENGLISH for word in words) / max(1, len(words))
