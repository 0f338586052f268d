"""Sources: which files make up one kind of text, and how their records become documents.

A record is a line of .jsonl, a row of .parquet, or any other file as a whole, with the fields `text` and `path`. Files
may be compressed (.gz, .xz, .zst). A field map says which of a record's fields make a document:

    text: text                                a field as it is
    text: "{title}\\n\\n{text}"                 fields within other words
    user: "{question}"                        a conversation of two or three turns
    assistant: "{answer}"
    messages: messages                        a whole conversation, in the form of OpenAI's API
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from andromeda.data import files
from andromeda.errors import AndromedaError

LONGEST = 1 << 28  # bytes of a record; a longer one is not read
ROWS = 1024  # of Parquet, at a time
ROLES = frozenset({"system", "user", "assistant", "tool"})

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """A text, or a conversation.

    Attributes:
        where: its file within the corpus folder, and line or row, as in poems.jsonl.xz:17.
        text: None: it is a conversation.
        messages, tools: as the chat template takes them.
    """

    where: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class Unread:
    """A record, or the rest of a file, that became no document."""

    where: str
    reason: str  # a few words, to be counted by
    message: str


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
            said = _conversation(_value(record, self.messages, where), where)
        else:
            turns = [(role, getattr(self, role)) for role in ("system", "user", "assistant")]
            said = tuple({"role": role, "content": _filled(t, record, where)} for role, t in turns if t is not None)
        tools = None if self.tools is None else _listed(_value(record, self.tools, where), f"{where}: `{self.tools}`")
        return Document(where, messages=said, tools=tools or None)


@dataclass(frozen=True)
class Source:
    """One kind of text.

    Attributes:
        name: in reports and manifests.
        files: paths or patterns (*, **) under the corpus folder.
        licence: of the text, as its owner names it.
        fields: how a record becomes a document.
        bad: what is done with a record that cannot be read: 'stop', or 'skip' and count it.

    Raises:
        AndromedaError: no files, or a path that leads out of the corpus folder.
    """

    name: str
    files: tuple[str, ...]
    licence: str
    fields: Fields = field(default_factory=lambda: Fields(text="text"))
    bad: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if not self.files:
            raise AndromedaError(f"source {self.name}: names no files")
        for pattern in self.files:
            if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
                raise AndromedaError(f"source {self.name}: {pattern} must lie in the corpus folder; name it from there")

    def paths(self, folder: Path) -> list[Path]:
        """Its files, each once, by their names within the folder.

        Raises:
            AndromedaError: a pattern that no file matches.
        """
        found: set[Path] = set()
        for pattern in self.files:
            matched = {path for path in folder.glob(pattern) if path.is_file()}
            if not matched:
                raise AndromedaError(f"source {self.name}: no file matches {pattern} in {folder}; is that the corpus?")
            found |= matched
        return sorted(found, key=lambda path: path.relative_to(folder).as_posix())

    def read(self, folder: Path, path: Path) -> Iterator[Document | Unread]:
        """One file's documents, in their order.

        Raises:
            AndromedaError: something cannot be read, and `bad` is 'stop'.
        """
        name = path.relative_to(folder).as_posix()
        records = _records(path, name, self.fields.needed())
        while True:
            try:
                where, read = next(records)
            except StopIteration:
                return
            except AndromedaError as error:  # of the file itself: what is left of it is lost
                yield self._unread(name, error, "file cannot be read")
                return
            try:
                document = self.fields.document(read(), where)
            except AndromedaError as error:
                yield self._unread(where, error, "bad fields")
            else:
                yield document

    def _unread(self, where: str, error: AndromedaError, reason: str) -> Unread:
        if self.bad == "stop":
            raise AndromedaError(f"source {self.name}: {error}; or let the spec say `bad: skip`") from error
        return Unread(where, error.reason if isinstance(error, _BadRecordError) else reason, str(error))


# ---- records -------------------------------------------------------------------------------------

Reader = Callable[[], Record]  # a record that is not yet decoded


class _BadRecordError(AndromedaError):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _records(path: Path, name: str, needed: Sequence[str]) -> Iterator[tuple[str, Reader]]:
    """Where each record is, and how to get it, which may fail for it alone."""
    kind = files.kind(path)
    if kind == ".parquet":
        yield from _rows(path, name, needed)
        return
    with files.opened(path) as file:
        if kind == ".jsonl":
            for number, line in enumerate(files.lines(file, LONGEST), start=1):
                if line is None or not line.isspace():
                    where = f"{name}:{number}"
                    yield where, partial(_parsed, line, where)
        else:
            yield name, partial(_whole, file.read(LONGEST + 1), name)


def _parsed(line: bytes | None, where: str) -> Record:
    if line is None:
        raise _BadRecordError("too long", f"{where}: the line is longer than {LONGEST:,} bytes; split the document")
    text = _text(line, where)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BadRecordError("not JSON", f"{where}: not JSON ({error}); each line must be an object") from error
    if not isinstance(value, dict):
        raise _BadRecordError("not an object", f"{where}: is a {type(value).__name__}; each line must be an object")
    return value


def _whole(data: bytes, where: str) -> Record:
    if len(data) > LONGEST:
        raise _BadRecordError("too long", f"{where}: the file is longer than {LONGEST:,} bytes; split it")
    return {"text": _text(data, where), "path": where}


def _text(data: bytes, where: str) -> str:
    try:
        return files.decode(data, where)
    except AndromedaError as error:
        raise _BadRecordError("not UTF-8", str(error)) from error


def _rows(path: Path, name: str, needed: Sequence[str]) -> Iterator[tuple[str, Reader]]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise AndromedaError(f"{name}: needs a package for .parquet; pip install 'andromeda-lm[data]'") from error
    number = 0
    try:
        with files.opened(path) as file, parquet.ParquetFile(file) as table:
            known = [name for name in needed if name in table.schema_arrow.names]
            for batch in table.iter_batches(ROWS, columns=known):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}:{number}", partial(_given, row)
    except ArrowException as error:
        problem = " ".join(str(error).split())
        raise AndromedaError(f"{name}, after row {number}: cannot be read as Parquet ({problem})") from error


def _given(row: Record) -> Record:
    return row


# ---- fields --------------------------------------------------------------------------------------


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


def _value(record: Record, name: str, where: str) -> Any:
    if record.get(name) is None:
        raise _BadRecordError(
            f"no `{name}`", f"{where}: has no `{name}` (there are: {', '.join(map(str, record)) or 'none'})"
        )
    return record[name]


def _string(value: Any, name: str, where: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise _BadRecordError(f"`{name}` is no text", f"{where}: `{name}` is a {kind}; it must be text or a number")
    return files.check_unicode(value, where, f"`{name}`")


def _listed(value: Any, what: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _BadRecordError("no list of objects", f"{what} must be a list of objects")
    return tuple(value)


def _conversation(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    said = _listed(value, f"{where}: the messages")
    for message in said:
        if message.get("role") not in ROLES:
            raise _BadRecordError(
                "unknown role", f"{where}: a message's role is {message.get('role')!r}; use {', '.join(sorted(ROLES))}"
            )
    if not said:
        raise _BadRecordError("no messages", f"{where}: a conversation without messages")
    return said
