"""Which JSON schemas can be kept to: all that llguidance enforces, and nothing that it would pass over.

It ignores keywords that it does not know, and some that it does (`format` beside a number, `items` as a list). So what
it enforces is listed here, what only describes is dropped, and the rest is refused by name.
Source: llguidance, docs/json_schema.md; https://json-schema.org/draft/2020-12
"""

from __future__ import annotations

import json
import reprlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from math import inf, prod
from typing import Any

from andromeda.errors import AndromedaError
from andromeda.inference.grammar.endless import is_endless

Schema = Mapping[str, Any]

MAX_DEPTH = 32  # schemas, or arrays and objects of a constant, within each other
MAX_PROPERTIES = 1000  # of one object: optional ones cost compiling their square
MAX_COMBINED_PATTERNS = 8  # where schemas are combined, patterns are intersected, and 14 of them took 15 s
MAX_MULTIPLES = 10_000  # the sum of all multipleOf, or their product where schemas are combined: states of a recogniser
LARGEST = 2**53  # of a number's bounds; beyond, llguidance's are not exact

DESCRIPTIONS = frozenset({
    *("$schema", "$id", "id", "$comment", "title", "description", "default", "examples", "example", "deprecated"),
    *("readOnly", "writeOnly", "contentMediaType", "contentEncoding", "contentSchema", "discriminator"),
})  # fmt: skip
BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
LENGTHS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})  # schemas by name
LISTED = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
SINGLE = frozenset({"items", "additionalProperties"})
COMBINING = frozenset({"$ref", "anyOf", "oneOf"})
VALUES = frozenset({"type", "const", "enum", "required", "pattern", "format", "multipleOf", "$ref"})
ENFORCED = BOUNDS | LENGTHS | NAMED | LISTED | SINGLE | VALUES
FORMATS = (
    *("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
)  # fmt: skip
# llguidance has 29 days in every February, and a year 0, which few readers of dates do.
LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
YEAR = "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
DAY = f"^({LEAP_YEAR}-02-29|{YEAR}-(02-([01][0-9]|2[0-8])|(0[13-9]|1[0-2])-))"


def enforceable(schema: Schema, what: str = "json schema") -> dict[str, Any]:
    """The schema without what only describes, for llguidance.

    An object that lists its properties has no others, unless it says so with `additionalProperties` or schemas are
    combined (`allOf`, or keywords beside `$ref`, `anyOf` and `oneOf`), where one may list what another leaves out. What
    keeps to that keeps to the schema too.

    Args:
        what: what error messages call it.

    Raises:
        AndromedaError: it is not JSON, too deep, has no end, or says what cannot be enforced.
    """
    text = plain_json(schema, what)
    if not isinstance(schema, Mapping):
        raise AndromedaError(f"{what}: must be an object, not {type(schema).__name__}")
    checked: dict[str, Any] = _checked(json.loads(text), what, "", 0)
    nodes = list(_schemas(checked))
    combines = any(map(_combines, nodes))
    _check_size(nodes, combines, what)
    _check_bounds(nodes, combines, what)
    if is_endless(checked, nodes):
        raise AndromedaError(
            f"{what}: a value that must hold one of its own kind has no end; make it optional, or a choice"
        )
    for node in nodes:
        if not combines:
            _close(node)
        if node.get("format") in ("date", "date-time"):
            node["allOf"] = [*node.get("allOf", []), {"pattern": DAY}]
    return checked


def plain_json(value: Any, what: str) -> str:
    """
    Raises:
        AndromedaError: what JSON has no value for, or nested too deep.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise AndromedaError(f"{what}: cannot be read as JSON ({error})") from error


def _checked(schema: Any, what: str, path: str, depth: int) -> Any:
    where = f"{what}: {path or 'the top'}"
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise AndromedaError(f"{where} must be a schema (an object, true or false), not {type(schema).__name__}")
    if depth > MAX_DEPTH:
        raise AndromedaError(f"{where} is nested more than {MAX_DEPTH} deep; flatten it")
    checked: dict[str, Any] = {}
    for keyword, value in schema.items():
        inside = f"{path}/{_shown(keyword)}"
        if keyword in NAMED:
            schemas = _as(dict, value, what, inside)
            if len(schemas) > MAX_PROPERTIES:
                raise AndromedaError(f"{what}: {inside} has {len(schemas)} names, {MAX_PROPERTIES} at most")
            checked[keyword] = {
                name: _checked(one, what, f"{inside}/{_shown(name)}", depth + 1) for name, one in schemas.items()
            }
        elif keyword in LISTED:
            schemas = _as(list, value, what, inside)
            checked[keyword] = [_checked(one, what, f"{inside}/{i}", depth + 1) for i, one in enumerate(schemas)]
        elif keyword in SINGLE:
            checked[keyword] = _checked(value, what, inside, depth + 1)
        elif keyword in ENFORCED:
            _check_value(keyword, value, f"{what}: {inside}")
            checked[keyword] = value
        elif keyword not in DESCRIPTIONS and not keyword.startswith("x-"):
            raise AndromedaError(f"{what}: '{_shown(keyword)}' at {path or 'the top'} cannot be enforced; leave it out")
    _check_least_properties(checked, where)
    return checked


def _shown(name: str) -> str:
    """A name as an error of one line can hold it."""
    return reprlib.repr(name)[1:-1]


def _as(kind: type[dict[str, Any]] | type[list[Any]], value: Any, what: str, path: str) -> Any:
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise AndromedaError(f"{what}: {path} must be {wanted}, not {type(value).__name__}")
    return value


def _check_value(keyword: str, value: Any, where: str) -> None:
    """What llguidance would take, and not keep to; its own complaints about values are left to it."""
    number = _is_number(value)
    if keyword in BOUNDS and number and abs(value) > LARGEST:
        raise AndromedaError(f"{where}: {reprlib.repr(value)} cannot be enforced; bounds are at most 2**53 away from 0")
    if keyword == "multipleOf" and number and value <= 0:
        raise AndromedaError(f"{where}: {reprlib.repr(value)} must be more than 0")
    if keyword == "format" and value not in FORMATS:
        raise AndromedaError(f"{where}: {reprlib.repr(value)} cannot be enforced; formats are {', '.join(FORMATS)}")
    if keyword == "$ref" and not (isinstance(value, str) and (value == "#" or value.startswith("#/"))):
        raise AndromedaError(
            f"{where}: {reprlib.repr(value)} is not of this schema; refer to what is inside it, as '#/$defs/name'"
        )
    if keyword in ("const", "enum"):
        _check_constant(value, where, 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_constant(value: Any, where: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise AndromedaError(f"{where} is nested more than {MAX_DEPTH} deep; flatten it")
    if isinstance(value, str) and any((c < " " and c not in "\b\f\n\r\t") or c == "\x7f" for c in value):
        raise AndromedaError(f"{where} holds a control character, which no output can")
    if isinstance(value, dict):
        for name, one in value.items():
            _check_constant(name, where, depth + 1)
            _check_constant(one, where, depth + 1)
    elif isinstance(value, list):
        for one in value:
            _check_constant(one, where, depth + 1)


def _check_least_properties(schema: Mapping[str, Any], where: str) -> None:
    """Names outside `properties` may come twice, and count twice: more than one cannot be promised."""
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    known = isinstance(least, int) and isinstance(required, list)
    if known and least > max(1, len(set(map(str, required)))):
        raise AndromedaError(f"{where}: minProperties={reprlib.repr(least)} cannot be enforced; list names in required")


def _check_size(nodes: Sequence[dict[str, Any]], combines: bool, what: str) -> None:
    """What takes long to compile in spite of llguidance's own limits."""
    patterns = sum("pattern" in node or "format" in node for node in nodes)
    if combines and patterns > MAX_COMBINED_PATTERNS:
        raise AndromedaError(
            f"{what}: combines schemas (allOf, or keywords beside $ref, anyOf, oneOf) and has {patterns} patterns and "
            f"formats, {MAX_COMBINED_PATTERNS} at most; leave some out"
        )
    given = {node["multipleOf"] for node in nodes if _is_number(node.get("multipleOf"))}
    multiples = [Fraction(str(multiple)).numerator for multiple in given]
    if (prod(multiples) if combines else sum(multiples)) > MAX_MULTIPLES:
        raise AndromedaError(f"{what}: multipleOf is too large, or are together ({reprlib.repr(sorted(given))})")


def _check_bounds(nodes: Sequence[dict[str, Any]], combines: bool, what: str) -> None:
    """llguidance writes a whole number that is an exclusive bound where the other bound is less than 1 away."""
    for group in [nodes] if combines else [[node] for node in nodes]:
        lower, upper = _given(group, "minimum", "exclusiveMinimum"), _given(group, "maximum", "exclusiveMaximum")
        pairs = [
            *(("exclusiveMinimum", low, _next(upper, low)) for low in _given(group, "exclusiveMinimum")),
            *(("exclusiveMaximum", high, _last(lower, high)) for high in _given(group, "exclusiveMaximum")),
        ]
        for keyword, bound, other in pairs:
            if bound == int(bound) and abs(other - bound) < 1:
                raise AndromedaError(
                    f"{what}: {keyword}={bound} cannot be enforced: a whole number that is excluded must be 1 or more "
                    f"away from the other bound, not at {other}"
                )


def _given(nodes: Sequence[dict[str, Any]], *keywords: str) -> list[float]:
    return sorted(node[keyword] for node in nodes for keyword in keywords if _is_number(node.get(keyword)))


def _next(bounds: Sequence[float], bound: float) -> float:
    """The first above."""
    place = bisect_right(bounds, bound)
    return bounds[place] if place < len(bounds) else inf


def _last(bounds: Sequence[float], bound: float) -> float:
    """The last below."""
    place = bisect_left(bounds, bound)
    return bounds[place - 1] if place else -inf


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and those within it, each once."""
    if isinstance(schema, dict):
        yield schema
        for keyword in NAMED & schema.keys():
            for one in schema[keyword].values():
                yield from _schemas(one)
        for keyword in LISTED & schema.keys():
            for one in schema[keyword]:
                yield from _schemas(one)
        for keyword in SINGLE & schema.keys():
            yield from _schemas(schema[keyword])


def _combines(schema: dict[str, Any]) -> bool:
    beside = schema.keys() - {"$defs", "definitions"}
    return "allOf" in schema or bool(beside & COMBINING and len(beside) > 1)


def _close(schema: dict[str, Any]) -> None:
    listed = schema.get("properties", {}).keys()
    open_on_purpose = schema.keys() & {"additionalProperties", "patternProperties"}
    required = schema.get("required", [])
    if listed and not open_on_purpose and isinstance(required, list) and listed >= set(map(str, required)):
        schema["additionalProperties"] = False
