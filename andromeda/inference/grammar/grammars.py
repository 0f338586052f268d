"""From what is asked for to a grammar, compiled once and kept."""

from __future__ import annotations

import json
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from threading import Lock
from typing import TYPE_CHECKING, Any

from andromeda.chat import Tool
from andromeda.errors import AndromedaError
from andromeda.inference.grammar.constraint import GrammarConstraint, reason
from andromeda.inference.grammar.schema import COMBINING, Schema, enforceable, plain_json
from andromeda.inference.tool_calls import CLOSE, OPEN
from andromeda.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_CHARACTERS = (
    100_000  # of a grammar; within the limits of grammar.schema the worst that was found compiles in a second
)
MAX_PATTERN_CHARACTERS = 10_000
MAX_TOOLS = 128  # as OpenAI's API has it
ANYTHING = "/(?s:.*)/"

# Layout and escapes are those of Python's json.dumps(ensure_ascii=False), which the chat template and all our training
# data have. \u is left out: with it a name that is not in `properties` could spell one that is.
JSON_FORM = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "json_allowed_escapes": 'nrbtf\\"',
}


class Grammar:
    """A compiled grammar; any number of texts may be under it at once."""

    def __init__(self, matcher: LLMatcher, tokenizer: Tokenizer) -> None:
        self._matcher, self._tokenizer = matcher, tokenizer

    def constraint(self) -> GrammarConstraint:
        """The state of a new text."""
        return GrammarConstraint(self._matcher.deep_copy(), self._tokenizer.vocab_size, self._tokenizer.stop_ids)


class Grammars:
    """The grammars of a tokenizer. Threads may share it; what takes long runs without Python's lock.

    Args:
        kept: so many grammars are kept, those used last.

    Raises:
        AndromedaError: llguidance is not installed, or cannot use the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, kept: int = 128) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise AndromedaError("grammar: needs llguidance; pip install 'andromeda-lm[serve]'") from error
        if not tokenizer.stop_ids:
            raise AndromedaError("grammar: the tokenizer has no token that ends a text; name an eos_token")
        self._tokenizer, self._new_matcher = tokenizer, llguidance.LLMatcher
        try:
            self._vocabulary = llguidance.LLTokenizer(
                tokenizer.plain_json(), n_vocab=tokenizer.vocab_size, eos_token=list(tokenizer.stop_ids)
            )
        except ValueError as error:
            raise AndromedaError(f"grammar: llguidance cannot use this tokenizer ({error})") from error
        # Half of llguidance's own limits or less where that costs no schema within ours, so that a mask takes tens of
        # milliseconds at most; more in a row, for objects of 1,000 optional properties.
        self._limits = llguidance.LLParserLimits(
            max_items_in_row=20_000, step_lexer_fuel=100_000, max_lexer_states=50_000, verbose_errors=False
        )
        self._kept, self._grammars, self._lock = kept, OrderedDict[str, Grammar](), Lock()

    def json_schema(self, schema: Schema) -> Grammar:
        """JSON that keeps to a schema (which can be: `grammar.schema`); properties come in the schema's order.

        Raises:
            AndromedaError: the schema cannot be kept to.
        """
        return self._grammar(("schema", schema), "json schema", lambda: f"start: {_json(schema, 'json schema')}")

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Grammar:
        """Text that a regular expression describes from its beginning to its end, in the syntax of Rust's regex crate.

        Raises:
            AndromedaError: not a regular expression, too complex, or with what is not regular (lookaround).
        """
        if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN_CHARACTERS:
            raise AndromedaError(f"regex: must be a text of at most {MAX_PATTERN_CHARACTERS} characters")
        return self._grammar(("regex", pattern), "regex", lambda: self._new_matcher.grammar_from_regex(pattern))

    def tool_calls(
        self,
        tools: Sequence[Tool],
        choice: str | Mapping[str, Any] = "auto",
        parallel: bool = True,
        answer: Schema | None = None,
    ) -> Grammar:
        """Calls in the form of our chat template, one a line; `inference.tool_calls` reads them back.

        Args:
            tools: as in OpenAI's API. Arguments keep to `parameters` (without: none), those of a function with
                `"strict": false` are any object.
            choice: `auto` (text, then perhaps calls), `required` (calls alone), `none` (text alone), or
                `{"type": "function", "function": {"name": ...}}` (calls of that one).
            parallel: whether several calls may come.
            answer: a schema that the text of `auto` and `none` keeps to; with it, `auto` is either that or calls.

        Raises:
            AndromedaError: tools that are none, a choice of none of them, a schema that cannot be kept to, or a
                tokenizer without the tokens around calls.
        """
        key = ("tools", list(tools), choice, parallel, answer)
        return self._grammar(key, "tools", lambda: self._calls(tools, choice, parallel, answer))

    def _calls(
        self, tools: Sequence[Tool], choice: str | Mapping[str, Any], parallel: bool, answer: Schema | None
    ) -> str:
        free = ANYTHING if answer is None else _json(answer, "json schema")
        if choice == "none":
            return f"start: text\ntext: {free}"
        functions = _functions(tools)
        if isinstance(choice, Mapping):
            functions = _named(functions, choice)
        elif choice not in ("auto", "required"):
            raise AndromedaError(
                f"tool_choice: {reprlib.repr(choice)} must be auto, required, none or a function's name in its object"
            )
        start = "calls" if choice != "auto" else "TEXT calls?" if answer is None else "answer | calls"
        rules = [f"start: {start}", f"calls: call{' (NEXT call)*' if parallel else ''}", 'NEXT: "\\n"']
        if choice == "auto":
            rules.append(f"TEXT: {ANYTHING}" if answer is None else f"answer: {free}")
        bodies = " | ".join(f"call_{number}" for number in range(len(functions)))
        rules.append(f"call: {self._token(OPEN)} ( {bodies} ) {self._token(CLOSE)}")
        for number, (name, parameters) in enumerate(functions.items()):
            head = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
            rules.append(
                f'call_{number}: {json.dumps(head)} {_json(parameters, f"parameters of {reprlib.repr(name)}")} "}}"'
            )
        return "\n".join(rules)

    def _token(self, name: str) -> str:
        token_id = self._tokenizer.token_to_id(name)
        if token_id not in self._tokenizer.control_ids:
            raise AndromedaError(f"tools: the tokenizer has no token {name}; give it our chat template's (for_chat)")
        return f"<[{token_id}]>"

    def _grammar(self, request: Any, what: str, write: Callable[[], str]) -> Grammar:
        key = sha256(plain_json(request, what).encode()).hexdigest()
        with self._lock:
            if key in self._grammars:
                self._grammars.move_to_end(key)
                return self._grammars[key]
        grammar = Grammar(self._compiled(write(), what), self._tokenizer)  # two threads may do so at once
        with self._lock:
            self._grammars[key] = grammar
            while len(self._grammars) > self._kept:
                self._grammars.popitem(last=False)
        return grammar

    def _compiled(self, text: str, what: str) -> LLMatcher:
        """With its first mask, and the text that it forces: there a grammar that nothing keeps to is found out."""
        if len(text) > MAX_CHARACTERS:
            raise AndromedaError(
                f"{what}: {len(text)} characters without descriptions, {MAX_CHARACTERS} at most can be kept to"
            )
        matcher = self._new_matcher(self._vocabulary, text, log_level=0, limits=self._limits)
        trial = matcher
        if not matcher.is_error():
            matcher.compute_bitmask()
            trial = matcher.deep_copy()
            trial.try_consume_tokens(trial.compute_ff_tokens())
        if trial.is_error():
            raise AndromedaError(f"{what}: cannot be kept to ({reason(trial)}); change or simplify it")
        return matcher


def _json(schema: Schema, what: str) -> str:
    return "%json " + json.dumps({**enforceable(schema, what), "x-guidance": JSON_FORM})


def _functions(tools: Sequence[Tool]) -> dict[str, Schema]:
    """Parameters by name."""
    if not 1 <= len(tools) <= MAX_TOOLS:
        raise AndromedaError(f"tools: {len(tools)} are given; 1 to {MAX_TOOLS} can be")
    functions: dict[str, Schema] = {}
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise AndromedaError(f"tools: number {number} must be an object with a function and its name")
        if name in functions:
            raise AndromedaError(f"tools: two functions are named {reprlib.repr(name)}; rename one")
        functions[name] = _parameters(function, name)
    return functions


def _parameters(function: Mapping[str, Any], name: str) -> Schema:
    if function.get("strict") is False:
        return {"type": "object"}
    parameters = function.get("parameters") or {"type": "object", "additionalProperties": False}
    if not isinstance(parameters, Mapping):
        raise AndromedaError(f"parameters of {reprlib.repr(name)}: must be an object, not {type(parameters).__name__}")
    if parameters.get("type", "object") != "object":
        raise AndromedaError(
            f"parameters of {reprlib.repr(name)}: type={reprlib.repr(parameters['type'])} must be 'object'"
        )
    return parameters if COMBINING & parameters.keys() else {"type": "object", **parameters}


def _named(functions: Mapping[str, Schema], choice: Mapping[str, Any]) -> dict[str, Schema]:
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or name not in functions:
        raise AndromedaError(f"tool_choice: {reprlib.repr(name)} is none of the tools, {reprlib.repr(list(functions))}")
    return {name: functions[name]}
