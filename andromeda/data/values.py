"""Values of a YAML file, checked one by one; errors name the key and what it may be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from andromeda.errors import AndromedaError

T = TypeVar("T")

NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}


def section(values: Any, where: str, known: Iterable[str], needed: Iterable[str] = ()) -> Mapping[str, Any]:
    """
    Raises:
        AndromedaError: no mapping, a key that is not known, or one that is needed is missing.
    """
    known = tuple(known)
    if not isinstance(values, dict):
        raise AndromedaError(f"{where}: must hold keys; there are {', '.join(known)}")
    for key in values:
        if key not in known:
            raise AndromedaError(f"{where}: no key {key!r};{hint(str(key), known)}")
    for key in needed:
        if key not in values:
            raise AndromedaError(f"{where}: has no `{key}`, which it needs")
    return values


def named(values: Any, where: str) -> list[tuple[str, Any]]:
    """
    Raises:
        AndromedaError: no mapping, or an empty one.
    """
    if not isinstance(values, dict) or not values:
        raise AndromedaError(f"{where}: must hold names and what they stand for")
    return [(str(name), value) for name, value in values.items()]


def of(kind: type[T], value: Any, where: str) -> T:
    """
    Raises:
        AndromedaError: a value of another kind.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise AndromedaError(f"{where}: must be {NAMES.get(kind, kind.__name__)}; got {value!r}")
    return value


def one_of(choices: Sequence[str], value: Any, where: str) -> Any:
    """
    Raises:
        AndromedaError: none of them.
    """
    if value not in choices:
        raise AndromedaError(f"{where}: must be {', '.join(choices[:-1])} or {choices[-1]}; got {value!r}")
    return value


def patterns(value: Any, where: str) -> tuple[str, ...]:
    """One pattern of files, or a list of them.

    Raises:
        AndromedaError: something else.
    """
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(pattern, str) for pattern in found):
        raise AndromedaError(f"{where}: must be a list of patterns, such as [poetry/*.jsonl.xz]")
    return tuple(found)


def filled(kind: type[T], values: Any, where: str) -> T:
    """A dataclass of what is given, {} or true for its defaults; so for fields that are dataclasses themselves.

    Raises:
        AndromedaError: a key or a value that it does not take.
    """
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # of a dataclass
    given = section({} if values is True else values, where, known)
    converted = {name: _converted(hints[name], value, f"{where}.{name}") for name, value in given.items()}
    try:
        return kind(**converted)
    except AndromedaError as error:
        raise AndromedaError(f"{where}: {str(error).removeprefix(where.rpartition('.')[2] + ': ')}") from error


def hint(name: str, known: Iterable[str]) -> str:
    """What may have been meant."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f" did you mean {close[0]!r}?" if close else f" there are {', '.join(known)}"


def _converted(kind: Any, value: Any, where: str) -> Any:
    if NoneType in get_args(kind):
        if value is None or value is False:
            return None
        (kind,) = [choice for choice in get_args(kind) if choice is not NoneType]
    if is_dataclass(kind):
        return filled(cast("type[Any]", kind), value, where)
    if get_origin(kind) is tuple:
        return tuple(_converted(get_args(kind)[0], item, where) for item in of(list, value, where))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return of(kind, value, where)
