"""Verse in another order: the lines of each stanza, or the stanzas. What stands between them stays where it is."""

from __future__ import annotations

import re

from andromeda.data.augment.technique import Technique
from andromeda.data.synthetic.draws import Draws

LINE_END, BLANKS = r"(?:\r\n|\n|\r)", r"[^\S\r\n]*"
LINE_BORDER = re.compile(rf"({LINE_END})")
# Blank lines before, between and behind stanzas, with the line end before them.
STANZA_BORDER = re.compile(rf"(\A(?:{BLANKS}{LINE_END})+|{LINE_END}(?:{BLANKS}{LINE_END})+|{LINE_END}{BLANKS}\Z)")


def other_lines(text: str, draws: Draws) -> str:
    """Each stanza's lines in an order that is drawn, all of them equally likely."""
    stanzas = STANZA_BORDER.split(text)
    stanzas[::2] = [_permuted(stanza, LINE_BORDER, draws) for stanza in stanzas[::2]]
    return "".join(stanzas)


def other_stanzas(text: str, draws: Draws) -> str:
    """The stanzas in an order that is drawn, all of them equally likely."""
    return _permuted(text, STANZA_BORDER, draws)


def _permuted(text: str, border: re.Pattern[str], draws: Draws) -> str:
    """Parts that are blank stay in their places too."""
    parts = border.split(text)
    places = [place for place in range(0, len(parts), 2) if parts[place].strip()]
    for place, part in zip(places, draws.shuffled([parts[place] for place in places]), strict=True):
        parts[place] = part
    return "".join(parts)


LINES = Technique(lambda text, draws: (other_lines(text, draws),))
STANZAS = Technique(lambda text, draws: (other_stanzas(text, draws),))
