"""What may come next in one text: the state that moves on with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from andromeda.errors import AndromedaError

if TYPE_CHECKING:
    from llguidance import LLMatcher


class GrammarConstraint:
    """The state of one text under a grammar, as `andromeda.inference.engine.request.Constraint` has it.

    One thread may use it at a time; other constraints, of the same grammar too, are none of its business. The end of
    the text is kept here, as llguidance takes no end token where nothing else can come.

    Args:
        matcher: llguidance's, at the beginning of the text; it is moved on.
        vocab_size: of the tokenizer; no id from there on is ever allowed.
        stop_ids: any of these may come where the text may end, and nothing after it.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, stop_ids: Sequence[int]) -> None:
        self._matcher, self._vocab_size, self._stop_ids = matcher, vocab_size, frozenset(stop_ids)
        self._length = 0
        self._ended = False

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Sets bit t % 32 of row[t // 32] where token t may come next, and clears it where not.

        At least one token may: an end token where the text may end, and after the end.

        Args:
            row: as many words as the model's vocabulary takes; what the tokenizer does not have is cleared.

        Raises:
            AndromedaError: the grammar is too complex to go on.
        """
        words = -(-self._vocab_size // 32)
        if row.dtype != np.int32 or row.ndim != 1 or len(row) < words or not row.flags.c_contiguous:
            raise ValueError(f"a mask is {words} or more contiguous int32, not {row.dtype} of shape {row.shape}")
        row[words:] = 0
        if self._ended:
            row[:words] = 0
            bits = row.view(np.uint32)
            for token in self._stop_ids:
                bits[token // 32] |= np.uint32(1 << token % 32)
        else:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, 4 * words)
            self._check()

    def advance(self, tokens: Sequence[int]) -> int:
        """Moves on by these tokens, up to the first that may not come; returns by how many.

        Raises:
            AndromedaError: the grammar is too complex to go on.
        """
        inside = self._up_to_end(tokens)
        taken = self._matcher.try_consume_tokens(inside) if inside else 0
        self._check()
        if taken == len(inside) < len(tokens) and tokens[taken] in self._stop_ids and not self._ended:
            self._ended = self._matcher.is_accepting()
            taken += self._ended
        self._length += taken
        return taken

    def rollback(self, tokens: int) -> None:
        """Takes back the last so many tokens."""
        if not 0 <= tokens <= self._length:
            raise ValueError(f"cannot take back {tokens} tokens of {self._length}")
        self._length -= tokens
        if self._ended and tokens:
            self._ended = False
            tokens -= 1
        if tokens:
            self._matcher.rollback(tokens)
            self._check()

    def forced(self) -> list[int]:
        """Tokens of the text that must come next, spelt as the tokenizer does; the same text may have other ids too.

        Raises:
            AndromedaError: the grammar is too complex to go on.
        """
        tokens = self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    def _up_to_end(self, tokens: Sequence[int]) -> list[int]:
        """Those before the first that llguidance is not to see: an end token, or no token at all."""
        inside: list[int] = []
        for token in tokens:
            if self._ended or token in self._stop_ids or not 0 <= token < self._vocab_size:
                break
            inside.append(token)
        return inside

    def _check(self) -> None:
        if self._matcher.is_error():
            raise AndromedaError(f"grammar: too complex to go on ({reason(self._matcher)}); simplify it")


def reason(matcher: LLMatcher) -> str:
    """What a matcher has come to grief over, in one line, without the excerpt of the grammar that may follow."""
    message = re.split(r"\n\s*\d+ \| |<non-verbose/>", matcher.get_error())[0]
    words = " ".join(re.sub(r"^at \d+\(\d+\): ", "", message).split())
    if words == "NoExtensionBias":
        return "no text does"
    return words if len(words) <= 200 else f"{words[:200]}..."
