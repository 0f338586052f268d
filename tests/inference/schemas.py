"""Random JSON schemas of what can be enforced."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

PIECES = ["[a-z]", "[A-Z0-9_]", "é|ß", "日本", "\\d", "-", "(ab|c)", "[^a-y]", "🙂", "\\.", "x"]
REPEATS = ["", "?", "*", "+", "{2}", "{1,3}"]
NAMES = [
    "a",
    "b",
    "name",
    "größe",
    'a "quoted" one',
    "日本",
    "x.y",
    "$",
    "back\\slash",
    "new\nline",
    "</tool_call>",
    "",
]
FORMATS = ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]

texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8) | st.sampled_from(NAMES)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3))
    | texts
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=5
)


@st.composite
def integers(draw: st.DrawFn) -> Schema:
    low, span = draw(st.integers(-(10**6), 10**6)), draw(st.integers(0, 10**4))
    schema: Schema = {"type": "integer"}
    if draw(st.booleans()):
        schema["minimum"] = low
    elif draw(st.booleans()):
        schema["exclusiveMinimum"] = low - 1
    if draw(st.booleans()):
        schema["maximum"] = low + span
    elif draw(st.booleans()):
        schema["exclusiveMaximum"] = low + span + 1
    if draw(st.integers(0, 3)) == 0:
        schema["multipleOf"] = draw(st.sampled_from([1, 2, 3, 5, 10]))
        if "maximum" in schema or "exclusiveMaximum" in schema:
            schema.pop("minimum", None)  # perhaps there is no multiple between
            schema.pop("exclusiveMinimum", None)
    return schema


@st.composite
def numbers(draw: st.DrawFn) -> Schema:
    low, span = draw(st.integers(-(10**6), 10**6)) / 1000, draw(st.integers(1, 10**6)) / 1000
    schema: Schema = {"type": "number"}
    if draw(st.booleans()):
        schema[draw(st.sampled_from(["minimum", "exclusiveMinimum"]))] = low
    if draw(st.booleans()):
        schema[draw(st.sampled_from(["maximum", "exclusiveMaximum"]))] = round(low + span, 3)
    if len(schema) < 3 and draw(st.integers(0, 3)) == 0:
        schema["multipleOf"] = draw(st.sampled_from([0.5, 0.25, 0.01, 2.5, 3]))
    return schema


@st.composite
def strings(draw: st.DrawFn) -> Schema:
    schema: Schema = {"type": "string"}
    kind = draw(st.sampled_from(["any", "length", "pattern", "found", "format"]))
    if kind == "length":
        least = draw(st.integers(0, 6))
        schema |= {"minLength": least} if draw(st.booleans()) else {}
        schema |= {"maxLength": least + draw(st.integers(0, 10))} if draw(st.booleans()) else {}
    elif kind in ("pattern", "found"):
        pieces = draw(st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(REPEATS)), min_size=1, max_size=4))
        pattern = "".join(f"({piece}){repeat}" for piece, repeat in pieces)
        schema["pattern"] = f"^{pattern}$" if kind == "pattern" else pattern
    elif kind == "format":
        schema["format"] = draw(st.sampled_from(FORMATS))
    return schema


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    schema: Schema = {"type": "array"}
    prefix = draw(st.lists(inner, max_size=2))
    schema |= {"prefixItems": prefix} if prefix else {}
    schema |= {"items": draw(inner)} if draw(st.integers(0, 3)) else {}
    least = draw(st.integers(0, 3))
    schema |= {"minItems": least} if draw(st.booleans()) else {}
    schema |= {"maxItems": least + draw(st.integers(0, 3))} if draw(st.booleans()) else {}
    return schema


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(st.sampled_from(NAMES), inner, max_size=4))
    schema: Schema = {"type": "object", "properties": properties}
    if required := [name for name in properties if draw(st.booleans())]:
        schema["required"] = required
    more = draw(st.sampled_from(["unsaid", "closed", "open", "schema", "pattern"]))
    if more in ("closed", "open"):
        schema["additionalProperties"] = more == "open"
    elif more == "schema":
        schema["additionalProperties"] = draw(inner)
    elif more == "pattern":
        schema |= {"patternProperties": {"^k[0-9]+$": draw(inner)}, "additionalProperties": False}
    if not properties and more in ("schema", "pattern"):
        schema |= draw(st.sampled_from([{}, {"minProperties": 1}, {"maxProperties": 2}]))
    return schema


@st.composite
def combined(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    kind = draw(st.sampled_from(["anyOf", "oneOf", "allOf", "types", "beside"]))
    if kind == "anyOf":
        return {"anyOf": draw(st.lists(inner, min_size=1, max_size=3))}
    if kind == "oneOf":
        return {"oneOf": [draw(integers()), draw(strings()), {"type": "null"}]}
    if kind == "types":
        return {
            "type": draw(st.lists(st.sampled_from(["null", "integer", "string", "boolean"]), min_size=1, unique=True))
        }
    names = draw(st.lists(st.sampled_from(NAMES), min_size=2, max_size=2, unique=True))
    halves = [{"type": "object", "properties": {name: draw(inner)}, "required": [name]} for name in names]
    if kind == "allOf":
        return {"allOf": halves}
    return {**halves[0], "anyOf": [halves[1], {"type": "object", "properties": {"kind": {"const": 1}}}]}


constants = st.builds(lambda value: {"const": value}, values) | st.builds(
    lambda listed: {"enum": listed}, st.lists(values, min_size=1, max_size=4)
)
leaves = st.sampled_from([{"type": "null"}, {"type": "boolean"}, {}]) | integers() | numbers() | strings() | constants
plain = st.recursive(leaves, lambda inner: arrays(inner) | objects(inner) | combined(inner), max_leaves=6)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """Now and then with definitions, of which one contains itself, and with words that only describe."""
    schema = draw(plain)
    if draw(st.integers(0, 3)) == 0:
        node = {
            "type": "object",
            "properties": {"value": draw(plain), "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["value"],
        }
        schema = {"$defs": {"node": node, "other": schema}, "type": "object", "properties": {}}
        schema["properties"] = {"tree": {"$ref": "#/$defs/node"}, "other": {"$ref": "#/$defs/other"}}
        schema["required"] = ["other"]
    if draw(st.booleans()):
        schema = {
            "title": "Some",
            "description": "thing",
            **schema,
            "$schema": "https://json-schema.org/draft/2020-12/schema",
        }
    return schema
