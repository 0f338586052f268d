"""From a document to a cleaned one, or to the reason why it is dropped; what was changed is counted by kind.

A source's spec chooses, under `clean`:

    clean:
      gopher: {min_words: 20}    # Gopher's rules; {} for the paper's limits
      repetition: {}
      min_english: 0.07
      redact: [keys, emails]

Of a conversation, the content of each message is cleaned, and one that fails drops the conversation; but English is
looked for in all messages together, and what a tool gave is no prose, and only repaired. Redaction goes through all
that is said, arguments of calls and tools included, so that they still agree with each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from andromeda.data import quality, repair
from andromeda.data.fields import Document
from andromeda.data.quality import C4, Failure, Gopher, Repetition
from andromeda.data.redact import KINDS, redact
from andromeda.errors import AndromedaError


@dataclass(frozen=True)
class Rules:
    """
    Attributes:
        unicode: undo wrong decoding, and NFC.
        newlines: other line ends become \\n.
        controls: take control characters out.
        trailing_spaces: take spaces out at the ends of lines. Neither indentation nor blank lines are ever touched.
        min_characters, max_characters: of a text, the spaces around it left out.
        gopher, repetition, c4: rules of the papers, where given.
        min_english: least share of words that are frequent in English alone; 0.07 keeps 999 of 1,000 English poems.
        redact: `keys`, `assignments`, `emails`, `addresses` (see redact.py).

    Raises:
        AndromedaError: lengths or shares out of range, an unknown kind.
    """

    unicode: bool = True
    newlines: bool = True
    controls: bool = True
    trailing_spaces: bool = True
    min_characters: int = 1
    max_characters: int | None = None
    gopher: Gopher | None = None
    repetition: Repetition | None = None
    c4: C4 | None = None
    min_english: float = 0.0
    redact: tuple[str, ...] = ("keys",)

    def __post_init__(self) -> None:
        quality.check_shares(self, "clean")
        if self.min_characters < 1:
            raise AndromedaError(f"clean: `min_characters` {self.min_characters} must be 1 or more")
        for kind in self.redact:
            if kind not in KINDS:
                raise AndromedaError(f"clean: `redact` knows no {kind!r}; use {', '.join(KINDS)}")


@dataclass(frozen=True)
class Cleaned:
    """What is kept, and how much was changed, by kind."""

    document: Document
    changes: Mapping[str, int]


@dataclass(frozen=True)
class Dropped:
    """What is not: `reason` is a few words to count by, `figures` what was measured (it may be empty)."""

    where: str
    reason: str
    figures: str


def clean(document: Document, rules: Rules) -> Cleaned | Dropped:
    """The document by the rules of its source."""
    changes: Counter[str] = Counter()
    cleaned: Document | Failure
    if document.text is not None:
        text = clean_text(document.text, rules, changes)
        cleaned = text if isinstance(text, Failure) else replace(document, text=text)
    else:
        cleaned = _conversation(document, rules, changes)
    if isinstance(cleaned, Failure):
        return Dropped(document.where, cleaned.reason, cleaned.figures)
    return Cleaned(cleaned, {kind: count for kind, count in changes.items() if count})


def clean_text(text: str, rules: Rules, changes: Counter[str]) -> str | Failure:
    """The text, with what was changed added to `changes`."""
    text = _repaired(text, rules, changes)
    if rules.c4:
        text = rules.c4.without_lines(text, changes)
    failure = _failure(text, rules)
    return failure or redact(text, rules.redact, changes)


def _repaired(text: str, rules: Rules, changes: Counter[str]) -> str:
    if rules.controls:
        text = repair.controls(text, changes)
    if rules.unicode:
        text = repair.unicode(text, changes)
    if rules.newlines:
        text = repair.newlines(text, changes)
    if rules.trailing_spaces:
        text = repair.trailing_spaces(text, changes)
    return text


def _failure(text: str, rules: Rules) -> Failure | None:
    characters = len(text.strip())
    if characters == 0:
        return Failure("empty", "")
    failure = quality.outside([("characters", characters, rules.min_characters, rules.max_characters)])
    for kind in (rules.c4, rules.gopher, rules.repetition):
        failure = failure or (kind and kind.failure(text)) or None
    return failure or _foreign(text, rules)


def _foreign(text: str, rules: Rules) -> Failure | None:
    if not rules.min_english:
        return None
    return quality.outside([("English", quality.english(text), rules.min_english, None)])


# ---- conversations -------------------------------------------------------------------------------


def _conversation(document: Document, rules: Rules, changes: Counter[str]) -> Document | Failure:
    messages: list[Mapping[str, Any]] = []
    alone = replace(rules, min_english=0.0)  # "OK" is no language
    for number, message in enumerate(document.messages or (), start=1):
        cleaned = _message(message, alone, changes)
        if isinstance(cleaned, Failure):
            where = f"message {number}" + (f": {cleaned.figures}" if cleaned.figures else "")
            return Failure(cleaned.reason, where)
        messages.append(cleaned)
    prose = "\n".join(message["content"] for message in messages if message["role"] != "tool")
    if prose.strip() and (failure := _foreign(prose, rules)):
        return failure
    tools = document.tools and tuple(_redacted(tool, rules, changes) for tool in document.tools)
    return replace(document, messages=tuple(messages), tools=tools)


def _message(message: Mapping[str, Any], rules: Rules, changes: Counter[str]) -> Mapping[str, Any] | Failure:
    """As `fields.conversation` makes them: role, content, and perhaps tool_calls."""
    cleaned, content = dict(message), message["content"]
    if message["role"] == "tool":
        cleaned["content"] = redact(_repaired(content, rules, changes), rules.redact, changes)
    else:
        text = clean_text(content, rules, changes)
        if isinstance(text, Failure) and not (text.reason == "empty" and "tool_calls" in message):
            return text
        cleaned["content"] = "" if isinstance(text, Failure) else text
    if "tool_calls" in message:
        cleaned["tool_calls"] = _redacted(message["tool_calls"], rules, changes)
    return cleaned


def _redacted(value: Any, rules: Rules, changes: Counter[str]) -> Any:
    """The strings within JSON, names of fields left out."""
    if isinstance(value, str):
        return redact(value, rules.redact, changes)
    if isinstance(value, Mapping):
        return {name: _redacted(item, rules, changes) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item, rules, changes) for item in value]
    return value
