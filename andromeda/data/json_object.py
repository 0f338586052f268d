"""JSON objects, read strictly: what a lenient reader would lose or guess makes them no record."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any

from andromeda.errors import AndromedaError

DEEPEST = 64  # lists and objects within each other

Record = Mapping[str, Any]


class BadRecordError(AndromedaError):
    """A record that becomes no document; `reason` in a few words, to be counted by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadRecordError], tuple[str, str]]:
        return BadRecordError, (self.reason, str(self))  # between processes


def parsed(text: str, where: str) -> Record:
    """
    Raises:
        BadRecordError: no JSON, no object, a key twice in one, or nested too deep; `where` says of what.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise BadRecordError("key twice", f"{where}: has {reprlib.repr(key)} twice; leave one")
            found[key] = value
        return found

    try:
        value = json.loads(text, object_pairs_hook=distinct)
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:
        raise BadRecordError("not JSON", f"{where}: not JSON ({error}); it must be an object") from error
    if not isinstance(value, dict):
        raise BadRecordError("not an object", f"{where}: is a {type(value).__name__}; it must be an object")
    return not_too_deep(value, where)


def not_too_deep(record: Record, where: str) -> Record:
    """The record itself. A limit of our own, as that of Python's stack depends on who calls.

    Raises:
        BadRecordError: lists and objects are more than DEEPEST within each other.
    """
    level: list[Any] = [record]
    for _ in range(DEEPEST):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return record
    raise _too_deep(where)


def plain(value: Any, where: str) -> str:
    """A value as JSON.

    Raises:
        BadRecordError: it holds what JSON has no value for: NaN and infinity, which Python's reader takes, or a date,
            as a row of a Parquet file can.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRecordError("no plain JSON", f"{where}: holds what is no plain JSON value ({error})") from error


def _too_deep(where: str) -> BadRecordError:
    return BadRecordError("nested too deep", f"{where}: nests lists and objects more than {DEEPEST} deep; flatten it")
