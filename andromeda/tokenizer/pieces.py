"""Many texts to ids by the pieces that they are cut into: language repeats its words, so most are known by then.

The library cuts and merges each word of a text anew; here each different one is encoded by it once. Only for
vocabularies that cut as ours do, and texts of the letters and signs below, which Python's patterns cut the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tokenizers

from andromeda.tokenizer.training import PIECES

# In place of \p{L}: Latin letters. No combining marks, numbers and blanks but ASCII's are among the characters allowed.
LETTERS = "A-Za-z\xaa\xb5\xba\xc0-\xd6\xd8-\xf6\xf8-\u024f"
BLANKS = r"\t-\r "
SIGNS = "!-/:-@\\[-`{-~\x00-\x08\x0e-\x1f\x7f\xa1-\xa9\xab-\xb1\xb4\xb6-\xb8\xbb\xbf\xd7\xf7\u2010-\u2027\u2030-\u205e"
OTHER = re.compile(f"[^{LETTERS}0-9{BLANKS}{SIGNS}]")
PIECE = re.compile(
    f"[^\\r\\n{LETTERS}0-9]?[{LETTERS}]+"
    "|[0-9]"
    f"| ?[^{BLANKS}{LETTERS}0-9]+"
    f"|[{BLANKS}]*[\\r\\n][{BLANKS}]*"
    f"|[{BLANKS}]+(?![^{BLANKS}])"
    f"|[{BLANKS}]+"
)
KNOWN = 1 << 18  # pieces that are remembered, in some 40 MB
LONGEST = 64  # characters of a piece; longer ones are no words, and come once


def cuts_as_ours(spec: Mapping[str, Any], control: Iterable[str]) -> bool:
    """Whether a tokenizer.json, its control tokens aside, encodes a text piece by piece, and cuts these by PIECES."""
    cut = spec["pre_tokenizer"] or {}
    steps = cut.get("pretokenizers") or [{}]
    ours = [
        {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False},
        {**steps[-1], "type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    others = {token["content"] for token in spec["added_tokens"]}.difference(control)
    settings = (spec["normalizer"], spec["truncation"], spec["padding"], spec["model"].get("dropout"))
    return steps == ours and spec["model"]["type"] == "BPE" and settings == (None,) * 4 and not others


class PieceEncoder:
    """
    Args:
        encoder: of which no text is a control token.
    """

    def __init__(self, encoder: tokenizers.Tokenizer) -> None:
        self._encoder = encoder
        self._known: dict[str, bytes] = {}

    def encode(self, text: str) -> list[int] | None:
        """None: the text has other characters, or pieces that are too long."""
        if not text.isascii() and OTHER.search(text):
            return None
        pieces = PIECE.findall(text)
        known = self._known  # other threads may begin a new one meanwhile
        new = list(set(pieces).difference(known))
        if new:
            if any(len(piece) > LONGEST for piece in new):
                return None
            if len(known) + len(new) > KNOWN:
                known = self._known = {}
                new = list(set(pieces))
            encodings = self._encoder.encode_batch_fast(new, add_special_tokens=False)
            known.update({piece: np.array(it.ids, "<u4").tobytes() for piece, it in zip(new, encodings, strict=True)})
        return np.frombuffer(b"".join(map(known.__getitem__, pieces)), "<u4").tolist()
