"""Chat templates in Hugging Face's form, rendered so that the words of a message never turn into control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib import resources
from typing import Any, ClassVar, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from andromeda.errors import AndromedaError

Message = Mapping[str, Any]  # {"role": ..., "content": ...}, as in OpenAI's API
Tool = Mapping[str, Any]  # a JSON schema, as in OpenAI's API

# Lone surrogates stand in no valid text, so what is written with them can always be told apart and undone.
MASKS = [chr(code) for code in range(0xD800, 0xDFFE)]
GENERATION_START, GENERATION_END = "\udffe", "\udfff"  # around what {% generation %} ... {% endgeneration %} wrote
SURROGATE = re.compile("[\ud800-\udfff]")


def default_chat_template() -> str:
    """Our own template: ChatML turns, tools in the Hermes form (`<tools>`, `<tool_call>`, `<tool_response>`)."""
    return (resources.files("andromeda") / "chat_template.jinja").read_text(encoding="utf-8")


class ChatTemplate:
    """Named Jinja2 sources, as in Hugging Face: `default`, and perhaps `tool_use` for conversations with tools.

    They run sandboxed, with what transformers gives them: `messages`, `tools`, `add_generation_prompt`, the special
    tokens by name (`bos_token`, ...), `raise_exception`, `strftime_now`, `tojson`, break and continue, and
    `{% generation %}` around what the assistant says.
    Source: https://huggingface.co/docs/transformers/chat_templating_writing
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.sources = dict(sources)
        self.special_tokens = dict(special_tokens)
        self._compiled: dict[str, Template] = {}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        guard: Guard | None = None,
    ) -> str:
        """The conversation as text, with GENERATION_START and GENERATION_END left in.

        With a guard, every string handed to the template is masked first; `Guard.resolve` undoes that.

        Raises:
            AndromedaError: no messages, a message without a role, values that are not JSON, or the template's own
                complaint.
        """
        _check_messages(messages)
        mask: Callable[[str], str] = guard.mask if guard else _checked
        mask_own = guard.mask_own_words if guard else _checked
        try:
            template = self._template("tool_use" if tools and "tool_use" in self.sources else "default")
            return template.render(
                {
                    **self.special_tokens,
                    **_rebuilt(variables, mask),
                    "messages": [_rebuilt_message(message, mask, mask_own) for message in messages],
                    "tools": _rebuilt(tools, mask) if tools else None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except AndromedaError:
            raise
        except TemplateSyntaxError as error:
            raise AndromedaError(f"chat template, line {error.lineno}: {error.message}") from error
        except Exception as error:  # a template is a program: it can fail in any way
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise AndromedaError(f"chat template: {kind}{' '.join(str(error).split())}") from error

    def _template(self, name: str) -> Template:
        if name not in self._compiled:
            if name not in self.sources:
                raise AndromedaError(f"chat template: none is named {name!r}, only {', '.join(self.sources)}")
            self._compiled[name] = _environment().from_string(self.sources[name])
        return self._compiled[name]


class Guard:
    """Masks, in text that is not the template's own, whatever could be read as a control token.

    A control token can only be read where its first character stands. So in every string of a conversation, at any
    depth, that character is swapped for a mask wherever a control token is spelt out. A token could also be pieced
    together from a string's edge and what the template writes beside it; there a punctuation mark of the overlap is
    swapped (letters alone are left, for some templates spell a token around a role: `<|` + role + `|>`). Ordinary
    text holds nothing to mask, so the template sees it as it is. Whatever is still a control token in the rendered
    text was written by the template.

    Args:
        special: control tokens that no message may hold.
        visible: control tokens that only the assistant's own content may hold: the marks around its tool calls or
            thoughts, which are part of the text it wrote.
    """

    def __init__(self, special: Iterable[str], visible: Iterable[str]) -> None:
        self._special = _Names(special)
        self._any = _Names([*self._special.names, *visible])
        names = self._any.names
        marks = {character for name in names for character in name if _is_mark(character)}
        self._mark = _one_of(marks)
        self._beginnings = {name[:size] for name in names for size in range(1, len(name))}
        self._endings = {name[size:] for name in names for size in range(1, len(name))}
        self._inside = "\n".join(names)
        characters = sorted(marks | {name[0] for name in names})
        if len(characters) > len(MASKS):
            raise AndromedaError(
                f"chat: the special tokens hold {len(characters)} different marks, {len(MASKS)} at most can be masked"
            )
        self._masks = dict(zip(characters, MASKS, strict=False))
        self._unmasked = {ord(mask): character for character, mask in self._masks.items()}

    def mask(self, text: str) -> str:
        """Text of a message, safe to be handed to a template; it has the same length."""
        return self._masked(text, self._any)

    def mask_own_words(self, text: str) -> str:
        """The same for the assistant's own content, which may hold the visible control tokens."""
        return self._masked(text, self._special)

    def resolve(self, rendered: str, names: Mapping[str, str]) -> str:
        """Rendered text with the template's control tokens under other names, and the masked text as it was."""
        parts, end = [], 0
        for start, name in self._any.starting(rendered):
            if start >= end:
                parts += [rendered[end:start], names[name]]
                end = start + len(name)
        return "".join([*parts, rendered[end:]]).translate(self._unmasked)

    def first_control_token(self, text: str) -> str | None:
        return next((name for _, name in self._any.starting(text)), None)

    def _masked(self, text: str, names: _Names) -> str:
        positions = {start for start, _ in names.starting(_checked(text))}
        if self._mark.search(text):
            positions.update(self._edge_marks(text))
        if not positions:
            return text
        characters = list(text)
        for position in positions:
            characters[position] = self._masks[characters[position]]
        return "".join(characters)

    def _edge_marks(self, text: str) -> Iterator[int]:
        """Where the first mark stands in every edge of a text that is a part of a control token."""
        # Templates often trim what they are given, so the trimmed text has edges of its own.
        for start, stop in {(0, len(text)), (len(text) - len(text.lstrip()), len(text.rstrip()))}:
            for first, last in self._overlaps(text, start, stop):
                if mark := self._mark.search(text, first, last):
                    yield mark.start()

    def _overlaps(self, text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        for size in range(1, min(self._any.longest, stop - start + 1)):
            if text[stop - size : stop] in self._beginnings:
                yield stop - size, stop
            if text[start : start + size] in self._endings:
                yield start, start + size
        if text[start:stop] in self._inside and text[start:stop] not in self._any.names:
            yield start, stop


class _Names:
    """Strings to be found in text, thousands of them perhaps, at a cost that hardly grows with their number."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self._sizes = sorted({len(name) for name in self.names}, reverse=True)
        self.longest = self._sizes[0] if self._sizes else 0
        self._first = _one_of({name[0] for name in self.names})

    def starting(self, text: str) -> Iterator[tuple[int, str]]:
        """Every position where a name starts, with the longest of those that do."""
        for match in self._first.finditer(text):
            start = match.start()
            for size in self._sizes:
                if text[start : start + size] in self.names:
                    yield start, text[start : start + size]
                    break


def _one_of(characters: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(characters))) or "(?!)")


def _is_mark(character: str) -> bool:
    return not (character.isalnum() or character.isspace() or character == "_")


def _checked(text: str) -> str:
    if found := SURROGATE.search(text):
        raise AndromedaError(f"chat: a message is not valid Unicode (a lone surrogate at character {found.start()})")
    return text


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise AndromedaError("chat: there are no messages; give at least one")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise AndromedaError(f"chat: message {number} must be an object with a role")


def _rebuilt_message(message: Message, mask: Callable[[str], str], mask_own: Callable[[str], str]) -> dict[str, Any]:
    rebuilt: dict[str, Any] = _rebuilt(message, mask)
    if message["role"] == "assistant":
        if "content" in message:
            rebuilt["content"] = _rebuilt(message["content"], mask_own)
        if message.get("tool_calls"):
            rebuilt["tool_calls"] = [_rebuilt(_parsed_call(call), mask) for call in message["tool_calls"]]
    return rebuilt


def _parsed_call(call: Any) -> Any:
    """OpenAI's API gives a call's arguments as JSON text, while templates expect the object it spells."""
    if not isinstance(call, Mapping):
        return call
    if "function" in call:
        return {**call, "function": _parsed_call(call["function"])}
    if not isinstance(call.get("arguments"), str):
        return call
    try:
        arguments = json.loads(call["arguments"])
    except ValueError:
        return call  # what a model wrote may be broken; the template then shows it as it stands
    readable = isinstance(arguments, dict) and not SURROGATE.search(json.dumps(arguments, ensure_ascii=False))
    return {**call, "arguments": arguments} if readable else call


def _rebuilt(value: Any, mask: Callable[[str], str]) -> Any:
    """A copy in plain JSON types alone, so that no object's methods reach the template, with its strings masked."""
    if isinstance(value, str):
        return mask(str(value))
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {_rebuilt(key, mask): _rebuilt(item, mask) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rebuilt(item, mask) for item in value]
    raise AndromedaError(f"chat: messages and tools hold plain JSON values only, not {type(value).__name__}")


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant says, told apart from what it is told."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (GENERATION_START, GENERATION_END))
        return nodes.Scope([start, *body, end]).set_lineno(line)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja2 as transformers sets it up (transformers/utils/chat_template_utils.py)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML's escapes; masks stay as they are, so that they can be undone."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:
        text = re.sub("[^\x00-\x7f\ud800-\udfff]", lambda match: json.dumps(match[0])[1:-1], text)
    return text


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
