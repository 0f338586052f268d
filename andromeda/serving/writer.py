"""One text as it is written: the engine's tokens in, pieces out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from andromeda.inference.engine.request import Token, Update
from andromeda.inference.text import Spelling, StopStrings
from andromeda.inference.tool_calls import Delta, ReplyStream
from andromeda.serving.pieces import Logprob, Piece
from andromeda.serving.responses import FinishReason
from andromeda.tokenizer import Tokenizer


class Writer:
    """Turns updates of one text into pieces of it.

    Args:
        index: of the text among the choices.
        stops: strings that end it.
        calls: whether calls of tools are to be told from it; what `constraint` it is written under has them in form.

    Attributes:
        ended: why; None while it goes on.
        tokens: that were drawn for it.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, stops: Sequence[str], calls: bool) -> None:
        self._index, self._tokenizer = index, tokenizer
        self._reader: _Reader = _ReplyReader(tokenizer, stops) if calls else _TextReader(tokenizer, stops)
        self._waiting: list[Logprob] = []  # of tokens whose text is held back
        self._called = False
        self.ended: FinishReason | None = None
        self.tokens = 0

    def push(self, update: Update) -> Piece:
        """What an update adds that is no failure."""
        deltas: list[Delta] = []
        drawn = 0
        for token in update.tokens:
            if self._reader.ended:  # what was drafted beyond a stop string
                break
            drawn += 1
            before = self._reader.spelt
            deltas += self._reader.push(token.id)
            if token.logprob is not None and token.id not in self._tokenizer.stop_ids:
                self._waiting.append(self._logprob(token, token.logprob, before))
        if self._reader.ended or update.finish_reason is not None:
            return self._last(deltas, drawn)
        return self._piece(deltas, drawn)

    def cut(self) -> Piece:
        """The last piece of a text whose time is up."""
        return self._last([], 0)

    def _last(self, deltas: list[Delta], drawn: int) -> Piece:
        deltas += self._reader.flush()
        self._called = self._called or any(delta.index is not None for delta in deltas)
        whole: FinishReason = "tool_calls" if self._called else "stop"
        self.ended = whole if self._reader.ended else "length"
        return self._piece(deltas, drawn)

    def _piece(self, deltas: Iterable[Delta], drawn: int) -> Piece:
        self.tokens += drawn
        calls = tuple(delta for delta in deltas if delta.index is not None)
        self._called = self._called or bool(calls)
        text = "".join(delta.content for delta in deltas)
        return Piece(self._index, text, calls, self._released(), drawn, self.ended)

    def _logprob(self, token: Token, logprob: float, offset: int) -> Logprob:
        spelt = self._tokenizer.token_bytes
        return Logprob(spelt(token.id), logprob, tuple((spelt(other), value) for other, value in token.top), offset)

    def _released(self) -> tuple[Logprob, ...]:
        """Of tokens whose text is out; one that a stop string cuts is among them, those behind it never."""
        shown, all_out = self._reader.shown, self._reader.shown == self._reader.spelt
        ready = [entry for entry in self._waiting if all_out or entry.offset < shown]
        self._waiting = self._waiting[len(ready) :]
        return tuple(ready)


class _Reader(Protocol):
    """Tokens to what they say.

    Attributes:
        ended: by an end token or a stop string.
        spelt, shown: characters that the tokens have spelt, and those that were let through.
    """

    @property
    def ended(self) -> bool: ...

    @property
    def spelt(self) -> int: ...

    @property
    def shown(self) -> int: ...

    def push(self, token: int) -> list[Delta]: ...

    def flush(self) -> list[Delta]: ...


class _TextReader:
    """Text alone."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._spelling = Spelling(tokenizer, stops)

    @property
    def ended(self) -> bool:
        return self._spelling.ended

    @property
    def spelt(self) -> int:
        return self._spelling.spelt

    @property
    def shown(self) -> int:
        return self._spelling.shown

    def push(self, token: int) -> list[Delta]:
        return [Delta(self._spelling.push(token))]

    def flush(self) -> list[Delta]:
        return [Delta(self._spelling.flush())]


class _ReplyReader:
    """Text and calls of tools; stop strings are looked for in the text alone. All counts as shown at once."""

    spelt = shown = 0

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._stream, self._stops = ReplyStream(tokenizer, constrained=True), StopStrings(stops)
        self._stop_ids, self.ended = frozenset(tokenizer.stop_ids), False

    def push(self, token: int) -> list[Delta]:
        if token in self._stop_ids:
            deltas = self.flush()
            self.ended = True
            return deltas
        return self._let_through(self._stream.push([token]))

    def flush(self) -> list[Delta]:
        if self.ended:
            return []
        deltas = [*self._let_through(self._stream.flush()), Delta(self._stops.flush())]
        self.ended = self._stops.found
        return deltas

    def _let_through(self, deltas: Iterable[Delta]) -> list[Delta]:
        shown: list[Delta] = []
        for delta in deltas:
            if delta.index is None:
                shown.append(Delta(self._stops.push(delta.content)))
            else:
                shown.append(Delta(self._stops.flush()))  # no stop string goes on behind a call
                if not self._stops.found:
                    shown.append(delta)
            if self._stops.found:
                break
        self.ended = self._stops.found
        return shown
