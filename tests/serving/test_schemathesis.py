"""The documented API, asked everything that its document allows and much that it does not: no 5xx, no hang."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks

from andromeda.serving.app import create_app
from andromeda.serving.limits import Limits
from andromeda.serving.service import LocalService
from andromeda.serving.state import ServerState
from tests.serving.conftest import NAME, Backend
from tests.serving.port import Port, serving, until

LIMITS = Limits(max_context_tokens=512, max_output_tokens=16, request_seconds=20, client_seconds=5)
SECONDS = 30  # for one answer
ANSWERED: Counter[tuple[str, int]] = Counter()
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
    checks.allow_header_conformance,
]


@pytest.fixture(scope="module")
def port(backend: Backend, tokenizer: Any) -> Iterator[Port]:
    with serving(ServerState(NAME, LIMITS), LocalService(backend, tokenizer, LIMITS)) as port:
        until(lambda: port.state.service is not None)
        yield port


def ask(case: Any, port: Port) -> None:
    """As it was made, but mostly for the model that is here and for few tokens, so that it is answered."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body = {**case.body, "model": NAME}
    answer = case.call(base_url=port.url, timeout=SECONDS)
    ANSWERED[case.path, answer.status_code] += 1
    # What breaks one alternative of a `oneOf` counts as forbidden there, where it may be allowed by another one.
    allowed = [checks.negative_data_rejection] if allows(case.method, case.path, case.body) else []
    case.validate_response(answer, checks=CHECKS, excluded_checks=allowed)


SCHEMA = create_app(ServerState(NAME)).openapi()
DOCUMENT = schemathesis.openapi.from_dict(SCHEMA)
HEALTH = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
WRITING = ("/v1/chat/completions", "/v1/completions")


def allows(method: str, route: str, body: Any) -> bool:
    """Whether the document takes this body."""
    if method != "POST" or route not in WRITING:
        return False
    schema = SCHEMA["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return jsonschema.Draft202012Validator({**schema, "components": SCHEMA["components"]}).is_valid(body)


def of(route: str, mode: GenerationMode) -> st.SearchStrategy[Any]:
    return DOCUMENT[route]["POST"].as_strategy(generation_mode=mode)


@settings(max_examples=30, suppress_health_check=HEALTH)
@given(case=st.one_of(*(of(route, mode) for route in WRITING for mode in GenerationMode)))
def test_no_request_brings_it_down(case: Any, port: Port) -> None:
    ask(case, port)


@pytest.mark.slow
@DOCUMENT.parametrize()
@settings(max_examples=1000, suppress_health_check=HEALTH)
def test_no_request_of_thousands_brings_it_down(case: Any, port: Port) -> None:
    ask(case, port)


@pytest.mark.slow
def test_thousands_were_asked_and_many_answered(port: Port) -> None:
    assert ANSWERED.total() > 3000
    assert all(ANSWERED[route, 200] > 100 for route in WRITING), ANSWERED
