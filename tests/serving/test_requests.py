"""Requests as data: they go to replicas as JSON, and have to arrive as they were."""

from __future__ import annotations

from typing import Any

import pytest

from andromeda.serving.requests import ChatRequest

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASKED: dict[str, dict[str, Any]] = {
    "a schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    },
    "tools": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    "a conversation": {
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "é 🙂 \u2028"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ]
    },
    "how to write": {
        "stop": ["a", "b"], "logit_bias": {"1": -0.1}, "seed": -(2**63), "temperature": 0.1, "stream": True,
        "stream_options": {"include_usage": True}, "metadata": {"a": "b"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_a_request_survives_json(name):
    asked = ChatRequest.model_validate({"model": "x", "messages": [{"role": "user", "content": "a"}], **ASKED[name]})
    assert ChatRequest.model_validate_json(asked.model_dump_json()) == asked
