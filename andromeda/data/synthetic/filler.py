"""Text of no importance, to hide things in: made up here, or taken from documents of the caller's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import TypeAlias

from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.words import phrases
from andromeda.errors import AndromedaError

Filler: TypeAlias = Callable[[Draws], Iterator[str]]  # endless pieces, each with the blanks behind it

MOST_CHARACTERS = 1 << 24  # of documents, which are kept in memory
# A sentence or a line with the blanks behind it; what has neither for long is cut.
PIECES = re.compile(r"""(?s).{1,600}?(?:[.!?]["'”’)]*\s+|\n\s*|\Z)|.{1,600}(?:\s+|\Z)|.{1,600}""")

WHO = phrases(
    "the baker|an old sailor|the schoolteacher|a young clerk|the gardener|my neighbour|the night porter|"
    "a travelling tailor|the ferryman|a tired student|the widow next door|the mayor|a quiet stranger|the postman|"
    "the miller|her uncle|his sister|a shepherd|the librarian|the cook|an engineer|the carpenter|a visiting doctor|"
    "the innkeeper"
)
DID = phrases(
    "carried|mended|painted|forgot|admired|borrowed|cleaned|sold|described|wrapped up|put away|looked for|sketched|"
    "brought back|dropped|polished|set down|counted|covered|photographed|moved|kept"
)
WHAT = phrases(
    "a basket of apples|the wooden chair|a heavy coat|the garden tools|a loaf of bread|some letters|"
    "a broken umbrella|the blue curtains|a stack of plates|the kitchen clock|two buckets of water|a folded map|"
    "the shop window|a pair of boots|the long ladder|a jar of honey|an old newspaper|the front gate|a roll of cloth|"
    "the spare lamp"
)
WHERE = phrases(
    "beside the canal|near the station|behind the church|under the bridge|on the hill|in the market|"
    "at the corner of the street|by the river|in the courtyard|along the harbour|outside the bakery|"
    "across the square|at the edge of the wood|in the back room|on the way home|close to the school"
)
WHEN = phrases(
    "before noon|after the rain|early in the morning|late in the evening|during the holidays|once again|"
    "without a word|as usual|in the first days of spring|while the bells rang|when the shops had closed|"
    "towards the end of the week|for the second time|in good time"
)
REMARKS = phrases(
    "Nobody thought much of it.|The weather stayed mild.|It took longer than expected.|There was little traffic.|"
    "The evening passed slowly.|Everyone agreed with that.|A light wind came up.|The street was empty by then.|"
    "It was much the same as last year.|Some people shook their heads.|The trees had begun to turn.|"
    "Dinner was late that day."
)
PARAGRAPH = (5, 9)  # sentences


def everyday(draws: Draws) -> Iterator[str]:
    """Sentences of life in a small town, in paragraphs: some millions of them, without digits."""
    for sentences in iter(lambda: draws.between(*PARAGRAPH), 0):
        for left in reversed(range(sentences)):
            yield _sentence(draws) + (" " if left else "\n\n")


def documents_filler(documents: Iterable[str], most_characters: int = MOST_CHARACTERS) -> Filler:
    """Filler from documents, which are read here and now, up to `most_characters`, and kept.

    A haystack begins at a random sentence or line of them and goes on in their order, from the last to the first
    again where they end.

    Raises:
        AndromedaError: there is no text in them.
    """
    pieces: list[str] = []
    characters = 0
    for document in documents:
        cut = document.strip()[: most_characters - characters]
        pieces += PIECES.findall(f"{cut}\n\n") if cut else []
        characters += len(cut)
        if characters >= most_characters:
            break
    if not pieces:
        raise AndromedaError("synthetic tasks: the documents for filler hold no text; give some that do")

    def read(draws: Draws) -> Iterator[str]:
        start = draws.below(len(pieces))
        return (pieces[place % len(pieces)] for place in count(start))

    return read


def _sentence(draws: Draws) -> str:
    if draws.chance(6):
        return draws.choice(REMARKS)
    words = [draws.choice(WHO), draws.choice(DID), draws.choice(WHAT), draws.choice(WHERE)]
    if draws.chance(2):
        words.insert(draws.choice((0, 4)), draws.choice(WHEN))
    text = " ".join(words)
    return f"{text[0].upper()}{text[1:]}."
