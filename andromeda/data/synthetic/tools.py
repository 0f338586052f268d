"""Tool calls over made-up functions: one call, two, a second that needs the result of the first, or none that fits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from andromeda.data.synthetic.api_parameters import PARAMETERS, reference
from andromeda.data.synthetic.apis import (
    FIND,
    REFERENCE,
    Function,
    Role,
    draw_function,
    draw_others,
    roles,
    with_article,
)
from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.split import Split
from andromeda.data.synthetic.task import Chat, Draft, Form, Message, Sample, Task

CASES = ("one", "two", "chain", "none")
OPENINGS = (
    "Please {}.", "Can you {}?", "I'd like you to {}.", "I need you to {}.", "Could you {}, please?", "{}.",
    "{}, please.", "Would you {}?", "Hello! Please {}.", "I want you to {}.", "Do me a favour and {}.",
)  # fmt: skip
JOINTS = ("{}. Also, {}.", "Please {}, and then {}.", "I need two things: {}, and {}.", "Can you {}? And please {}.")
CHAINS = ("{}, then {}.", "Please {}; once you have it, {}.", "Can you {} and then {}?")
REFUSALS = (
    "None of the functions that I have can do that.",
    "I cannot do that: no function that I can call fits this request.",
    "There is no function for that among those that I can call.",
)
OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]

    @property
    def text(self) -> str:
        """As the project's chat template writes it."""
        name, arguments = (json.dumps(part, ensure_ascii=False) for part in (self.name, self.arguments))
        return f'{OPEN}{{"name": {name}, "arguments": {arguments}}}{CLOSE}'

    @property
    def canonical(self) -> str:
        """Equal for equal JSON values: 2.0 is 2, true is not 1, and the order of names does not count."""
        return json.dumps([self.name, _canonical(self.arguments)], sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class ToolCalls(Task):
    """Conversations in which the assistant calls functions; every function is about things of the split.

    A function's parameters have JSON Schemas of strings, dates, integers, numbers, booleans, enumerations and arrays.
    What a request does not mention is optional, and left out. Where a call needs the result of another, that call and
    its result come first, and the last message is the second call.

    Answers are compared as sets of calls, by JSON value: order and layout do not count, nor does other text. Where
    nothing fits, any text without a call is right.

    Attributes:
        cases: of which each sample is one: "one" call, "two" calls in one message, "chain" (a second call with the
            result of the first) and "none" (no function fits).
        tools: least and most functions offered; at least two where two are called.
    """

    name: ClassVar[str] = "tool_calls"
    form: Form = "chat"
    cases: tuple[str, ...] = CASES
    tools: tuple[int, int] = (1, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.form == "chat", f"form={self.form!r}, but tool calls are conversations; use chat")
        self._require_range("tools", 1, 64)
        good = isinstance(self.cases, tuple) and self.cases and all(case in CASES for case in self.cases)
        self._require(bool(good), f"cases={self.cases!r} must be some of {', '.join(CASES)}")

    @property
    def size(self) -> int:
        return 640 * self.tools[1]

    def draw(self, draws: Draws, split: Split) -> Draft:
        case = draws.choice(self.cases)
        wanted = self._wanted(draws, case, split)
        count = max(draws.between(*self.tools), 1 if case == "none" else len(wanted))
        others = draw_others(draws, wanted, count - (0 if case == "none" else len(wanted)), split)
        functions = [draw_function(draws, role) for role in wanted]
        offered = [draw_function(draws, role) for role in others]
        offered = draws.shuffled(offered if case == "none" else [*functions, *offered])
        messages, answer = _conversation(draws, case, functions)
        body = Chat(tuple(messages), tuple(function.tool for function in offered))
        things = dict.fromkeys(role.content for role in [*wanted, *others])
        return Draft(body, answer, tuple(things))

    def check(self, sample: Sample, text: str) -> bool:
        """Whether the calls in the text are those of the answer; none, and some text, where nothing fits."""
        said, wanted = parse_calls(text), parse_calls(sample.answer)
        if said is None or wanted is None or not text.strip():
            return False
        return sorted(call.canonical for call in said) == sorted(call.canonical for call in wanted)

    def _wanted(self, draws: Draws, case: str, split: Split) -> list[Role]:
        if case == "chain":
            first = draws.choice([role for role in roles(split) if role.action == FIND])
            same = [role for role in roles(split) if role.thing == first.thing and REFERENCE in role.how.needed]
            return [first, draws.choice(same)]
        first = draws.choice(roles(split))
        return [first, *draw_others(draws, [first], 1, split)] if case == "two" else [first]


def parse_calls(text: str) -> list[Call] | None:
    """The calls that a text makes, in its order; None where one is no JSON object with a name and arguments."""
    calls = []
    decoder = json.JSONDecoder()
    _, *pieces = text.split(OPEN)
    for piece in pieces:
        try:
            value, end = decoder.raw_decode(piece.lstrip())
            name, arguments = value["name"], value["arguments"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        closed = piece.lstrip()[end:].lstrip().startswith(CLOSE)
        if not (closed and isinstance(name, str) and isinstance(arguments, dict)):
            return None
        calls.append(Call(name, arguments))
    return calls


# ---- conversations -------------------------------------------------------------------------------------


def _conversation(draws: Draws, case: str, functions: list[Function]) -> tuple[list[Message], str]:
    """The messages, and the last one as text."""
    first, asked = _ask(draws, functions[0])
    if case == "none":
        answer = draws.choice(REFUSALS)
        return [_user(draws.choice(OPENINGS), asked), {"role": "assistant", "content": answer}], answer
    if case == "one":
        return [_user(draws.choice(OPENINGS), asked), _calling(first)], first.text
    if case == "two":
        second, asked_too = _ask(draws, functions[1])
        messages = [_user(draws.choice(JOINTS), asked, asked_too), _calling(first, second)]
        return messages, f"{first.text}\n{second.text}"
    found = reference(draws)
    second, asked_then = _ask(draws, functions[1], found)
    result = {"role": "tool", "content": json.dumps({"reference": found})}
    return [_user(draws.choice(CHAINS), asked, asked_then), _calling(first), result, _calling(second)], second.text


def _ask(draws: Draws, function: Function, found: str | None = None) -> tuple[Call, str]:
    """A call, and the request for it: all that is required and some of the rest, each said in its own words.

    With the reference that is found, the request does not state it.
    """
    arguments: dict[str, Any] = {}
    said: dict[str, list[str]] = {"first": [], "short": [], "long": []}  # in this order
    for name, key in function.parameters.items():
        if name not in function.required and draws.chance(2):
            continue
        if key == REFERENCE and found is not None:
            arguments[name] = found
            continue
        value, words = PARAMETERS[key].say(draws, function.schemas[name])
        arguments[name] = value
        phrase = draws.choice(PARAMETERS[key].phrases).format(words)
        place = "first" if key == REFERENCE else "long" if isinstance(value, list | bool) else "short"
        said[place].append(phrase)
    thing = function.role.thing
    request = draws.choice(function.role.how.requests).format(a=with_article(thing), the=f"the {thing}")
    return Call(function.name, arguments), ", ".join(
        [" ".join([request, *said["first"], *said["short"]]), *said["long"]]
    )


def _user(wording: str, *requests: str) -> Message:
    text = wording.format(*requests)
    return {"role": "user", "content": text[0].upper() + text[1:]}


def _calling(*calls: Call) -> Message:
    called = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    return {"role": "assistant", "content": None, "tool_calls": called}


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
