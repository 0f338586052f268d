"""Replies read back: what the chat template wrote, whatever comes in pieces, whatever is broken."""

from __future__ import annotations

import json
import re
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.inference.tool_calls import CLOSE, OPEN, Delta, Reply, ReplyStream, ToolCall, read_reply
from andromeda.tokenizer import Tokenizer

CALL = '{"name": "get_weather", "arguments": {"city": "Zoë", "days": [1, 2, 3]}}\n日本語 🙂\n'
TOKENIZER = Tokenizer.train([CALL * 3], 330)
OPEN_ID, CLOSE_ID = (TOKENIZER.encode(name, allow_special=True)[0] for name in (OPEN, CLOSE))

texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('{}"\\\n:, '), max_size=12)
hard_texts = texts | st.sampled_from([OPEN, CLOSE, '", "arguments": {}}', "}}", "\n", "\n\n", "日本語 🙂"])
arguments = st.dictionaries(hard_texts, st.recursive(
    st.none() | st.booleans() | st.integers() | hard_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hard_texts, inner, max_size=3), max_leaves=4,
), max_size=3)  # fmt: skip
calls = st.lists(st.tuples(hard_texts, arguments), max_size=3)
pieces = map(TOKENIZER.encode, ("\n", "{", "}", '{"name": "a", "arguments": {}', '{"b": NaN}', "é🙂"))
rubbish = st.lists(st.sampled_from([[OPEN_ID], [CLOSE_ID], TOKENIZER.encode("🙃")[:2], *pieces]), max_size=12).map(
    lambda parts: [*chain(*parts)]
)


def said(content: str | None, made: list[tuple[str, Any]]) -> list[int]:
    """What our template has the assistant say, its end token with it."""
    tool_calls = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in made]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": content, "tool_calls": tool_calls},
    ]
    ids, mask = TOKENIZER.encode_chat_with_mask(messages)
    return [token for token, ours in zip(ids, mask, strict=True) if ours]


def written(call: str) -> list[int]:
    return [OPEN_ID, *TOKENIZER.encode(call), CLOSE_ID]


def plain(reply: Reply) -> tuple[str | None, list[tuple[str, Any]]]:
    return reply.content, [(call.name, json.loads(call.arguments)) for call in reply.calls]


@given(st.none() | hard_texts, calls, st.booleans())
def test_what_the_template_writes_comes_back(content, made, constrained):
    constrained = constrained and OPEN not in (content or "")  # a grammar's text has no such token
    found = read_reply(TOKENIZER, said(content, made), constrained)
    assert plain(found) == (content or (None if made else ""), made)
    assert len({call.id for call in found.calls}) == len(made)
    for call, (_, given_arguments) in zip(found.calls, made, strict=True):
        assert call.arguments == json.dumps(given_arguments, ensure_ascii=False)


def joined(deltas: list[Delta]) -> tuple[str, list[tuple[str, str]]]:
    """As a client of OpenAI's API does; a call's first delta has its id and name, no other has."""
    content, found = "", dict[int, tuple[str, str]]()
    for delta in deltas:
        content += delta.content
        if delta.index is None:
            assert delta.content
            assert delta.id is delta.name is None
            continue
        assert not delta.content
        assert (delta.index not in found) == (delta.id is not None) == (delta.name is not None)
        name, so_far = found.get(delta.index, (delta.name, ""))
        assert name is not None
        found[delta.index] = (name, so_far + delta.arguments)
    assert list(found) == list(range(len(found)))
    return content, list(found.values())


@given(st.one_of(rubbish, st.builds(said, st.none() | hard_texts, calls)), st.booleans())
def test_a_stream_and_the_whole_say_the_same(ids, constrained):
    stream = ReplyStream(TOKENIZER, constrained)
    deltas = [delta for token in ids for delta in stream.push([token])] + stream.flush()
    whole = read_reply(TOKENIZER, ids, constrained)
    assert joined(deltas) == (whole.content or "", [(call.name, call.arguments) for call in whole.calls])


@given(rubbish)
def test_what_is_no_call_stays_content_to_the_letter(ids):
    """And nothing is lost where calls stand between: they and the line break before each are all that is taken out."""
    reply = read_reply(TOKENIZER, ids)
    text = TOKENIZER.decode(ids)
    if not reply.calls:
        assert reply.content == text
    for call in reply.calls:
        inner = re.escape(f'{{"name": "{call.name}", "arguments": {call.arguments}')
        body = re.search(rf"{OPEN}\s*{inner}\s*}}\s*", text)  # in any layout
        assert body is not None
        text = text[: body.start()].removesuffix("\n") + text[body.end() :].removeprefix(CLOSE)
    assert (reply.content or "") == text


@pytest.mark.parametrize(
    "body",
    [
        *("", "{", "[]", "null", '{"name": "a"}', '{"name": 1, "arguments": {}}', '{"name": "a", "arguments": []}'),
        *(
            '{"name": "a", "arguments": "{}"}',
            '{"name": "a", "arguments": {"b": NaN}}',
            '{"name": "a", "arguments": {}}}',
        ),
        *('{"name": "\\ud800", "arguments": {}}', '{"name": "a", "arguments": {"b": 1e999}}', "[" * 5000),
    ],
)
def test_broken_calls_are_content(body):
    ids = [
        *TOKENIZER.encode("Well\n"),
        *written(body),
        *TOKENIZER.encode("\n."),
        *written('{"name": "a", "arguments": {}}'),
    ]
    reply = read_reply(TOKENIZER, ids)
    assert reply.content == f"Well\n{OPEN}{body}{CLOSE}\n."
    assert plain(reply)[1] == [("a", {})]


@pytest.mark.parametrize(
    "layout", ['{"arguments":{"b":1},"name":"a"}', ' {\n "name": "a",\n "arguments": {"b": 1}\n}\n']
)
@pytest.mark.parametrize("constrained", [False, True])
def test_any_layout_is_read(layout, constrained):
    assert plain(read_reply(TOKENIZER, written(layout), constrained)) == (None, [("a", {"b": 1})])


def test_marks_that_are_spelt_out_are_text():
    text = f'{OPEN}{{"name": "a", "arguments": {{}}}}{CLOSE}'
    assert read_reply(TOKENIZER, TOKENIZER.encode(text)) == Reply(text)


def test_a_call_without_its_end_is_one_if_it_is_whole():
    body = TOKENIZER.encode('{"name": "a", "arguments": {"b": "c"}}')
    for cut in range(len(body)):
        assert read_reply(TOKENIZER, [OPEN_ID, *body[:cut]]) == Reply(OPEN + TOKENIZER.decode(body[:cut]))
    assert plain(read_reply(TOKENIZER, [OPEN_ID, *body])) == (None, [("a", {"b": "c"})])


@pytest.mark.parametrize("constrained", [True, False])
def test_arguments_are_passed_on_as_they_come_under_a_grammar_alone(constrained):
    *ids, close, end = said(None, [("a", {"b": "}{", "c": {"d": {}}})])
    assert close == CLOSE_ID
    stream = ReplyStream(TOKENIZER, constrained)
    before = [delta for token in ids for delta in stream.push([token])]
    after = [*stream.push([close, end]), *stream.flush()]
    whole = ("", [("a", '{"b": "}{", "c": {"d": {}}}')])
    assert joined(before if constrained else after) == whole
    assert (after if constrained else before) == []
    assert len(before) > 10 or not constrained


@settings(max_examples=20)
@given(arguments)
def test_a_call_that_is_cut_off_under_a_grammar_has_the_arguments_so_far(given_arguments):
    ids = said(None, [("a", given_arguments)])
    whole = json.dumps(given_arguments, ensure_ascii=False)
    for cut in range(ids.index(CLOSE_ID) + 1):
        reply, text = read_reply(TOKENIZER, ids[:cut], constrained=True), TOKENIZER.decode(ids[:cut])
        if reply.calls:
            assert reply.content is None
            so_far = text.partition('"arguments": ')[2]
            assert reply.calls[0].arguments == (whole if so_far == whole + "}" else so_far)
        else:
            assert reply.content == ""
            assert '"arguments": ' not in text


def test_a_vocabulary_without_the_marks_has_no_calls():
    tokenizer = Tokenizer.train([CALL], 300, tool_tokens=())
    text = f'x\n{OPEN}{{"name": "a", "arguments": {{}}}}{CLOSE}'
    stream = ReplyStream(tokenizer)
    assert "".join(delta.content for delta in stream.push(tokenizer.encode(text))) == text
    assert stream.flush() == []


def test_ids_are_openais():
    call = read_reply(TOKENIZER, written('{"name": "a", "arguments": {}}')).calls[0]
    assert isinstance(call, ToolCall)
    assert call.id.startswith("call_")
    assert len(call.id) == 29
