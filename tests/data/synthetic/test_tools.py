"""Tool calls: valid by their schemas, of the offered functions, and as the request says."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.data.synthetic import SPLITS, Chat, Sample, Split, check, make_task, sample
from andromeda.data.synthetic.api_parameters import PARAMETERS
from andromeda.data.synthetic.apis import KINDS, draw_function, roles, with_article
from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.tools import CASES, Call, parse_calls

TYPES: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": int | float,
    "boolean": bool,
    "array": list,
    "object": dict,
}
KEYWORDS = {
    "type", "enum", "format", "minimum", "maximum", "items", "required", "properties", "description",
    "additionalProperties",
}  # fmt: skip
FORMATS = {"date": r"\d{4}-\d\d-\d\d", "email": r"[a-z.]+@[a-z.]+"}


def complaints(schema: dict[str, Any], value: Any, where: str = "") -> list[str]:
    """What a value breaks of a JSON Schema; a keyword that is not known here is a complaint too."""
    found = [f"{where}: keyword {key}" for key in schema if key not in KEYWORDS]
    kind = schema["type"]
    if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return [*found, f"{where}: {value!r} is no {kind}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r} is none of {schema['enum']}")
    if "format" in schema and not re.fullmatch(FORMATS[schema["format"]], value):
        found.append(f"{where}: {value!r} is no {schema['format']}")
    if not schema.get("minimum", -1e9) <= (value if kind in ("integer", "number") else 0) <= schema.get("maximum", 1e9):
        found.append(f"{where}: {value!r} is out of range")
    if kind == "array":
        found += [c for n, item in enumerate(value) for c in complaints(schema["items"], item, f"{where}[{n}]")]
    if kind == "object":
        found += [f"{where}: no {name}" for name in schema["required"] if name not in value]
        found += [f"{where}: {name} is not known" for name in value if name not in schema["properties"]]
        known = {name: item for name, item in value.items() if name in schema["properties"]}
        found += [c for name, item in known.items() for c in complaints(schema["properties"][name], item, name)]
    return found


def conversation(drawn: Sample) -> tuple[Chat, dict[str, dict[str, Any]], list[list[dict[str, Any]]]]:
    """The chat, its functions by name, and the calls of each of the assistant's messages."""
    assert isinstance(drawn.body, Chat)
    functions = {tool["function"]["name"]: tool["function"] for tool in drawn.body.tools}
    assert len(functions) == len(drawn.body.tools)  # no name twice
    replies = [message for message in drawn.body.messages if message["role"] == "assistant"]
    return drawn.body, functions, [[call["function"] for call in reply.get("tool_calls", [])] for reply in replies]


@given(
    case=st.sampled_from(CASES), split=st.sampled_from(SPLITS), number=st.integers(0, 10**6), tools=st.integers(1, 12)
)
def test_every_call_is_of_an_offered_function_and_valid(case: str, split: Split, number: int, tools: int) -> None:
    drawn = sample(make_task("tool_calls", cases=[case], tools=[tools, tools]), split, 0, number)
    _, functions, replies = conversation(drawn)
    assert [len(calls) for calls in replies] == {"one": [1], "two": [2], "chain": [1, 1], "none": [0]}[case]
    assert len(functions) == max(tools, 2 if case in ("two", "chain") else 1)
    for call in (call for calls in replies for call in calls):
        assert not complaints(functions[call["name"]]["parameters"], call["arguments"])
    assert check(drawn, drawn.answer)


@pytest.mark.parametrize("key", PARAMETERS)
def test_whatever_is_said_is_valid_and_stands_in_the_words(key: str) -> None:
    parameter = PARAMETERS[key]
    for number in range(200):
        draws = Draws(f"{key} {number}")
        schema = parameter.schema(draws)
        value, words = parameter.say(draws, schema)
        assert not complaints(schema, value)
        assert json.loads(json.dumps(value)) == value
        if isinstance(value, int | float) and not isinstance(value, bool) and words[0].isdigit():
            assert float(words) == value
        if isinstance(value, list):
            assert re.split(", | and ", words) == [str(item) for item in value]


def test_every_parameter_is_of_some_function_and_all_types_are_there() -> None:
    used = {key for kind in KINDS.values() for how in kind.actions.values() for key in (*how.needed, *how.others)}
    assert used == set(PARAMETERS)
    kinds = {PARAMETERS[key].schema(Draws(key))["type"] for key in PARAMETERS}
    assert kinds == {"string", "integer", "number", "boolean", "array"}


def test_a_function_has_no_parameter_name_twice() -> None:
    for number, role in enumerate(roles("train")):
        function = draw_function(Draws(str(number)), role)
        schema = function.tool["function"]["parameters"]
        assert 1 <= len(schema["properties"]) == len(function.schemas) <= 5
        assert len(schema["required"]) >= 1
        assert set(schema["required"]) <= set(schema["properties"])


def test_dates_and_times_are_turned_into_the_form_that_is_described() -> None:
    said = {PARAMETERS["date"].say(Draws(str(n)), {}) for n in range(300)}
    spoken = {re.sub(r"\d+", "9", words) for _, words in said}
    assert {"9-9-9", "9 May 9", "May 9, 9"} <= spoken
    times = dict(words[::-1] for words in (PARAMETERS["time"].say(Draws(str(n)), {}) for n in range(400)))
    assert (times["12:15 pm"], times["1:45 pm"], times["9:00 am"]) == ("12:15", "13:45", "09:00")


def test_nothing_fits_where_the_answer_is_a_refusal() -> None:
    for number in range(200):
        drawn = sample(make_task("tool_calls", cases=["none"]), "train", 0, number)
        chat, functions, _ = conversation(drawn)
        request = chat.messages[0]["content"]
        thing = drawn.content[0].removeprefix("function ")
        assert thing in request
        fitting = {
            how.description.format(a=with_article(thing))
            for kind in KINDS.values()
            for how in kind.actions.values()
            if any(words.format(a=with_article(thing), the=f"the {thing}") in request.lower() for words in how.requests)
        }
        assert fitting
        assert fitting.isdisjoint(function["description"] for function in functions.values())


def test_hard_distractors_are_offered() -> None:
    near: Counter[str] = Counter()
    for number in range(200):
        drawn = sample(make_task("tool_calls", cases=["one"], tools=[6, 6]), "train", 0, number)
        _, functions, ((call,),) = conversation(drawn)
        thing = drawn.content[0].removeprefix("function ")
        others = [f["description"] for f in functions.values() if f["name"] != call["name"]]
        near["thing"] += any(re.search(rf"\b{thing}\b", description) for description in others)
        near["action"] += any(d.split()[0] == functions[call["name"]]["description"].split()[0] for d in others)
    assert near["thing"] > 60 and near["action"] > 120


def test_optional_parameters_are_left_out_and_given() -> None:
    given_ones: Counter[bool] = Counter()
    for number in range(200):
        drawn = sample(make_task("tool_calls", cases=["one"]), "train", 0, number)
        _, functions, ((call,),) = conversation(drawn)
        schema = functions[call["name"]]["parameters"]
        given_ones.update(n in call["arguments"] for n in schema["properties"] if n not in schema["required"])
    assert min(given_ones[True], given_ones[False]) > 50


def test_the_second_call_of_a_chain_needs_the_result_of_the_first() -> None:
    for number in range(50):
        drawn = sample(make_task("tool_calls", cases=["chain"]), "train", 0, number)
        chat, _, (_, (call,)) = conversation(drawn)
        assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
        found = json.loads(chat.messages[2]["content"])["reference"]
        assert found in call["arguments"].values()
        assert found not in chat.messages[0]["content"]


def test_every_word_of_a_string_argument_is_in_the_request() -> None:
    for number in range(200):
        drawn = sample(make_task("tool_calls", cases=["one", "two"]), "test", 0, number)
        chat, functions, (calls,) = conversation(drawn)
        for call in calls:
            for name, value in call["arguments"].items():
                schema = functions[call["name"]]["parameters"]["properties"][name]
                if schema["type"] == "string" and "Date" not in schema["description"] and ":" not in value:
                    assert value in chat.messages[0]["content"] or schema.get("format") == "date"


def test_calls_are_compared_as_values() -> None:
    call = Call("set_lamp", {"level": 2, "on": True, "rooms": ["hall", "attic"]})
    same = (
        '<tool_call>\n{"arguments": {"rooms":["hall","attic"],"on":true,"level":2.0},"name":"set_lamp"}\n</tool_call>'
    )
    assert [other.canonical for other in parse_calls(same) or []] == [call.canonical]
    for wrong in ({"level": 2, "on": 1}, {"level": 3}, {"rooms": ["attic", "hall"]}, {"level": "2"}):
        assert Call("set_lamp", {**call.arguments, **wrong}).canonical != call.canonical
    assert Call("set_lamps", call.arguments).canonical != call.canonical


def test_two_calls_count_in_any_order_and_both() -> None:
    drawn = sample(make_task("tool_calls", cases=["two"]), "train", 0, 0)
    first, second = drawn.answer.splitlines()
    assert check(drawn, f"I do both.\n{second}\n\n{first}")
    assert not check(drawn, first)
    assert not check(drawn, f"{first}{second}{second}")


@pytest.mark.parametrize(
    "broken",
    [
        "<tool_call>", "<tool_call>{</tool_call>", "<tool_call>[1]</tool_call>", '<tool_call>"x"</tool_call>',
        '<tool_call>{"name": "a"}</tool_call>', '<tool_call>{"name": "a", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>', '<tool_call>{"name": "a", "arguments": {}}',
        "<tool_call>" + "[" * 100_000,
    ],
    ids=range(9),
)  # fmt: skip
def test_a_broken_call_is_no_answer(broken: str) -> None:
    assert parse_calls(broken) is None
    for case in ("one", "none"):
        assert not check(sample(make_task("tool_calls", cases=[case]), "train", 0, 0), broken)


def test_a_refusal_may_be_worded_freely_but_not_call_anything() -> None:
    refused = sample(make_task("tool_calls", cases=["none"]), "train", 0, 0)
    called = sample(make_task("tool_calls", cases=["one"]), "train", 0, 0)
    assert check(refused, "Sorry, I have nothing for that.")
    assert not check(refused, called.answer)
    assert not check(called, refused.answer)
