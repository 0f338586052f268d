"""Text in, text out: pieces of whole characters, up to a stop string, an end token or a length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from andromeda.chat import Message, Tool
from andromeda.errors import AndromedaError
from andromeda.inference.generate import Context, generate
from andromeda.inference.sampling import Sampling
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """What was written, and what it took.

    Attributes:
        text: without the prompt and without the stop string.
        ids: every token drawn, an end token and the stop string's among them.
        finish_reason: `stop` for an end token or a stop string, `length` otherwise.
        prompt_tokens: of which cached_tokens were in the context already.
        prefill_seconds: until the first token was there.
        decode_seconds: from there to the last one, without the time that the reader of the stream took.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def completion_tokens(self) -> int:
        return len(self.ids)

    @property
    def tokens_per_second(self) -> float:
        """Of decoding alone, the first token left out; 0 where there is no other."""
        return (len(self.ids) - 1) / self.decode_seconds if len(self.ids) > 1 else 0.0


class TextStream(Iterator[str]):
    """The pieces of one text as they come, none of them empty; `completion` says at any time what there is so far."""

    def __init__(
        self,
        tokens: Iterator[int],
        tokenizer: Tokenizer,
        stop: Sequence[str],
        prompt_tokens: int = 0,
        cached_tokens: int = 0,
    ) -> None:
        self._tokens, self._prompt_tokens, self._cached_tokens = tokens, prompt_tokens, cached_tokens
        self._spelling = Spelling(tokenizer, stop)
        self._shown: list[str] = []
        self._ids: list[int] = []
        self._seconds: list[float] = []
        self._pieces = self._stream()

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def completion(self) -> Completion:
        return Completion(
            text="".join(self._shown),
            ids=tuple(self._ids),
            finish_reason="stop" if self._spelling.ended else "length",
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            prefill_seconds=sum(self._seconds[:1]),
            decode_seconds=sum(self._seconds[1:]),
        )

    def _stream(self) -> Iterator[str]:
        for piece in self._released():
            if piece:
                self._shown.append(piece)
                yield piece

    def _released(self) -> Iterator[str]:
        for token in self._timed_tokens():
            yield self._spelling.push(token)
            if self._spelling.ended:
                return
        yield self._spelling.flush()

    def _timed_tokens(self) -> Iterator[int]:
        started = perf_counter()
        for token in self._tokens:
            self._seconds.append(perf_counter() - started)
            self._ids.append(token)
            yield token
            started = perf_counter()


def stream_text(
    model: Andromeda,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
    context: Context | None = None,
) -> TextStream:
    """Continues a prompt as text.

    Args:
        prompt: text, or token ids as `text_prompt` and `chat_prompt` give them.
        stop: strings that end the text. What may turn out to be the beginning of one is held back; the one that
            begins first ends the text, and is not shown.
        max_new_tokens, sampling, seed, context: as in `andromeda.inference.generate.generate`.

    Raises:
        AndromedaError: an empty stop string, or whatever `generate` finds wrong.
    """
    ids = text_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt
    context = Context() if context is None else context
    tokens = generate(
        model, ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=tokenizer.stop_ids, seed=seed,
        vocab_size=tokenizer.vocab_size, context=context,
    )  # fmt: skip
    return TextStream(tokens, tokenizer, stop, prompt_tokens=len(ids), cached_tokens=context.cache.length)


def text_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text to be continued, or of none: behind an end-of-text token, as every document in training is."""
    return [tokenizer.eos_id, *tokenizer.encode(text)]


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
    """Ids of a conversation up to where the assistant is to speak, behind an end-of-text token too."""
    return [tokenizer.eos_id, *tokenizer.encode_chat(messages, tools)]


class Spelling:
    """The text that tokens spell as they come, in whole characters, up to a stop string or an end token.

    Attributes:
        ended: by one of these; nothing comes any more.
        spelt, shown: characters that the tokens have spelt, and those of them that were let through.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder, self._stops = tokenizer.stream_decoder(), StopStrings(stop)
        self._stop_ids = frozenset(tokenizer.stop_ids)
        self.ended, self.spelt, self.shown = False, 0, 0

    def push(self, token: int) -> str:
        """What can be shown now that `token` has come."""
        if self.ended:
            return ""
        if token in self._stop_ids:
            shown = self.flush()
            self.ended = True
            return shown
        return self._let_through(self._decoder.step(token))

    def flush(self) -> str:
        """What is left to show when no more tokens come."""
        if self.ended:
            return ""
        shown = self._let_through(self._decoder.flush())
        rest = self._stops.flush()
        self.shown += len(rest)
        self.ended = self._stops.found
        return shown + rest

    def _let_through(self, text: str) -> str:
        self.spelt += len(text)
        shown = self._stops.push(text)
        self.shown += len(shown)
        self.ended = self._stops.found
        return shown


class StopStrings:
    """Lets text through up to the stop string that begins first, in pieces of any size.

    Attributes:
        found: whether there was one; nothing comes through any more.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise AndromedaError("generate: a stop string is empty, and would end every text; leave it out")
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """What can be shown now that `piece` has come."""
        if self.found:
            return ""
        self._held += piece
        first, unsettled = self._first_stop(), self._first_beginning()
        if first <= unsettled and first < len(self._held):
            return self._end(first)
        shown, self._held = self._held[:unsettled], self._held[unsettled:]
        return shown

    def flush(self) -> str:
        """What is left to show when no more text comes."""
        return self._end(self._first_stop())

    def _end(self, position: int) -> str:
        self.found = self.found or position < len(self._held)
        shown, self._held = self._held[:position], ""
        return shown

    def _first_stop(self) -> int:
        """Where the first whole stop string begins; the end if there is none."""
        places = (self._held.find(stop) for stop in self._stops)
        return min((place for place in places if place >= 0), default=len(self._held))

    def _first_beginning(self) -> int:
        """Where text begins that runs to the end and may yet become a stop string; the end if there is none."""
        end = len(self._held)
        longest = max(map(len, self._stops), default=0)
        for start in range(max(0, end - longest + 1), end):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return start
        return end
