"""Span corruption: spans of a document are taken out, a sentinel in the place of each, and asked for behind it.

    Thank you <|span_0|> me to your party <|span_1|> . <|span_0|> for inviting <|span_1|> last week

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020,
arXiv:1910.10683), with its figures: 15% of the tokens, in spans of 3 on average. For one model that reads and writes,
the targets follow the text, as in Tay et al., "UL2" (2022, arXiv:2205.05131), and only they are learned: the spans and
the sentinels between them, not that which opens them, for where a text ends cannot be known.

Two departures. Sentinels are 32, not 100, which small vocabularies have no room for; of a document with more than about
640 tokens the spans are longer instead, as UL2's are. And a span may stand anywhere: T5's code always ends with one.
"""

from __future__ import annotations

from collections.abc import Sequence

from andromeda.data.augment.technique import Ids, Learned, Technique
from andromeda.data.synthetic.draws import Draws

PERCENT = 15  # of the tokens
SPAN_TOKENS = 3  # of a span, on average
SENTINELS = tuple(f"<|span_{number}|>" for number in range(32))


def corrupted(encoded: Sequence[Ids], draws: Draws, sentinels: Sequence[int]) -> tuple[Ids, Learned]:
    """The text with sentinels and then the spans, and that only these are learned; under 2 tokens as they are."""
    (ids,) = encoded
    if len(ids) < 2:
        return ids, None
    given, asked, place = list[int](), list[int](), 0
    for sentinel, (begin, end) in zip(sentinels, spans(len(ids), len(sentinels), draws), strict=False):
        given += [*ids[place:begin], sentinel]
        asked += [sentinel, *ids[begin:end]]
        place = end
    given += ids[place:]
    return given + asked, [False] * (len(given) + 1) + [True] * (len(asked) - 1)


def spans(num_tokens: int, most: int, draws: Draws) -> list[tuple[int, int]]:
    """[begin, end) of at most so many spans of a text of 2 tokens or more, in order, at least a token between two.

    All ways to divide what is taken out into spans, and to place these among what stays, are equally likely.
    """
    taken = min(max(1, (PERCENT * num_tokens + 50) // 100), num_tokens - 1)
    stays = num_tokens - taken
    count = max(1, min(most, (2 * taken + SPAN_TOKENS) // (2 * SPAN_TOKENS), stays + 1))
    cuts = [0, *(1 + cut for cut in distinct(taken - 1, count - 1, draws)), taken]
    before = distinct(stays + 1, count, draws)  # tokens that stay and stand before each span
    return [(gap + cut, gap + end) for gap, cut, end in zip(before, cuts[:-1], cuts[1:], strict=True)]


def distinct(limit: int, count: int, draws: Draws) -> list[int]:
    """`count` different numbers of range(limit), rising; any are equally likely. R. Floyd's way (CACM 30, 1987)."""
    chosen: set[int] = set()
    for last in range(limit - count, limit):
        number = draws.below(last + 1)
        chosen.add(last if number in chosen else number)
    return sorted(chosen)


SPANS = Technique(lambda text, _: (text,), corrupted, SENTINELS, masks=True)
