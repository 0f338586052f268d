"""Schemas whose values would never end: a list that must hold such a list, a name that refers to itself alone.

llguidance finds them out only where they are written, which may be in the middle of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any
from urllib.parse import unquote


def is_endless(root: dict[str, Any], schemas: Sequence[dict[str, Any]]) -> bool:
    """Whether a value of one of the schemas must hold, or be, a value of the same one.

    Args:
        root: what `$ref` is resolved in.
        schemas: all of those in it.
    """
    needs = {id(schema): [id(needed) for needed in _needed(root, schema)] for schema in schemas}
    try:
        TopologicalSorter(needs).prepare()
    except CycleError:
        return True
    return False


def _needed(root: dict[str, Any], schema: dict[str, Any]) -> Iterator[Any]:
    """Schemas of which every value of this one is, or holds, a value. Of several choices none is needed."""
    if "$ref" in schema:
        yield _target(root, schema["$ref"])
    yield from schema.get("allOf", [])
    for choices in (schema.get("anyOf", []), schema.get("oneOf", [])):
        if len(choices) == 1:
            yield choices[0]
    if schema.get("type") == "object" and isinstance(schema.get("required"), list):
        properties = schema.get("properties", {})
        yield from (properties[name] for name in schema["required"] if isinstance(name, str) and name in properties)
    if schema.get("type") == "array" and isinstance(least := schema.get("minItems"), int):
        first = schema.get("prefixItems", [])
        yield from first[:least]
        if least > len(first) and "items" in schema:
            yield schema["items"]


def _target(root: dict[str, Any], reference: str) -> Any:
    """What a JSON pointer as `#/$defs/name` leads to; None for nothing, which llguidance complains of."""
    found: Any = root
    for part in reference.split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict):
            found = found.get(name)
        else:
            return None
    return found
