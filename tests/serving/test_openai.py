"""OpenAI's own client, through every feature: what a stream says, joined, is the whole answer, and both are right."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jsonschema
import openai
import pytest

from andromeda.inference.sampling import Sampling
from andromeda.inference.text import chat_prompt, stream_text, text_prompt
from andromeda.serving.responses import ChatCompletionChunk
from andromeda.serving.responses import Completion as CompletionBody
from tests.serving.conftest import NAME, Served
from tests.serving.port import until

SEA: list[dict[str, Any]] = [{"role": "user", "content": "The sea"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How it is at sea.",
        "parameters": {
            "type": "object",
            "properties": {"depth": {"type": "integer"}, "wet": {"type": "boolean"}},
            "required": ["depth", "wet"],
            "additionalProperties": False,
        },
    },
}
TIDE: dict[str, Any] = {
    "type": "function",
    "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}},
}
SCHEMA = {
    "type": "object",
    "properties": {"fish": {"enum": ["cod", "eel"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["fish", "count"],
    "additionalProperties": False,
}


def chat(served: Served, **asked: Any) -> Any:
    """The whole answer, after it was compared with what a stream of the same request says."""
    asked = {"model": NAME, "messages": SEA, "seed": 7, "max_tokens": 24, **asked}
    whole = served.client.chat.completions.create(**asked)
    chunks = list(served.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert joined(chunks) == {
        choice.index: {
            "content": choice.message.content or "",
            "calls": [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()],
            "logprobs": [entry.model_dump() for entry in choice.logprobs.content] if choice.logprobs else [],
            "finish_reason": choice.finish_reason,
        }
        for choice in whole.choices
    }
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [getattr(chunks[-1].usage, name) for name in counts] == [getattr(whole.usage, name) for name in counts]
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    return whole


def joined(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    """What a reader makes of a stream, by choice."""
    choices: dict[int, dict[str, Any]] = defaultdict(
        lambda: {"content": "", "calls": [], "logprobs": [], "finish_reason": None}
    )
    for chunk in chunks:
        for choice in chunk.choices:
            so_far = choices[choice.index]
            assert so_far["finish_reason"] is None, "nothing comes after the last chunk of a choice"
            so_far["content"] += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                if call.id is not None:
                    assert call.index == len(so_far["calls"])
                    so_far["calls"].append((call.function.name, ""))
                name, arguments = so_far["calls"][call.index]
                so_far["calls"][call.index] = name, arguments + (call.function.arguments or "")
            so_far["logprobs"] += [entry.model_dump() for entry in choice.logprobs.content] if choice.logprobs else []
            so_far["finish_reason"] = choice.finish_reason
    return dict(choices)


def plain_text(served: Served, ids: list[int], sampling: Sampling, seed: int = 7, **options: Any) -> Any:
    stream = stream_text(served.model, served.tokenizer, ids, sampling=sampling, seed=seed, **options)
    for _ in stream:
        pass
    return stream.completion


# ---- chat ------------------------------------------------------------------------------------------


def test_a_conversation_is_answered_as_plain_decoding_does(served):
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "The "}, {"type": "text", "text": "sea"}]},
        {"role": "assistant", "content": "is"},
        {"role": "user", "content": "wide?"},
    ]
    answer = chat(served, messages=messages, temperature=0.8, top_p=0.9)
    ids = chat_prompt(served.tokenizer, messages)
    expected = plain_text(served, ids, Sampling(temperature=0.8, top_p=0.9), max_new_tokens=24)
    assert answer.choices[0].message.content == expected.text != ""
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(expected.ids))
    assert (answer.model, answer.object) == (NAME, "chat.completion")
    assert (
        served.client.chat.completions.create(model=NAME, messages=SEA, max_completion_tokens=3).usage.completion_tokens
        <= 3
    )


def test_sampling_is_what_was_asked_for(served):
    asked = {"temperature": 1.5, "presence_penalty": 1.0, "frequency_penalty": -0.5, "logit_bias": {"70": 3}}
    extra = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2}
    answer = chat(served, **asked, extra_body=extra)
    sampling = Sampling(1.5, 40, 1.0, 0.01, 1.2, frequency_penalty=-0.5, presence_penalty=1.0, logit_bias={70: 3.0})
    expected = plain_text(served, chat_prompt(served.tokenizer, SEA), sampling, max_new_tokens=24)
    assert answer.choices[0].message.content == expected.text
    greedy = plain_text(served, chat_prompt(served.tokenizer, SEA), Sampling(0.0), max_new_tokens=24)
    assert chat(served, temperature=0).choices[0].message.content == greedy.text
    assert chat(served, top_p=0).choices[0].message.content == greedy.text
    without = chat(served, temperature=0, logit_bias={str(greedy.ids[0]): -100}).choices[0].message.content
    assert not without.startswith(served.tokenizer.decode(greedy.ids[:1]))


def test_choices_have_seeds_of_their_own_and_a_seed_says_all(served):
    answer = chat(served, n=3)
    texts = [choice.message.content for choice in answer.choices]
    ids = chat_prompt(served.tokenizer, SEA)
    assert texts == [plain_text(served, ids, Sampling(), seed, max_new_tokens=24).text for seed in (7, 8, 9)]
    assert answer.usage.prompt_tokens == len(ids)
    assert chat(served, seed=-1).choices[0].message.content == chat(served, seed=2**63 - 1).choices[0].message.content
    unseeded = {chat_text(served) for _ in range(4)}
    assert len(unseeded) > 1


def chat_text(served: Served) -> str:
    answer = served.client.chat.completions.create(model=NAME, messages=SEA, max_tokens=24)
    return answer.choices[0].message.content or ""


def test_stop_strings_end_a_text_and_are_not_shown(served):
    whole = chat(served).choices[0].message.content
    for stop in (whole[5:8], ["never there", whole[3:5], whole[6:9], "nor this"]):
        answer = chat(served, stop=stop)
        stops = [stop] if isinstance(stop, str) else stop
        assert answer.choices[0].message.content == whole[: min(whole.find(one) for one in stops if one in whole)]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 24
        until(lambda: served.backend.idle)


def test_logprobs_are_those_of_the_tokens_that_spell_the_text(served):
    for stop in (None, chat(served).choices[0].message.content[7:10]):
        answer = chat(served, logprobs=True, top_logprobs=3, stop=stop)
        content = answer.choices[0].logprobs.content
        spelt = b"".join(bytes(entry.bytes) for entry in content)
        text = answer.choices[0].message.content
        assert spelt.decode(errors="replace").startswith(text) and len(text) > 3
        assert stop is None or stop not in spelt[: -len(content[-1].bytes)].decode(errors="replace")
        for entry in content:
            assert len(entry.top_logprobs) == 3
            assert entry.logprob <= entry.top_logprobs[0].logprob <= 0
            assert [one.logprob for one in entry.top_logprobs] == sorted(
                (one.logprob for one in entry.top_logprobs), reverse=True
            )
    greedy = chat(served, logprobs=True, temperature=0).choices[0].logprobs.content
    assert greedy[0].top_logprobs == []
    best = chat(served, logprobs=True, top_logprobs=1, temperature=0).choices[0].logprobs.content
    assert all(entry.bytes == entry.top_logprobs[0].bytes for entry in best)


# ---- tools -----------------------------------------------------------------------------------------


def arguments_of(call: Any) -> Any:
    values = json.loads(call.function.arguments)
    jsonschema.validate(values, {"weather": WEATHER, "tide": TIDE}[call.function.name]["function"]["parameters"])
    return values


def test_required_tools_are_called_with_arguments_that_keep_to_their_schema(served):
    answer = chat(served, tools=[WEATHER, TIDE], tool_choice="required", max_tokens=100, temperature=0.7)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.tool_calls
    for call in choice.message.tool_calls:
        assert call.id and call.type == "function"
        arguments_of(call)
    assert len({call.id for call in choice.message.tool_calls}) == len(choice.message.tool_calls)


def test_a_named_tool_is_the_one_that_is_called(served):
    for tool in (WEATHER, TIDE):
        named = {"type": "function", "function": {"name": tool["function"]["name"]}}
        answer = chat(
            served, tools=[WEATHER, TIDE], tool_choice=named, max_tokens=100, temperature=0.7, parallel_tool_calls=False
        )
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == tool["function"]["name"]
        arguments_of(call)


def test_calls_may_be_parallel(served):
    numbers = set()
    for seed in range(6):
        asked = {"tools": [TIDE], "tool_choice": "required", "max_tokens": 120, "seed": seed, "temperature": 1.2}
        several = chat(served, **asked)
        numbers.add(len(several.choices[0].message.tool_calls or ()))
        assert len(chat(served, **asked, parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    assert max(numbers) > 1


def test_auto_is_text_or_calls(served):
    """The bias makes the model open a call, or never do so."""
    opens = str(served.tokenizer.token_to_id("<tool_call>"))
    called = chat(served, tools=[TIDE], max_tokens=100, logit_bias={opens: 100}, temperature=0.7)
    assert called.choices[0].finish_reason == "tool_calls"
    assert called.choices[0].message.tool_calls[0].function.name == "tide"
    spoken = chat(served, tools=[TIDE], tool_choice="auto", logit_bias={opens: -100})
    assert spoken.choices[0].message.tool_calls is None and spoken.choices[0].message.content


def test_none_leaves_the_tools_unread(served):
    assert chat(served, tools=[TIDE], tool_choice="none").choices[0] == chat(served).choices[0]


def test_results_of_calls_are_read(served):
    call = {"id": "call_1", "type": "function", "function": {"name": "tide", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        *SEA,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "high"},
    ]
    answer = chat(served, messages=messages, tools=[TIDE], temperature=0)
    ids = chat_prompt(served.tokenizer, messages, [TIDE])
    assert answer.usage.prompt_tokens == len(ids)
    back = served.client.chat.completions.create(
        model=NAME, messages=[*SEA, answer.choices[0].message, *SEA], max_tokens=1
    )
    assert back.usage.completion_tokens == 1, "a message can be sent back as it came"


# ---- forms -----------------------------------------------------------------------------------------


def test_a_schema_is_kept_to(served):
    form = {"type": "json_schema", "json_schema": {"name": "catch", "schema": SCHEMA, "strict": True}}
    answer = chat(served, response_format=form, max_tokens=100)
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


def test_json_objects_are_json(served):
    answer = chat(served, response_format={"type": "json_object"}, max_tokens=120, logit_bias=closing(served), n=2)
    whole = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert whole
    for choice in whole:
        assert isinstance(json.loads(choice.message.content), dict)
    assert chat(served, response_format={"type": "text"}).choices[0] == chat(served).choices[0]


def closing(served: Served) -> dict[str, int]:
    """A random model goes on for ever; this one likes to close what it opened."""
    return {str(served.tokenizer.encode(mark)[0]): 8 for mark in ("}", "]", '"')}


def test_a_schema_may_stand_beside_tools(served):
    form = {"type": "json_schema", "json_schema": {"name": "catch", "schema": SCHEMA}}
    opens = str(served.tokenizer.token_to_id("<tool_call>"))
    answer = chat(served, tools=[TIDE], response_format=form, logit_bias={opens: -100}, max_tokens=100)
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


# ---- completions -----------------------------------------------------------------------------------


def complete(served: Served, **asked: Any) -> Any:
    asked = {"model": NAME, "seed": 7, **asked}
    whole = served.client.completions.create(**asked)
    chunks = list(served.client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts: dict[int, str] = defaultdict(str)
    ends: dict[int, str] = {}
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    return whole


def test_texts_are_continued(served):
    ids = served.tokenizer.encode("The sea")
    for prompt, expected in (
        ("The sea", text_prompt(served.tokenizer, "The sea")),
        (ids, ids),
        ("", [served.tokenizer.eos_id]),
    ):
        answer = complete(served, prompt=prompt, max_tokens=20)
        assert answer.choices[0].text == plain_text(served, expected, Sampling(), max_new_tokens=20).text
        assert answer.usage.prompt_tokens == len(expected)
    assert complete(served, prompt="The sea").usage.completion_tokens <= 16, "OpenAI's default"


def test_several_prompts_are_continued_each_n_times(served):
    answer = complete(served, prompt=["The", "sea"], n=2, max_tokens=8)
    expected = [
        plain_text(
            served, text_prompt(served.tokenizer, prompt), Sampling(), 7 + 2 * number + sample, max_new_tokens=8
        ).text
        for number, prompt in enumerate(("The", "sea"))
        for sample in range(2)
    ]
    assert [choice.text for choice in answer.choices] == expected
    lists = [served.tokenizer.encode(text) for text in ("The", "sea")]
    assert len(complete(served, prompt=lists, max_tokens=2).choices) == 2


def test_completions_have_logprobs_in_their_own_form(served):
    answer = complete(served, prompt="The sea", logprobs=2, max_tokens=12)
    choice, logprobs = answer.choices[0], answer.choices[0].logprobs
    assert (
        len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset)
    )
    for token, logprob, top, offset in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset, strict=True
    ):
        assert top[token] == logprob and 2 <= len(top) <= 3
        assert choice.text[offset:].startswith(token) or token.startswith("\\x") or not token.isascii()
    assert all(len(top) == 1 for top in complete(served, prompt="The", logprobs=0).choices[0].logprobs.top_logprobs)


# ---- the rest --------------------------------------------------------------------------------------


def test_models_are_listed(served):
    assert [model.id for model in served.client.models.list()] == [NAME]
    assert served.client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("another")


def test_every_chunk_has_the_documented_form(served):
    for route, form, asked in (
        ("/v1/chat/completions", ChatCompletionChunk, {"messages": SEA, "tools": [TIDE], "logprobs": True}),
        ("/v1/completions", CompletionBody, {"prompt": "a", "logprobs": 1}),
    ):
        response = served.http.post(route, json={"model": NAME, "stream": True, "max_tokens": 8, **asked})
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        for event in events:
            values = json.loads(event.removeprefix("data: "))
            form.model_validate(values)
            assert all("finish_reason" in choice for choice in values["choices"])
            assert "usage" not in values


REFUSED: dict[str, tuple[Mapping[str, Any], str | None]] = {
    "unknown fields": ({"extra_body": {"wings": 2}}, "wings"),
    "no such role": ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0]"),
    "no messages": ({"messages": []}, "messages"),
    "pictures": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    "a call without tools": ({"tool_choice": "required"}, None),
    "a tool that is not there": (
        {"tools": [TIDE], "tool_choice": {"type": "function", "function": {"name": "x"}}}, None,
    ),
    "two of a name": ({"tools": [TIDE, TIDE]}, None),
    "five stops": ({"stop": list("abcde")}, "stop"),
    "an empty stop": ({"stop": ""}, "stop"),
    "a temperature of text": ({"temperature": "1"}, "temperature"),
    "too hot": ({"temperature": 2.1}, "temperature"),
    "too many choices": ({"n": 10**9}, "n"),
    "no choices": ({"n": 0}, "n"),
    "more texts than there is room for": ({"n": 9}, "n"),
    "an id that is none": ({"logit_bias": {"320": 1}}, "logit_bias"),
    "a bias of nothing": ({"logit_bias": {"sea": 1}}, None),
    "logprobs not asked for": ({"top_logprobs": 2}, None),
    "too long an answer": ({"max_tokens": 129}, "max_tokens"),
    "two bounds": ({"max_completion_tokens": 3}, None),
    "functions of old": ({"extra_body": {"functions": [{"name": "tide"}]}}, None),
    "speech": ({"extra_body": {"audio": {"voice": "alto"}}}, None),
    "usage of no stream": ({"stream_options": {"include_usage": True}}, None),
    "a schema that says no": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "thing"}}}}, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_openai_s_form(served, case):
    asked, param = REFUSED[case]
    with pytest.raises(openai.BadRequestError) as raised:
        served.client.chat.completions.create(**{"model": NAME, "messages": SEA, "max_tokens": 8, **asked})
    body = raised.value.body
    assert isinstance(body, dict)
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error" and body["message"]
    assert param is None or body["param"] == param
    assert "\n" not in body["message"]


@pytest.mark.parametrize(
    "asked",
    [{"echo": True}, {"suffix": "a"}, {"best_of": 2}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [10**6]},
     {"prompt": ["a", 1]}, {"max_tokens": 0}, {"logprobs": 6}, {"prompt": "sea " * 2000}],
)  # fmt: skip
def test_completions_refuse_too(served, asked):
    with pytest.raises(openai.BadRequestError):
        served.client.completions.create(**{"model": NAME, "prompt": "a", **asked})


def test_too_long_a_prompt_is_told_in_tokens(served):
    with pytest.raises(openai.BadRequestError) as raised:
        served.client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x" * 1100}])
    assert raised.value.code == "context_length_exceeded"
    assert "1024 tokens" in raised.value.message
    near = served.client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x" * 1000}])
    assert near.usage.total_tokens <= 1024, "an answer without a bound has the room that is left"


def test_known_fields_without_effect_are_taken(served):
    answer = chat(
        served, user="me", store=False, metadata={"a": "b"}, reasoning_effort="low", service_tier="auto",
        extra_body={"verbosity": "low", "prompt_cache_key": "k", "safety_identifier": "s", "modalities": ["text"]},
    )  # fmt: skip
    assert answer.choices[0] == chat(served).choices[0]


def test_an_engine_that_fails_is_an_error_and_not_an_end(served):
    served.backend.fails_after = 0
    with pytest.raises(openai.InternalServerError) as raised:
        served.client.chat.completions.create(model=NAME, messages=SEA)
    assert raised.value.code == "engine_error"
    served.backend.fails_after = 3
    stream = served.client.chat.completions.create(model=NAME, messages=SEA, stream=True, max_tokens=100, seed=7)
    chunks = []
    with pytest.raises(openai.APIError, match="the model failed"):
        chunks.extend(stream)
    assert chunks and not any(choice.finish_reason for chunk in chunks for choice in chunk.choices)
    until(lambda: served.backend.idle and served.state.texts == 0)
    assert chat(served)
