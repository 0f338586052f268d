"""What a model wrote, read back as OpenAI's API has it: text, and the calls of functions in it.

A call is what our chat template writes, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, where the marks are
tokens: spelt out in ordinary ones they are text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from andromeda.tokenizer import Tokenizer

OPEN, CLOSE = "<tool_call>", "</tool_call>"
HEAD = re.compile(r'\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')  # as a grammar has it


@dataclass(frozen=True)
class ToolCall:
    """A function's name, and its arguments as JSON; `id` is what a result refers to."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Reply:
    """What the assistant said; the content is None where there are calls alone, as in OpenAI's API."""

    content: str | None
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Delta:
    """What has come: more content, or more of a call.

    Attributes:
        index: the call's number, from 0; None for content.
        id, name: in a call's first delta alone.
        arguments: more of their JSON.
    """

    content: str = ""
    index: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class ReplyStream:
    """Reads a reply while its tokens come. All content and arguments, joined, are what `read_reply` gives.

    Args:
        constrained: calls come under a grammar of `tool_calls`, so their arguments can be passed on before they are
            whole. Else a call is held back until its end, and what is none stays content.
    """

    def __init__(self, tokenizer: Tokenizer, constrained: bool = False) -> None:
        self._tokenizer, self._constrained = tokenizer, constrained
        self._open, self._close = tokenizer.token_to_id(OPEN), tokenizer.token_to_id(CLOSE)
        self._decoder = tokenizer.stream_decoder()
        self._held = ""  # a line break that may belong to a call behind it
        self._call: str | None = None  # what an open call has that was not passed on
        self._arguments: str | None = None  # of the open call, once it is being passed on
        self._calls = 0

    def push(self, ids: Iterable[int]) -> list[Delta]:
        """What these tokens bring; special ones bring nothing."""
        return [delta for token in ids for delta in self._step(token)]

    def flush(self) -> list[Delta]:
        """What is left at the end. A call that was cut off is content; under a grammar, what was passed on of it."""
        deltas = [*self._text(self._decoder.flush()), *self._end_call("")]
        if self._held:
            deltas.append(Delta(self._held))
            self._held = ""
        return deltas

    def _step(self, token: int) -> Iterator[Delta]:
        inside = self._call is not None
        if token == self._open or (token == self._close and inside):
            yield from self._text(self._decoder.flush())
            yield from self._end_call(CLOSE if token == self._close else "")
            if token == self._open:
                self._call = ""
        else:
            yield from self._text(self._decoder.step(token))

    def _text(self, text: str) -> Iterator[Delta]:
        if not text:
            return
        if self._call is not None:
            self._call += text
            if self._constrained:
                yield from self._passed_on()
            return
        text = self._held + text
        self._held = "\n" if text.endswith("\n") and self._open is not None else ""
        if text := text.removesuffix(self._held):
            yield Delta(text)

    def _passed_on(self) -> Iterator[Delta]:
        """Of a call under a grammar: its name once that is whole, then arguments, but a brace that may be its own."""
        assert self._call is not None
        if self._arguments is None:
            if not (head := HEAD.match(self._call)):
                return
            self._call, self._arguments, self._held = self._call[head.end() :], "", ""
            yield Delta(index=self._calls, id=_new_id(), name=json.loads(head[1]))
        held = "}" if self._call.endswith("}") else ""
        if arguments := self._call.removesuffix(held):
            self._arguments += arguments
            yield Delta(index=self._calls, arguments=arguments)
        self._call = held

    def _end_call(self, end: str) -> Iterator[Delta]:
        """Ends the open call, where there is one. Without an end mark it is one all the same if it is whole."""
        text, passed_on, self._call, self._arguments = self._call, self._arguments, None, None
        if text is None:
            return
        if passed_on is not None:
            if not end and _object(passed_on) is None and text:  # cut off, and the brace is the arguments'
                yield Delta(index=self._calls, arguments=text)
            self._calls += 1
        elif call := read_call(text):
            self._held = ""
            yield Delta(index=self._calls, id=call.id, name=call.name, arguments=call.arguments)
            self._calls += 1
        elif self._constrained and not end:  # cut off before its name: a call, and nothing to be shown of it
            self._held = ""
        else:
            yield from self._text(f"{OPEN}{text}{end}")


def read_reply(tokenizer: Tokenizer, ids: Iterable[int], constrained: bool = False) -> Reply:
    """The content and calls of a whole reply, as `ReplyStream` has them."""
    stream = ReplyStream(tokenizer, constrained)
    content, calls = "", list[ToolCall]()
    for delta in [*stream.push(ids), *stream.flush()]:
        content += delta.content
        if delta.name is not None and delta.id is not None:
            calls.append(ToolCall(delta.id, delta.name, delta.arguments))
        elif delta.index is not None:
            calls[-1] = ToolCall(calls[-1].id, calls[-1].name, calls[-1].arguments + delta.arguments)
    return Reply(None if calls and not content else content, tuple(calls))


def read_call(text: str) -> ToolCall | None:
    """What stands between the marks as a call, in any layout; None where it is none."""
    call = _object(text) or {}
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(_new_id(), name, json.dumps(arguments, ensure_ascii=False))


def _object(text: str) -> dict[str, object] | None:
    """A JSON object that can be sent on: without NaN, infinity or a lone surrogate, which Python's reader takes."""
    try:
        value = json.loads(text, parse_constant=float)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"
