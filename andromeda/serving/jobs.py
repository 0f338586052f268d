"""From a request to what the engine is to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from andromeda.inference.engine.request import Constraint, Request
from andromeda.inference.grammar import Grammars
from andromeda.inference.sampling import Sampling
from andromeda.inference.text import chat_prompt, text_prompt
from andromeda.serving.errors import bad_request
from andromeda.serving.limits import Limits
from andromeda.serving.requests import (
    ChatRequest,
    CompletionRequest,
    JsonObjectFormat,
    NamedTool,
    ResponseFormat,
    TextFormat,
)
from andromeda.tokenizer import Tokenizer

Asked = ChatRequest | CompletionRequest


@dataclass(frozen=True)
class Job:
    """Texts to be written.

    Attributes:
        requests: one for each choice, in order.
        stops: strings that end each.
        calls: whether calls of tools are to be told from the text.
        prompt_tokens: of the prompts, each once.
    """

    requests: tuple[Request, ...]
    stops: tuple[str, ...]
    calls: bool
    prompt_tokens: int


def job_of(asked: Asked, tokenizer: Tokenizer, grammars: Grammars, limits: Limits) -> Job:
    """What the engine is to do for a request.

    Raises:
        ApiError: a prompt or an output that is too long, an id that the model does not have.
        AndromedaError: a conversation that the template refuses, a schema that no grammar can be made of.
    """
    prompts: Sequence[Sequence[int]]
    if isinstance(asked, ChatRequest):
        prompts, constraint, calls = [_conversation(asked, tokenizer)], _constraint(asked, grammars), asked.calls_tools
    else:
        prompts, constraint, calls = _texts(asked, tokenizer), _unconstrained, False
    max_new_tokens = [_max_new_tokens(asked, len(ids), limits) for ids in prompts]
    sampling, n = _sampling(asked, tokenizer.vocab_size), asked.n or 1
    requests = tuple(
        Request(
            ids=prompts[index // n],
            max_new_tokens=max_new_tokens[index // n],
            sampling=sampling,
            stop_ids=frozenset(tokenizer.stop_ids),
            seed=None if asked.seed is None else (asked.seed + index) % 2**63,
            top_logprobs=_top_logprobs(asked),
            constraint=constraint(),
        )
        for index in range(len(prompts) * n)
    )
    return Job(requests, asked.stops, calls, sum(map(len, prompts)))


def _conversation(asked: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    messages = [message.model_dump(exclude_none=True) for message in asked.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()] if asked.calls_tools else None
    return chat_prompt(tokenizer, messages, tools)


def _texts(asked: CompletionRequest, tokenizer: Tokenizer) -> list[Sequence[int]]:
    prompts: list[Sequence[int]] = []
    for prompt in asked.prompts:
        if isinstance(prompt, str):
            prompts.append(text_prompt(tokenizer, prompt))
            continue
        if max(prompt) >= tokenizer.vocab_size:
            last = tokenizer.vocab_size - 1
            raise bad_request(f"token id {max(prompt)} is out of range; ids are 0 to {last}", "prompt", "invalid_value")
        prompts.append(prompt)
    return prompts


def _max_new_tokens(asked: Asked, prompt_tokens: int, limits: Limits) -> int:
    room = limits.max_context_tokens - prompt_tokens
    wanted = asked.max_new_tokens
    if wanted is not None and wanted > limits.max_output_tokens:
        raise bad_request(
            f"{wanted} tokens of output were asked for; this server writes {limits.max_output_tokens} at most",
            "max_tokens",
            "invalid_value",
        )
    if room < (wanted or 1):
        raise bad_request(
            f"This server's maximum context length is {limits.max_context_tokens} tokens. The prompt has "
            f"{prompt_tokens}, and {wanted or 1} more were asked for; shorten it, or ask for fewer",
            "messages" if isinstance(asked, ChatRequest) else "prompt",
            "context_length_exceeded",
        )
    return wanted or min(room, limits.max_output_tokens)


def _sampling(asked: Asked, vocab_size: int) -> Sampling:
    """OpenAI's defaults. A top_p of 0 leaves the most probable token alone."""
    bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
    if bias and max(bias) >= vocab_size:
        raise bad_request(
            f"token id {max(bias)} is out of range; ids are 0 to {vocab_size - 1}", "logit_bias", "invalid_value"
        )
    greedy = asked.top_p == 0
    return Sampling(
        temperature=0.0 if greedy else _or(asked.temperature, 1.0),
        top_k=asked.top_k or 0,
        top_p=1.0 if greedy else _or(asked.top_p, 1.0),
        min_p=asked.min_p or 0.0,
        repetition_penalty=_or(asked.repetition_penalty, 1.0),
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias=bias,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _top_logprobs(asked: Asked) -> int | None:
    if isinstance(asked, ChatRequest):
        return asked.top_logprobs or 0 if asked.logprobs else None
    return asked.logprobs


def _constraint(asked: ChatRequest, grammars: Grammars) -> Callable[[], Constraint | None]:
    """Makes what each text must keep to, a fresh one for each."""
    schema = _schema(asked.response_format)
    if asked.calls_tools:
        tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]
        chosen = asked.tool_choice or "auto"
        choice = chosen.model_dump() if isinstance(chosen, NamedTool) else chosen
        return grammars.tool_calls(tools, choice, asked.parallel_tool_calls is not False, schema).constraint
    return _unconstrained if schema is None else grammars.json_schema(schema).constraint


def _unconstrained() -> None:
    return None


def _schema(form: ResponseFormat | None) -> dict[str, Any] | None:
    if form is None or isinstance(form, TextFormat):
        return None
    return {"type": "object"} if isinstance(form, JsonObjectFormat) else form.json_schema.schema_
