"""Damage that a text took on its way, undone: wrong decoding, line ends of other systems, characters that stand for
nothing. What the author wrote is left alone: indentation, blank lines between stanzas, quotes, dashes, ligatures."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections import Counter
from functools import cache
from typing import Any

from andromeda.errors import AndromedaError

LINE_ENDS = ("\r", "\x85", "\u2028", "\u2029")
LINE_END = re.compile("\r\n?|[\x85\u2028\u2029]")
BEYOND = ("\ufeff", "\ufffe", "\uffff")  # byte order marks, and what is no character
NOTHING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffe\uffff\ud800-\udfff]")
C0 = bytes(code for code in range(32) if chr(code) not in "\t\n\r") + b"\x7f"
SPACES = " \t\xa0"
# Text decoded wrongly has two characters beyond ASCII side by side, or a control character of C1, or a space that was a
# no-break one (of "à"). A pattern that begins with one set of characters takes one quick pass.
SUSPECT = re.compile("[^\x00-\x7f](?:[^\x00-\x7f]|(?<=[\x80-\x9f])|(?<=Ã) )")


def unicode(text: str, changes: Counter[str]) -> str:
    """Decoded wrongly, as in "donâ€™t", put right by ftfy in the lines that can hold such; NFC."""
    text = _composed(text, changes)
    if not text.isascii() and SUSPECT.search(text):
        lines = text.split("\n")
        repaired = [_decoded(line) if SUSPECT.search(line) else line for line in lines]
        changes["lines decoded wrongly"] += sum(old != new for old, new in zip(lines, repaired, strict=True))
        text = _composed("\n".join(repaired), changes)
    return text


def _decoded(line: str) -> str:
    ftfy = _ftfy()
    return str(ftfy.fixes.fix_c1_controls(ftfy.fix_encoding(line)))


@cache
def _ftfy() -> Any:
    try:
        import ftfy
    except ImportError as error:
        raise AndromedaError("Unicode repair needs a package; pip install 'andromeda-lm[data]'") from error
    return ftfy


def _composed(text: str, changes: Counter[str]) -> str:
    if unicodedata.is_normalized("NFC", text):
        return text
    changes["texts not in NFC"] += 1
    return unicodedata.normalize("NFC", text)


def newlines(text: str, changes: Counter[str]) -> str:
    r"""\r\n, \r, and Unicode's line and paragraph ends become \n."""
    if not any(end in text for end in LINE_ENDS):
        return text
    text, count = LINE_END.subn("\n", text)
    changes["line ends"] += count
    return text


def controls(text: str, changes: Counter[str]) -> str:
    """Without control characters (tab and line ends stay), byte order marks and lone surrogates."""
    if not any(character in text for character in BEYOND):
        with contextlib.suppress(UnicodeEncodeError):  # a lone surrogate
            data = text.encode()  # bytes are looked through ten times as fast as by a pattern
            if len(data.translate(None, C0)) == len(data):
                return text
    text, count = NOTHING.subn("", text)
    changes["control characters"] += count
    return text


def trailing_spaces(text: str, changes: Counter[str]) -> str:
    """Without spaces at the ends of lines; a line of spaces becomes a blank one."""
    if not text.endswith(tuple(SPACES)) and not any(space + "\n" in text for space in SPACES):
        return text
    lines = text.split("\n")
    repaired = [line.rstrip(SPACES) for line in lines]
    changes["lines with trailing spaces"] += sum(old != new for old, new in zip(lines, repaired, strict=True))
    return "\n".join(repaired)
