"""From pieces of texts to OpenAI's answers: whole, or in chunks."""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from andromeda import __version__
from andromeda.inference.tool_calls import Delta
from andromeda.serving.jobs import Asked
from andromeda.serving.pieces import Count, Logprob, Piece
from andromeda.serving.requests import ChatRequest
from andromeda.serving.responses import (
    CachedTokens,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    FunctionCall,
    FunctionDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)

FUNCTION: Literal["function"] = "function"
FINGERPRINT = f"andromeda-{__version__}"


class Form(Protocol):
    """How one answer is told."""

    def chunks(self, piece: Piece) -> Iterable[BaseModel]:
        """What a stream says of a piece, often nothing."""

    def last_chunk(self, count: Count) -> BaseModel:
        """What a stream says of the tokens, for whom asks."""

    def whole(self, pieces: Sequence[Piece], count: Count) -> BaseModel:
        """All of it at once."""


def form_of(asked: Asked) -> Form:
    return ChatForm(asked) if isinstance(asked, ChatRequest) else CompletionForm(asked)


def _head(asked: Asked, kind: str) -> dict[str, Any]:
    identity = f"{kind}-{secrets.token_hex(12)}"
    return {"id": identity, "created": int(time.time()), "model": asked.model, "system_fingerprint": FINGERPRINT}


def _usage(count: Count) -> Usage:
    return Usage(
        prompt_tokens=count.prompt_tokens,
        completion_tokens=count.completion_tokens,
        total_tokens=count.prompt_tokens + count.completion_tokens,
        prompt_tokens_details=CachedTokens(cached_tokens=count.cached_tokens),
    )


def _by_choice(pieces: Iterable[Piece]) -> list[list[Piece]]:
    found: dict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        found[piece.index].append(piece)
    return [found[index] for index in sorted(found)]


def _end(pieces: Sequence[Piece]) -> FinishReason:
    reason = pieces[-1].finish_reason
    assert reason is not None, "a text has a last piece"
    return reason


class ChatForm:
    """chat.completion and chat.completion.chunk.

    Source: https://platform.openai.com/docs/api-reference/chat/object
    """

    def __init__(self, asked: ChatRequest) -> None:
        self._head = _head(asked, "chatcmpl")
        self._logprobs = bool(asked.logprobs)
        self._begun: set[int] = set()

    def chunks(self, piece: Piece) -> Iterable[ChatCompletionChunk]:
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            yield self._chunk(ChatChunkChoice(index=piece.index, delta=ChatDelta(role="assistant", content="")))
        if piece.text or piece.calls or piece.logprobs:
            delta = ChatDelta()
            if piece.text or not piece.calls:
                delta.content = piece.text
            if piece.calls:
                delta.tool_calls = [_call_delta(call) for call in piece.calls]
            yield self._chunk(
                ChatChunkChoice(index=piece.index, delta=delta, logprobs=self._chat_logprobs(piece.logprobs))
            )
        if piece.finish_reason is not None:
            yield self._chunk(
                ChatChunkChoice(index=piece.index, delta=ChatDelta(), finish_reason=piece.finish_reason)
            )  # fmt: skip

    def last_chunk(self, count: Count) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._head, choices=[], usage=_usage(count))

    def whole(self, pieces: Sequence[Piece], count: Count) -> ChatCompletion:
        choices = [self._choice(index, its) for index, its in enumerate(_by_choice(pieces))]
        return ChatCompletion(**self._head, choices=choices, usage=_usage(count))

    def _choice(self, index: int, pieces: Sequence[Piece]) -> ChatChoice:
        text, calls = "".join(piece.text for piece in pieces), _whole_calls(pieces)
        message = ChatMessage(content=None if calls and not text else text, tool_calls=calls or None)
        logprobs = self._chat_logprobs([entry for piece in pieces for entry in piece.logprobs])
        return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=_end(pieces))

    def _chunk(self, choice: ChatChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._head, choices=[choice])

    def _chat_logprobs(self, entries: Sequence[Logprob]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **_token(entry.token, entry.logprob),
                    top_logprobs=[TopLogprob(**_token(token, value)) for token, value in entry.top],
                )
                for entry in entries
            ]
        )


def _token(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _shown(token), "logprob": logprob, "bytes": list(token)}


def _shown(token: bytes) -> str:
    """Bytes that are no UTF-8 by themselves as `\\xe6`."""
    return token.decode("utf-8", "backslashreplace")


def _call_delta(delta: Delta) -> ToolCallDelta:
    assert delta.index is not None
    function = FunctionDelta(name=delta.name, arguments=delta.arguments)
    kind = None if delta.id is None else FUNCTION
    return ToolCallDelta(index=delta.index, id=delta.id, type=kind, function=function)


def _whole_calls(pieces: Iterable[Piece]) -> list[ToolCall]:
    calls: list[ToolCall] = []
    for delta in (delta for piece in pieces for delta in piece.calls):
        if delta.id is not None and delta.name is not None:
            calls.append(ToolCall(id=delta.id, function=FunctionCall(name=delta.name, arguments="")))
        calls[-1].function.arguments += delta.arguments
    return calls


class CompletionForm:
    """text_completion, whole and in chunks.

    Source: https://platform.openai.com/docs/api-reference/completions/object
    """

    def __init__(self, asked: Asked) -> None:
        self._head = _head(asked, "cmpl")
        self._logprobs = asked.logprobs is not None

    def chunks(self, piece: Piece) -> Iterable[Completion]:
        if piece.text or piece.logprobs or piece.finish_reason:
            yield Completion(**self._head, choices=[self._choice(piece.index, [piece], piece.finish_reason)])

    def last_chunk(self, count: Count) -> Completion:
        return Completion(**self._head, choices=[], usage=_usage(count))

    def whole(self, pieces: Sequence[Piece], count: Count) -> Completion:
        choices = [self._choice(index, its, _end(its)) for index, its in enumerate(_by_choice(pieces))]
        return Completion(**self._head, choices=choices, usage=_usage(count))

    def _choice(self, index: int, pieces: Sequence[Piece], end: FinishReason | None) -> CompletionChoice:
        entries = [entry for piece in pieces for entry in piece.logprobs]
        logprobs = _completion_logprobs(entries) if self._logprobs else None
        text = "".join(piece.text for piece in pieces)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=end)


def _completion_logprobs(entries: Sequence[Logprob]) -> CompletionLogprobs:
    """Of the most probable tokens and the one that was drawn."""
    return CompletionLogprobs(
        tokens=[_shown(entry.token) for entry in entries],
        token_logprobs=[entry.logprob for entry in entries],
        top_logprobs=[
            {_shown(token): value for token, value in [*entry.top, (entry.token, entry.logprob)]} for entry in entries
        ],
        text_offset=[entry.offset for entry in entries],
    )
