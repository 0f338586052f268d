"""Corpora for benchmarks of data: texts with the statistics of language, from a seed; planted duplicates of others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# The commonest of English, of which filters look for some.
FREQUENT = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "his",
    "but",
    "at",
    "are",
    "this",
    "have",
    "from",
    "or",
    "had",
    "an",
    "they",
    "which",
    "one",
    "you",
    "were",
    "all",
    "her",
    "she",
    "there",
    "would",
    "their",
    "we",
    "him",
    "been",
    "has",
    "when",
    "who",
    "will",
    "no",
    "more",
    "if",
    "out",
    "so",
    "up",
    "said",
    "what",
    "its",
    "about",
]
ONSETS = [
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "st",
    "tr",
    "pl",
    "ch",
    "sh",
    "th",
    "br",
    "gr",
    "cl",
]
RIMES = [
    "a",
    "e",
    "i",
    "o",
    "u",
    "ea",
    "ou",
    "ai",
    "an",
    "en",
    "in",
    "on",
    "er",
    "or",
    "ar",
    "al",
    "el",
    "is",
    "us",
    "at",
    "ent",
    "ing",
    "ion",
    "ight",
]
VOCABULARY = 400_000  # words
ZIPF = 1.05  # exponent of the words' frequencies
MEDIAN_WORDS, SPREAD = 320, 1.2  # of documents, log-normal
LONG, LONG_WORDS = 1 / 2_000, (200_000, 1_400_000)  # share and words of very long documents: 1 to 8 MB
EQUAL, NEAR = 0.05, 0.05  # shares of documents that repeat an earlier one, whole or with CHANGED of its words changed
CHANGED = 0.05
REMEMBERED = 2_000  # documents of which one is repeated
STOPS, COMMAS, PARAGRAPHS = 1 / 15, 1 / 12, 1 / 90  # shares of words before them; a paragraph's end is a stop too

Ints = NDArray[np.int64]


class Language:
    """Words of syllables, the frequent ones short, drawn by Zipf's law; sentences and paragraphs of varying lengths."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        words = list(dict.fromkeys([*FREQUENT, *_made(rng, VOCABULARY)]))
        begins = [word.capitalize() for word in words]
        written = [[f"{word}{end}" for word in of] for end in (" ", ", ", ". ", ".\n\n") for of in (words, begins)]
        self._written = np.array(written, object)  # (8, words) as they stand within, and at the beginning of, sentences
        self._cumulated = np.cumsum(1 / np.arange(2.7, len(words) + 2.7) ** ZIPF)
        self._cumulated /= self._cumulated[-1]

    def draw(self, count: int) -> Ints:
        """(count,) word numbers."""
        return np.searchsorted(self._cumulated, self._rng.random(count))

    def text(self, ids: Ints) -> str:
        """Where sentences end follows from the number of words, so a changed copy has the same."""
        chance = np.random.default_rng(len(ids)).random(len(ids))
        ends = np.digitize(-chance, [-STOPS - COMMAS, -STOPS, -PARAGRAPHS])
        begins = np.concatenate([[1], ends[:-1] > 1])
        return "".join(self._written[2 * ends + begins, ids]).rstrip(" ,\n")


def _made(rng: np.random.Generator, count: int) -> Iterator[str]:
    syllables = (1 + np.log(np.arange(30, count + 30)) / 5.5 + 0.6 * rng.random(count)).astype(int)
    onsets, rimes = rng.choice(ONSETS, syllables.sum()), rng.choice(RIMES, syllables.sum())
    parts = iter(np.char.add(onsets, rimes).tolist())
    return ("".join(islice(parts, number)) for number in syllables.tolist())


def documents(seed: int) -> Iterator[str]:
    """Without end. Lengths are log-normal with a few very long ones; one in ten repeats an earlier one."""
    rng = np.random.default_rng(seed)
    language = Language(rng)
    earlier: list[Ints] = []
    while True:
        kind = rng.random()
        if earlier and kind < EQUAL + NEAR:
            ids = earlier[rng.integers(len(earlier))].copy()
            if kind < NEAR:
                places = rng.random(len(ids)) < CHANGED
                ids[places] = language.draw(int(places.sum()))
        else:
            long = rng.random() < LONG
            count = rng.integers(*LONG_WORDS) if long else MEDIAN_WORDS * rng.lognormal(0, SPREAD)
            ids = language.draw(max(8, int(count)))
            if not long:
                earlier = [*earlier, ids] if len(earlier) < REMEMBERED else earlier
                earlier[rng.integers(len(earlier))] = ids
        yield language.text(ids)


def write(folder: Path, num_bytes: int, seed: int, num_files: int = 4) -> tuple[int, int]:
    """JSON lines of about so many bytes of text in all; returns documents and their UTF-8 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    texts, number, total = documents(seed), 0, 0
    for part in range(num_files):
        with (folder / f"part-{part:02}.jsonl").open("w", encoding="utf-8") as file:
            while total < num_bytes * (part + 1) // num_files:
                text = next(texts)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                number, total = number + 1, total + len(text.encode())
    return number, total


# ---- planted duplicates --------------------------------------------------------------------------

KINDS = ("exact", "case", "punctuation", "1% of words", "2% of words", "5% of words", "10% of words")
DECOY = "30% of words"  # is no duplicate: of three words in a row a third is left
SHARE = re.compile(r"(\d+)% of words")
MARKS = ".,;:!?"


def plant(texts: Sequence[str], kind: str, seed: int) -> list[str]:
    """A copy of each text, changed in one way; words that are put in stand in some of the texts."""
    rng = np.random.default_rng([seed, (*KINDS, DECOY).index(kind)])
    pool = np.array(sorted({word for text in texts for word in text.split() if word.isalpha()}), object)
    return [changed(text, kind, rng, pool) for text in texts]


def changed(text: str, kind: str, rng: np.random.Generator, pool: NDArray[np.object_]) -> str:
    """The text, changed in one way."""
    if kind == "case":
        return text.upper() if rng.random() < 0.5 else text.lower() if rng.random() < 0.5 else text.title()
    if kind == "punctuation":
        return _punctuated(text, rng)
    share = SHARE.fullmatch(kind)
    return _other_words(text, int(share[1]) / 100, rng, pool) if share else text


def _punctuated(text: str, rng: np.random.Generator) -> str:
    """Half of the marks left out or another, and marks behind a tenth of the words."""
    parts = re.split(r"(\s+)", text)
    for place in range(0, len(parts), 2):
        word = parts[place]
        if word and word[-1] in MARKS and not word[:-1].isdigit() and rng.random() < 0.5:
            parts[place] = word[:-1] + str(rng.choice(["", *MARKS]))
        elif word.isalpha() and rng.random() < 0.1:
            parts[place] = word + str(rng.choice(list(MARKS)))
    return "".join(parts)


def _other_words(text: str, share: float, rng: np.random.Generator, pool: NDArray[np.object_]) -> str:
    """As many as the share comes to, rounded down, but one at least."""
    parts = re.split(r"(\s+)", text)
    places = [place for place in range(0, len(parts), 2) if parts[place]]
    for place in rng.choice(places, max(1, int(share * len(places))), replace=False):
        parts[place] = str(rng.choice(pool))
    return "".join(parts)
