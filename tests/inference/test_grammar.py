"""Constraints against lists of all texts of a language, against fresh ones, and against what cannot be kept to."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.errors import AndromedaError
from andromeda.inference.engine.request import Constraint
from andromeda.inference.grammar import Grammar, Grammars
from andromeda.inference.grammar.schema import enforceable
from andromeda.inference.tool_calls import CLOSE, OPEN
from andromeda.tokenizer import SPECIAL_TOKENS, TOOL_TOKENS, Tokenizer
from andromeda.tokenizer.streaming import BYTE_OF_CHARACTER

CALL = '{"name": "get_weather", "arguments": {"city": "Zoë", "days": [1, 2, 3]}}\n日本語 and 日曜 🙂 <|im_end|>\n'
TOKENIZER = Tokenizer.train([CALL * 3, 'The sea: "naïve", [null, true], {"a": -1.5}\n' * 3], 380)
GRAMMARS = Grammars(TOKENIZER)
WORDS = -(-TOKENIZER.vocab_size // 32)
END = TOKENIZER.stop_ids[-1]
OPEN_ID, CLOSE_ID = (TOKENIZER.encode(name, allow_special=True)[0] for name in (OPEN, CLOSE))


def spelt(token: int) -> str:
    """What a token adds to a text: for each byte the character of its number, a control token one of its own."""
    if token in TOKENIZER.control_ids:
        return chr(1000 + token)
    return "".join(chr(BYTE_OF_CHARACTER[character]) for character in TOKENIZER.id_to_token(token))


def as_bytes(text: str) -> str:
    return text.encode().decode("latin-1")


SPELT = [spelt(token) for token in range(TOKENIZER.vocab_size)]


def allowed(constraint: Constraint, words: int = WORDS) -> set[int]:
    row = np.full(words, -1, dtype=np.int32)
    constraint.fill_mask(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def walk(grammar: Grammar, seed: int, steps: int = 40) -> Iterator[tuple[Constraint, list[int]]]:
    """States of a text on its way, with its tokens."""
    draws, constraint, ids = random.Random(seed), grammar.constraint(), list[int]()
    yield constraint, ids
    while len(ids) < steps and not (ids and ids[-1] in TOKENIZER.stop_ids):
        ids.append(draws.choice(sorted(allowed(constraint))))
        assert constraint.advance(ids[-1:]) == 1
        yield constraint, ids


def accepts(grammar: Grammar, text: str | Sequence[int]) -> bool:
    ids = TOKENIZER.encode(text) if isinstance(text, str) else list(text)
    return grammar.constraint().advance([*ids, END]) == len(ids) + 1


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


# ---- masks -----------------------------------------------------------------------------------------------


def as_json(values: Iterable[Any]) -> list[str]:
    """0 may be written -0, too."""
    texts = [as_bytes(json.dumps(value, ensure_ascii=False)) for value in values]
    return [*texts, *(re.sub(r"\b0\b", "-0", text) for text in texts if re.search(r"\b0\b", text))]


def as_calls(calls: Iterable[tuple[str, Any]]) -> list[str]:
    bodies = as_json({"name": name, "arguments": arguments} for name, arguments in calls)
    return [SPELT[OPEN_ID] + body + SPELT[CLOSE_ID] for body in bodies]


def finite_languages() -> dict[str, tuple[Grammar, list[str]]]:
    """Grammars, each with all of its texts."""
    small = {"type": "integer", "minimum": -2, "maximum": 12}
    choice = {"enum": ["a", "日本", "日曜", 'x"y', "🙂", "🙃", "<|im_end|>", OPEN, None, True, -1.5]}
    pair = {"type": "object", "properties": {"n": small, "ok": {"type": "boolean"}}, "required": ["n"]}
    pairs = [{"n": n} | more for n in range(-2, 13) for more in ({}, {"ok": True}, {"ok": False})]
    tools = [tool("get", pair), tool("get_all"), tool("s", {"properties": {"é": {"const": 1}}, "required": ["é"]})]
    calls = as_calls([*(("get", one) for one in pairs), ("get_all", {}), ("s", {"é": 1})])
    return {
        "integers": (GRAMMARS.json_schema(small), as_json(range(-2, 13))),
        "choice": (GRAMMARS.json_schema(choice), as_json(choice["enum"])),
        "objects": (GRAMMARS.json_schema(pair), as_json(pairs)),
        "lists": (
            GRAMMARS.json_schema(
                {"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 1, "maxItems": 3}
            ),
            as_json(list(one) for size in (1, 2, 3) for one in itertools.product([True, False, None], repeat=size)),
        ),
        "regex": (
            GRAMMARS.regex("(é|日本?|[🙂-🙄]){1,2}x?"),
            [
                as_bytes("".join([*one, x]))
                for size in (1, 2)
                for one in itertools.product(["é", "日", "日本", *"🙂🙃🙄"], repeat=size)
                for x in ("", "x")
            ],
        ),
        "calls": (GRAMMARS.tool_calls(tools, "required", parallel=False), calls),
        "one function": (
            GRAMMARS.tool_calls(tools, {"type": "function", "function": {"name": "get_all"}}, parallel=False),
            as_calls([("get_all", {})]),
        ),
        "calls or an answer": (
            GRAMMARS.tool_calls(tools, "auto", parallel=False, answer=pair),
            [*calls, *as_json(pairs)],
        ),
    }


LANGUAGES = finite_languages()


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_mask_is_what_some_text_of_the_language_goes_on_with(name):
    """Where the text is forced, it is the tokenizer's own spelling of it."""
    grammar, texts = LANGUAGES[name]
    states = 0
    for seed in range(12):
        for constraint, ids in walk(grammar, seed):
            text = "".join(SPELT[token] for token in ids if token not in TOKENIZER.stop_ids)
            rest = {one[len(text) :] for one in texts if one.startswith(text)}
            right = {token for token, added in enumerate(SPELT) if any(one.startswith(added) for one in rest)}
            right = set() if ids and ids[-1] in TOKENIZER.stop_ids else right - set(TOKENIZER.stop_ids)
            if "" in rest:
                right |= set(TOKENIZER.stop_ids)
            if forced := constraint.forced():
                assert all(one.startswith("".join(SPELT[token] for token in forced)) for one in rest)
                assert allowed(constraint) == {forced[0]} <= right
            else:
                assert allowed(constraint) == right, (name, text)
                states += 1
        assert ids[-1] in TOKENIZER.stop_ids
        assert text in texts
    assert states > 10


OPEN_LANGUAGES = {
    "any object": GRAMMARS.json_object(),
    "strings": GRAMMARS.json_schema({"type": "array", "items": {"type": "string"}}),
    "mail": GRAMMARS.json_schema({"type": "string", "format": "email"}),
    "pattern": GRAMMARS.regex("(日|[a-e🙂]){2,}(ab)*"),
    "auto": GRAMMARS.tool_calls([tool("get", {"type": "object"}), tool("get_all")]),
    "required": GRAMMARS.tool_calls([tool("get", {"properties": {"a": {"type": "string"}}})], "required"),
}
any_language = st.sampled_from(sorted(OPEN_LANGUAGES))


@given(any_language, st.integers(0, 2**32))
def test_a_token_is_taken_if_and_only_if_the_mask_has_it(name, seed):
    """Where the text is forced, other spellings of it are taken too."""
    for constraint, ids in walk(OPEN_LANGUAGES[name], seed, 12):
        if ids and ids[-1] in TOKENIZER.stop_ids:
            return
        here, forced = allowed(constraint), constraint.forced()
        assert here
        for token in range(-1, TOKENIZER.vocab_size + 2):
            taken = constraint.advance([token])
            assert taken == (token in here) or (forced and here == {forced[0]}), token
            constraint.rollback(taken)


@given(any_language, st.integers(0, 2**32), st.data())
def test_a_rollback_leaves_no_trace(name, seed, data):
    """A state that went back and forth is that of a new one, moved on at once."""
    grammar = OPEN_LANGUAGES[name]
    constraint, ids = list(walk(grammar, seed))[-1]
    for _ in range(4):
        back = data.draw(st.integers(0, len(ids)))
        constraint.rollback(back)
        del ids[len(ids) - back :]
        fresh = grammar.constraint()
        assert fresh.advance(ids) == len(ids)
        assert allowed(constraint) == allowed(fresh)
        assert constraint.forced() == fresh.forced()
        for _ in range(data.draw(st.integers(0, 6))):
            if ids and ids[-1] in TOKENIZER.stop_ids:
                break
            ids.append(data.draw(st.sampled_from(sorted(allowed(constraint)))))
            assert constraint.advance(ids[-1:]) == 1
    with pytest.raises(ValueError, match="take back"):
        constraint.rollback(len(ids) + 1)


@given(any_language, st.integers(0, 2**32), st.integers(0, 40), st.integers(0, TOKENIZER.vocab_size - 1))
def test_it_moves_on_up_to_the_first_token_that_may_not_come(name, seed, place, wrong):
    *_, (_, ids) = walk(OPEN_LANGUAGES[name], seed)
    tokens = [*ids[:place], wrong, *ids[place:]]
    one_by_one = OPEN_LANGUAGES[name].constraint()
    right = sum(1 for _ in itertools.takewhile(lambda token: one_by_one.advance([token]), tokens))
    at_once = OPEN_LANGUAGES[name].constraint()
    assert at_once.advance(tokens) == right
    assert allowed(at_once) == allowed(one_by_one)


@given(st.sampled_from([*LANGUAGES, *OPEN_LANGUAGES]), st.integers(0, 2**32))
def test_forced_tokens_are_the_only_text_that_can_come(name, seed):
    grammar = LANGUAGES[name][0] if name in LANGUAGES else OPEN_LANGUAGES[name]
    *_, (constraint, ids) = walk(grammar, seed, random.Random(seed).randrange(20))
    forced = constraint.forced()
    text = "".join(SPELT[token] for token in forced)
    other, drawn = grammar.constraint(), ""
    other.advance(ids)
    while len(drawn) < len(text):  # any tokens that are taken, though the mask has one alone
        draws = random.sample(range(len(SPELT)), len(SPELT))
        drawn += SPELT[next(token for token in draws if other.advance([token]))]
    assert drawn.startswith(text)
    assert constraint.advance(forced) == len(forced)


def test_what_is_forced_is_spelt_as_the_tokenizer_does_without_control_tokens():
    grammar = GRAMMARS.json_schema({"const": {"said": f"{OPEN}<|im_end|> 日本"}})
    forced = grammar.constraint().forced()
    text = json.dumps({"said": f"{OPEN}<|im_end|> 日本"}, ensure_ascii=False)
    assert forced == TOKENIZER.encode(text)[: len(forced)]
    assert len(forced) > 10
    assert accepts(grammar, text)


# ---- the end, and ids that never come -------------------------------------------------------------------


def test_any_end_token_may_come_where_the_text_may_end_and_nothing_behind_it():
    assert len(TOKENIZER.stop_ids) == 2
    constraint = GRAMMARS.json_schema({"type": "integer"}).constraint()
    assert not allowed(constraint) & set(TOKENIZER.stop_ids)
    assert constraint.advance(TOKENIZER.encode("12")) == 2
    assert allowed(constraint) > set(TOKENIZER.stop_ids)  # a digit may come too
    for end in TOKENIZER.stop_ids:
        assert constraint.advance([end, end, *TOKENIZER.encode("3")]) == 1
        assert allowed(constraint) == set(TOKENIZER.stop_ids)
        assert constraint.forced() == []
        assert constraint.advance([end]) == 0
        constraint.rollback(1)
    assert constraint.advance(TOKENIZER.encode("3")) == 1
    assert constraint.advance([END]) == 1
    constraint.rollback(3)
    assert constraint.advance(TOKENIZER.encode("99")) == 2


def test_where_nothing_else_can_come_the_end_must():
    constraint = GRAMMARS.json_schema({"const": "a"}).constraint()
    assert constraint.advance(TOKENIZER.encode('"a"'))
    assert allowed(constraint) == set(TOKENIZER.stop_ids)


def test_no_control_token_comes_inside_json_though_its_text_may():
    constraint = OPEN_LANGUAGES["strings"].constraint()
    assert constraint.advance(TOKENIZER.encode('["'))
    for name in (*SPECIAL_TOKENS, *TOOL_TOKENS):
        assert constraint.advance(TOKENIZER.encode(name, allow_special=True)) == 0
        ids = TOKENIZER.encode(name)
        assert constraint.advance(ids) == len(ids)
    assert not allowed(constraint) & TOKENIZER.control_ids


def test_ids_beyond_the_vocabulary_are_never_allowed():
    assert max(allowed(OPEN_LANGUAGES["auto"].constraint(), WORDS + 3)) < TOKENIZER.vocab_size
    ended = OPEN_LANGUAGES["any object"].constraint()
    assert ended.advance([*TOKENIZER.encode("{}"), END])
    assert allowed(ended, WORDS + 3) == set(TOKENIZER.stop_ids)


@pytest.mark.parametrize(
    "row", [np.zeros(WORDS - 1, np.int32), np.zeros(WORDS, np.int64), np.zeros(2 * WORDS, np.int32)[::2]]
)
def test_a_row_that_is_no_mask_is_not_written_to(row):
    with pytest.raises(ValueError, match="contiguous int32"):
        OPEN_LANGUAGES["auto"].constraint().fill_mask(row)


# ---- schemas ---------------------------------------------------------------------------------------------


ONE = {"type": "object", "properties": {"a": {"type": "integer"}}}
TWO = {"type": "object", "properties": {"a": {}, "b": {}}}


@pytest.mark.parametrize(
    ("schema", "text", "right"),
    [
        (ONE, '{"a": 1}', True),
        (ONE, '{"a":1}', False),  # one layout
        (ONE, '{"a": 1, "b": 2}', False),  # what lists its properties has no others,
        ({**ONE, "additionalProperties": True}, '{"a": 1, "b": 2}', True),  # unless it says so
        ({**ONE, "additionalProperties": True}, '{"\\u0061": "x"}', False),  # a name in disguise
        ({"allOf": [ONE, {"properties": {"b": {}}, "required": ["b"]}]}, '{"a": 1, "b": 2}', True),
        (TWO, '{"a": 1, "b": 2}', True),
        (TWO, '{"b": 1, "a": 2}', False),  # their order is the schema's
        ({"type": "object"}, "{}", True),
        ({"title": "T", "x-guidance": {"lenient": True}, **ONE}, '{"a": "b"}', False),
        ({"type": "number"}, "1.5e3", True),
        ({"type": "string"}, '"\\n\\""', True),
        ({"type": "string"}, '"a\nb"', False),
        ({"type": "string", "maxLength": 2}, '"🙂日"', True),
        ({"enum": [1.5, "x"], "type": "string"}, "1.5", False),
        ({"oneOf": [{"type": "null"}, {"type": "integer"}]}, "null", True),
        ({**ONE, "minProperties": 1}, "{}", False),
        ({**TWO, "minProperties": 1, "required": ["a"]}, '{"a": 1}', True),
        (
            {"properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 2, "required": ["b", "c"]},
            '{"b": 1, "c": 2}',
            True,
        ),
        ({"type": "array", "prefixItems": [{"const": 1}], "items": False}, "[1]", True),
        ({"type": "array", "prefixItems": [{"const": 1}], "items": False}, "[1, 1]", False),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 0}, "[[], []]", True),
        ({"type": "array", "prefixItems": [{}, {"$ref": "#"}], "minItems": 1}, "[1]", True),
        ({"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]}, "[[null]]", True),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, '{"a": {"a": {}}}', True),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, '{"a": 1}', True),  # a value may be no object
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}, "[[], [[]]]", True),
    ],
)
def test_texts_of_schemas(schema, text, right):
    assert accepts(GRAMMARS.json_schema(schema), text) == right


@pytest.mark.parametrize("tail", ["", "T23:59:60Z"])
def test_dates_are_those_of_the_calendar(tail):
    grammar = GRAMMARS.json_schema({"type": "string", "format": "date-time" if tail else "date"})
    for year in (0, 1, 4, 100, 400, 1900, 2000, 2023, 2024, 2100):
        for month, day in itertools.product(range(14), (0, 1, 15, 28, 29, 30, 31, 32)):
            text = f"{year:04}-{month:02}-{day:02}"
            try:
                right = bool(date.fromisoformat(text))
            except ValueError:
                right = False
            assert accepts(grammar, f'"{text}{tail}"') == right, text


def refs(levels: int, more: dict[str, Any]) -> dict[str, Any]:
    """Every level refers twice to the one below: 2**levels in all."""
    defs: dict[str, Any] = {"d0": {"type": "integer"}}
    for level in range(levels):
        below = {"$ref": f"#/$defs/d{level}"}
        defs[f"d{level + 1}"] = {"properties": {"x": below, "y": below}, "required": ["x", "y"], **more}
    return {"$defs": defs, "$ref": f"#/$defs/d{levels}"}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def patterns(count: int) -> list[dict[str, str]]:
    return [{"pattern": f"(a|b)*a(a|b){{{number}}}c"} for number in range(count)]


MANY: dict[str, dict[str, Any]] = {
    "values": {"enum": [f"value {number}" for number in range(3000)]},
    "properties": {"type": "object", "properties": {f"p{number}": {} for number in range(1000)}},
    "items": {"type": "array", "minItems": 10**9},
    "characters": {"type": "string", "minLength": 10**9},
    "references": refs(60, {"type": "object"}),
    "states": {"type": "string", "pattern": "^(a|b)*a(a|b){500}$"},
    "repeats": {"type": "string", "pattern": "^((((a{1,100}){1,100}){1,100}){1,100}){1,100}$"},
}


@pytest.mark.parametrize("name", MANY)
def test_what_is_large_but_can_be_kept_to_is_compiled_and_masked_at_once(name):
    started = perf_counter()
    grammar = GRAMMARS.json_schema(MANY[name])
    *_, (_, ids) = walk(grammar, 1)
    assert ids
    assert perf_counter() - started < 10  # a second at most on a machine at rest


LOOP: dict[str, Any] = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
REFUSED = [
    ({"type": "array", "uniqueItems": True}, "'uniqueItems' at the top cannot be enforced"),
    ({"properties": {"a": {"not": {}}}}, "'not' at /properties/a cannot be enforced"),
    ({"if": {}, "then": {}}, "'if' at the top"),
    ({"type": "object", "propertyNames": {}}, "'propertyNames'"),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "dependentRequired": {}}, "'dependentRequired'"),
    ({"type": "string", "nullable": True}, "'nullable'"),
    ({"type": "integer", "format": "int32"}, "'int32' cannot be enforced; formats are date-time"),
    ({"type": "array", "items": [{}]}, "/items must be a schema"),
    ({"properties": []}, "/properties must be an object"),
    ({"properties": {"two\nlines" * 99: {"not": {}}}}, "'not' at /properties/two\\nlinestw..."),
    ({"x" * 999: 1}, "'xxxxxxxxxxxx...xxxxxxxxxxxxx' at the top"),
    ({"format": "x\n" * 999}, "cannot be enforced; formats are"),
    ({"multipleOf": 10**300}, "multipleOf is too large"),
    ({"minimum": -(10**3000)}, "cannot be enforced; bounds"),
    ({"anyOf": {}}, "/anyOf must be a list"),
    ({"additionalProperties": 5}, "/additionalProperties must be a schema"),
    ({"type": "object", "minProperties": 2, "required": ["a"]}, "minProperties=2 cannot be enforced"),
    ({"minimum": 2**60}, "bounds are at most 2**53 away from 0"),
    ({"exclusiveMinimum": 0.0, "maximum": 0.001}, "exclusiveMinimum=0.0 cannot be enforced"),
    ({"minimum": -1.5, "exclusiveMaximum": -1}, "exclusiveMaximum=-1 cannot be enforced"),
    ({"allOf": [{"exclusiveMinimum": 10}, {"maximum": 20}, {"maximum": 10.5}]}, "other bound, not at 10.5"),
    ({"multipleOf": 0}, "must be more than 0"),
    ({"multipleOf": True}, "cannot be kept to"),
    ({"enum": ["a\u0001"]}, "holds a control character"),
    ({"$ref": "https://example.com/a.json"}, "is not of this schema"),
    ({"$ref": "#name"}, "is not of this schema"),
    ({"$ref": "#/$defs/none"}, "cannot be kept to"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"type": "strin"}, "Invalid type: strin"),
    ({"type": "string", "pattern": "(?=a)"}, "look-around"),
    ({"type": "string", "pattern": "(a)\\1"}, "backreferences"),
    ({"enum": []}, "Unsatisfiable"),
    ({"type": "string", "minLength": 5, "maxLength": 3}, "Unsatisfiable"),
    ({"required": ["a"], "type": "object", "additionalProperties": False}, "'a' is unsatisfiable"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "has no end"),
    ({"type": "array", "prefixItems": [{}, {"$ref": "#"}], "minItems": 2}, "has no end"),
    (
        {"type": "object", "properties": {"a": {"type": "string"}, "b/~": {"$ref": "#"}}, "required": ["b/~"]},
        "has no end",
    ),
    ({"type": "object", "properties": {"a": LOOP["$defs"]["a"]}, **LOOP}, "has no end"),
    ({"properties": {"a/~": {"$ref": "#/properties/a~1~0"}}}, "has no end"),
    ({"prefixItems": [{"$ref": "#/prefixItems/0"}]}, "has no end"),
    ({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, "no text does"),
    ({"$ref": "#"}, "has no end"),
    ({"allOf": [{"$ref": "#"}]}, "has no end"),
    ({"anyOf": [{"$ref": "#"}]}, "has no end"),
    # Found by what it forces, which has no end either.
    ({"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}] * 2}}, "required": ["a"]}, "Too many items"),
    (nested(40), "nested more than 32 deep"),
    (nested(100_000), "cannot be read as JSON"),
    ({"properties": {f"p{number}": {} for number in range(1001)}}, "has 1001 names, 1000 at most"),
    ({"enum": ["x" * 100_000]}, "characters without descriptions, 100000 at most"),
    ({"allOf": patterns(9)}, "has 9 patterns and formats, 8 at most"),
    ({"type": "integer", "multipleOf": 999983}, "multipleOf is too large"),
    ({"allOf": [{"multipleOf": 9973}, {"multipleOf": 7}]}, "multipleOf is too large, or are together"),
    ({"const": float("nan")}, "cannot be read as JSON"),
    ({"const": {1, 2}}, "cannot be read as JSON"),
    ({"const": "\ud800"}, "cannot be kept to"),
    ({"allOf": [{"anyOf": [{"type": "string", "minLength": n}, {"minimum": n}]} for n in range(40)]}, "too large"),
    ([], "must be an object, not list"),
]


@pytest.mark.parametrize(("schema", "words"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_cannot_be_kept_to_is_refused_in_one_line_at_once(schema, words):
    started = perf_counter()
    with pytest.raises(AndromedaError) as error:
        GRAMMARS.json_schema(schema)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert perf_counter() - started < 10  # milliseconds on a machine at rest


@pytest.mark.parametrize("pattern", ["(", "[^\\s\\S]", "\\bword", "(?=a)", "a" * 20_000, None])
def test_no_regular_expression_or_one_that_nothing_matches_is_refused(pattern):
    with pytest.raises(AndromedaError, match="regex: "):
        GRAMMARS.regex(pattern)


def test_a_text_that_grows_too_complex_ends_in_an_error():
    """Its states are found while it is written; llguidance counts them, and so no mask takes long."""
    pieces = "|".join(f"(\\w{{{number},50}}{chr(97 + number)}\\W*)+" for number in range(26))
    grammar = GRAMMARS.json_schema({"type": "string", "pattern": f"({pieces})*"})
    with pytest.raises(AndromedaError, match="grammar: too complex to go on"):
        for seed in range(20):
            for _ in walk(grammar, seed, 100):
                pass


def test_a_schema_is_not_changed():
    schema = {"type": "object", "title": "T", "properties": {"a": {"type": "string", "format": "date"}}}
    before = json.dumps(schema)
    assert enforceable(schema)["additionalProperties"] is False
    assert json.dumps(schema) == before


# ---- tools -----------------------------------------------------------------------------------------------

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
TOOLS = [tool("get_weather", CITY), tool("get"), tool("größe", {}), tool("anything", None, strict=False)]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
WEATHER = ("get_weather", {"city": "Zoë <tool_call>", "days": 3})


def said(content: str | None, *calls: tuple[str, Any]) -> list[int]:
    """What our template has the assistant say, up to the end token, which is `END`."""
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": content, "tool_calls": made},
    ]
    ids, mask = TOKENIZER.encode_chat_with_mask(messages)
    *reply, end = [token for token, ours in zip(ids, mask, strict=True) if ours]
    assert end == END
    return reply


@pytest.mark.parametrize(
    ("choice", "parallel", "reply", "right"),
    [
        ("auto", True, said("The sea"), True),
        ("auto", True, said(None, WEATHER), True),
        ("auto", True, said("I look:\n", WEATHER, ("get", {})), True),
        ("auto", True, said(None, ("get_weather", {"days": 3})), False),
        ("auto", True, said(None, ("other", {})), False),
        ("auto", True, [*said(None, ("get", {})), *said("and text")], False),  # calls come last
        ("auto", False, said("Well", WEATHER), True),
        ("auto", False, said(None, ("get", {}), ("get", {})), False),
        ("required", True, said(None, ("größe", {}), WEATHER), True),
        ("required", True, said("The sea"), False),
        ("required", True, said("Well", WEATHER), False),
        ("required", True, said(None, ("anything", {"a": [1, None]})), True),
        ("required", True, said(None, ("get", {"a": 1})), False),
        ("required", False, said(None, WEATHER, WEATHER), False),
        (NAMED, True, said(None, WEATHER, WEATHER), True),
        (NAMED, True, said(None, ("get", {})), False),
        ("none", True, said("The sea"), True),
        ("none", True, said(None, WEATHER), False),
        ("auto", True, TOKENIZER.encode("<tool_call>{"), True),  # spelt out, it is text
    ],
)
def test_calls_have_the_form_that_the_chat_template_writes(choice, parallel, reply, right):
    assert accepts(GRAMMARS.tool_calls(TOOLS, choice, parallel), reply) == right


@pytest.mark.parametrize(("choice", "right"), [("auto", [True, True, False]), ("none", [True, False, False])])
def test_an_answer_keeps_to_its_schema_beside_tools(choice, right):
    grammar = GRAMMARS.tool_calls(TOOLS, choice, answer=ONE)
    assert [accepts(grammar, reply) for reply in (said('{"a": 1}'), said(None, WEATHER), said("text"))] == right


@pytest.mark.parametrize(
    ("tools", "choice", "words"),
    [
        ([], "auto", "tools: 0 are given"),
        ([tool("a")] * 129, "auto", "1 to 128 can be"),
        ([tool("a"), tool("a")], "auto", "two functions are named 'a'"),
        ([{"type": "function"}], "auto", "number 1 must be an object with a function and its name"),
        (["a"], "auto", "number 1 must be an object"),
        ([tool("")], "auto", "number 1 must be an object"),
        ([tool("a", ["x"])], "auto", "parameters of 'a': must be an object"),  # type: ignore[arg-type]
        ([tool("a", {"type": "string"})], "auto", "parameters of 'a': type='string' must be 'object'"),
        ([tool("a", {"properties": {"b": {"not": {}}}})], "auto", "parameters of 'a': 'not' at /properties/b"),
        (TOOLS, "get", "tool_choice: 'get' must be auto, required, none"),
        (TOOLS, {"type": "function", "function": {"name": "b"}}, "tool_choice: 'b' is none of the tools"),
        (TOOLS, {"type": "function"}, "tool_choice: None is none of the tools"),
        ([tool(f"a{n}", {"properties": {"b": {"enum": ["x" * 2000]}}}) for n in range(60)], "auto", "100000 at most"),
    ],
)
def test_tools_that_are_none_are_refused(tools, choice, words):
    with pytest.raises(AndromedaError) as error:
        GRAMMARS.tool_calls(tools, choice)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_without_the_tokens_of_calls_there_are_schemas_but_no_calls():
    grammars = Grammars(Tokenizer.train([CALL], 300, tool_tokens=()))
    assert grammars.json_object().constraint().forced() == []
    with pytest.raises(AndromedaError, match="no token <tool_call>; give it our chat template's"):
        grammars.tool_calls(TOOLS)


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(AndromedaError, match="no token that ends a text"):
        Grammars(Tokenizer.train([CALL], 300, special_tokens=(), tool_tokens=()))


# ---- many at once ----------------------------------------------------------------------------------------


def test_grammars_are_kept_and_the_one_used_longest_ago_is_dropped():
    grammars = Grammars(TOKENIZER, kept=2)
    first, second = grammars.regex("a"), grammars.regex("b")
    assert grammars.regex("a") is first
    grammars.regex("c")
    assert grammars.regex("a") is first
    assert grammars.regex("b") is not second
    assert grammars.json_schema({"const": 1}) is grammars.json_schema({"const": 1})


def test_threads_share_grammars_and_do_not_disturb_each_other():
    grammars = Grammars(TOKENIZER)

    def write(number: int) -> list[int]:
        tools = [tool("get", {"properties": {f"p{number % 3}": {"type": "string"}}})]
        kinds = (grammars.json_object, lambda: grammars.regex("(日|[a-e]){5,}"), lambda: grammars.tool_calls(tools))
        *_, (_, ids) = walk(kinds[number % 3](), number, 60)
        return ids

    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(write, range(48)))
    assert at_once == [write(number) for number in range(48)]
