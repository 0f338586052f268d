"""How a record becomes a document: a text, or a conversation in the form that the chat template takes.

text: text                                a field as it is
text: "{title}\\n\\n{text}"                 fields within other words
user: "{question}"                        a conversation of two or three turns
assistant: "{answer}"
messages: messages                        a whole conversation, in the form of OpenAI's API or near it
tools: tools                              and the functions that it may call
"""

from __future__ import annotations

import math
import reprlib
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from andromeda.data import files
from andromeda.data.json_object import BadRecordError, Record, parsed, plain
from andromeda.errors import AndromedaError

ROLES = frozenset({"system", "user", "assistant", "tool"})
MESSAGE_KEYS = frozenset({"role", "content", "tool_calls", "tool_call", "tool_call_id", "name"})
CALL_KEYS = frozenset({"id", "type", "index", "function"})
FUNCTION_KEYS = frozenset({"name", "arguments"})

SHOWN = 30  # names in a message, and characters of each


@dataclass(frozen=True)
class Document:
    """A text, or a conversation.

    Attributes:
        where: its file within the corpus folder, and line or row, as in poems.jsonl.xz:17.
        text: None: it is a conversation.
        messages, tools: as the chat template takes them.
        span: of a text, the characters [begin, end) that are learned; None: all.
    """

    where: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Fields:
    """How a record becomes a document: `text`, or `assistant` with or without `system` and `user`, or `messages`.

    All but `messages` and `tools`, which name a field, are a field's name, or words with {fields} in braces ({{ for {).

    Raises:
        AndromedaError: none or several of the three, or words that are no template.
    """

    text: str | None = None
    system: str | None = None
    user: str | None = None
    assistant: str | None = None
    messages: str | None = None
    tools: str | None = None

    def __post_init__(self) -> None:
        turns = [name for name in ("system", "user", "assistant") if getattr(self, name) is not None]
        ways = [self.text is not None, bool(turns), self.messages is not None]
        if sum(ways) != 1 or (turns and self.assistant is None):
            raise AndromedaError(
                "fields: a record becomes a document by `text`, or by `assistant` (with `user`, `system`), or by "
                f"`messages`; got {', '.join(f.name for f in fields(self) if getattr(self, f.name)) or 'nothing'}"
            )
        if self.tools is not None and self.text is not None:
            raise AndromedaError("fields: `tools` belong to a conversation, not to a text")
        for name in self.needed():
            if not name.isidentifier():
                raise AndromedaError(f"fields: {name!r} is not the name of a field; write {{{{ for a brace")

    def needed(self) -> list[str]:
        """The names of the record's fields, in order and each once."""
        names = [name for f in fields(self) if (value := getattr(self, f.name)) is not None for name in _names(value)]
        return list(dict.fromkeys(names))

    def document(self, record: Record, where: str) -> Document:
        """
        Raises:
            AndromedaError: a field is missing or of the wrong kind.
        """
        if self.text is not None:
            return Document(where, text=_filled(self.text, record, where))
        if self.messages is not None:
            said = conversation(_value(record, self.messages, where), where)
        else:
            turns = [(role, getattr(self, role)) for role in ("system", "user", "assistant")]
            said = tuple({"role": role, "content": _turn(t, record, where)} for role, t in turns if t is not None)
        tools = None if self.tools is None else offered(_value(record, self.tools, where), where)
        return Document(where, messages=said, tools=tools or None)


# ---- templates -----------------------------------------------------------------------------------


def _names(template: str) -> list[str]:
    """The fields that a template or a lone name speaks of."""
    if "{" not in template and "}" not in template:
        return [template]
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise AndromedaError(f"fields: {template!r} is no template ({error}); write {{{{ for a brace") from error
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise AndromedaError(f"fields: {template!r} formats a field; only its name may stand in braces")
    return [name for _, name, _, _ in parts if name is not None]


def _filled(template: str, record: Record, where: str) -> str:
    names = _names(template)
    values = {name: _string(_value(record, name, where), name, where) for name in names}
    return values[template] if names == [template] else template.format_map(values)


def _turn(template: str, record: Record, where: str) -> str:
    """Without the blanks that a field leaves which is empty, as the input of many an instruction is."""
    text = _filled(template, record, where)
    return text if _names(template) == [template] else text.strip()


def _value(record: Record, name: str, where: str) -> Any:
    if record.get(name) is None:
        raise BadRecordError(f"no `{name}`", f"{where}: has no `{name}` (there are: {listed_names(record)})")
    return record[name]


def listed_names(names: Iterable[str]) -> str:
    """For a message: the first of them, none at length."""
    names = list(names)
    shown = ", ".join(name[:SHOWN] for name in names[:SHOWN]).encode(errors="backslashreplace").decode()
    return f"{shown}, and {len(names) - SHOWN:,} more" if len(names) > SHOWN else shown or "none"


def _string(value: Any, name: str, where: str) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRecordError(f"`{name}` is no text", f"{where}: `{name}` is {value}; it must be text or a number")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise BadRecordError(f"`{name}` is no text", f"{where}: `{name}` is a {kind}; it must be text or a number")
    return files.check_unicode(value, where, f"`{name}`")


# ---- conversations -------------------------------------------------------------------------------


def conversation(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Messages with text, and `tool_calls` for calls; a single `tool_call` is taken too, and a tool's result as JSON.

    Raises:
        AndromedaError: no list of messages, or something in one that would be lost.
    """
    said = tuple(_message(message, where) for message in _listed(value, f"{where}: the messages"))
    if not said:
        raise BadRecordError("no messages", f"{where}: a conversation without messages")
    return said


def offered(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Functions in the form of OpenAI's API; a bare function is wrapped.

    Raises:
        AndromedaError: no list of functions with names.
    """
    listed = _listed(value, f"{where}: the tools")
    tools = tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in listed)
    for function in (tool["function"] for tool in tools):
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecordError("bad tool", f"{where}: a tool must be an object with the `name` of a function")
    return tools


def _message(message: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(sorted(ROLES))
        raise BadRecordError("unknown role", f"{where}: a message's role is {reprlib.repr(role)}; use {known}")
    _check_keys(message, MESSAGE_KEYS, "message", where)
    calls = _calls(message, where)
    if calls and role != "assistant":
        raise BadRecordError("call by another", f"{where}: a message of role {role!r} calls a tool")
    if content is not None and not isinstance(content, str):
        if role != "tool":
            raise BadRecordError("content is no text", f"{where}: the content of a {role!r} message must be text")
        content = plain(content, f"{where}: what a tool gave")
    if content is None and not calls:
        raise BadRecordError("empty message", f"{where}: a message with neither content nor calls")
    done = {"role": role, "content": files.check_unicode(content or "", where, "a message")}
    return done | ({"tool_calls": [_call(call, where) for call in calls]} if calls else {})


def _calls(message: Mapping[str, Any], where: str) -> list[Any]:
    several, one = message.get("tool_calls") or [], message.get("tool_call")
    if not isinstance(several, list) or (several and one):
        raise BadRecordError("bad call", f"{where}: a message's calls must be a list, or a single `tool_call`")
    return several or ([one] if one else [])


def _call(call: Any, where: str) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecordError("bad call", f"{where}: a call must be an object with the `name` of a function")
    if function is call:
        _check_keys(call, CALL_KEYS | FUNCTION_KEYS, "call", where)
    else:
        _check_keys(call, CALL_KEYS, "call", where)
        _check_keys(function, FUNCTION_KEYS, "call", where)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        what = f"{where}: a call's `arguments`"
        plain(parsed(arguments, what), what)
    elif not isinstance(arguments, dict):
        raise BadRecordError("bad call", f"{where}: a call's `arguments` must be an object, or JSON of one")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _check_keys(value: Mapping[str, Any], known: frozenset[str], what: str, where: str) -> None:
    """Rows of a Parquet file have each key, those that are not there as None."""
    if unknown := [key for key in value if key not in known and value[key] is not None]:
        found = reprlib.repr(unknown[0])
        raise BadRecordError(f"unknown key of a {what}", f"{where}: a {what} has {found}, which would be lost")


def _listed(value: Any, what: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRecordError("no list of objects", f"{what} must be a list of objects")
    return tuple(value)
