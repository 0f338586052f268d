"""The key, the host, the log, and what Prometheus reads."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from andromeda.serving.app import create_app
from andromeda.serving.guard import Guard
from andromeda.serving.logs import JsonLines
from andromeda.serving.metrics import Metrics
from andromeda.serving.service import LocalService
from andromeda.serving.state import ServerState
from tests.serving.conftest import NAME, Served

KEY = "correct-horse-battery"
ASKED = {"model": NAME, "prompt": "a secret of the sea", "max_tokens": 4}


@pytest.fixture
def locked(served: Served) -> Iterator[TestClient]:
    """A server with a key; it may be called by any name."""
    assert isinstance(served.state.service, LocalService)
    with TestClient(create_app(ServerState(NAME, served.state.limits, served.state.service), KEY)) as http:
        yield http


def test_every_route_but_health_asks_for_the_key(locked):
    assert locked.get("/health").json() == {"status": "ok"}
    routes = json.loads(locked.get("/openapi.json", headers=bearer(KEY)).text)["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/ready", "/metrics"} <= set(routes)
    for route, methods in [*routes.items(), ("/openapi.json", {"get": {}}), ("/nowhere", {"get": {}})]:
        for method in methods:
            if route == "/health":
                continue
            answer = locked.request(method, route)
            assert answer.status_code == 401, route
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert "Bearer" in answer.headers["www-authenticate"]
            assert locked.request(method, route, headers=bearer(KEY)).status_code != 401


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_only_the_key_is_the_key(locked):
    for wrong in ("", "x", KEY[:-1], KEY + "x", KEY.upper(), f"{KEY} {KEY}"):
        assert locked.get("/v1/models", headers=bearer(wrong)).status_code == 401
    for header in (b"Bearer", b"\xff\xfe", b"Basic !!!", KEY.encode(), b"Bearer \xe9" + KEY.encode()):
        assert locked.get("/v1/models", headers={b"authorization": header}).status_code == 401
    assert locked.get("/v1/models", headers=bearer(KEY)).status_code == 200
    assert locked.get("/v1/models", headers={"authorization": f"bearer  {KEY}"}).status_code == 200
    browser = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    assert locked.get("/v1/models", headers={"authorization": f"Basic {browser}"}).status_code == 200


def test_the_body_of_a_stranger_is_not_read(locked):
    answer = locked.post("/v1/completions", content=b"not JSON at all")
    assert answer.status_code == 401


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "127.1.2.3:8000", "[::1]:8000", "LOCALHOST:1"])
def test_without_a_key_this_machine_s_names_are_answered(served, host):
    assert served.http.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "127.evil.example", "", "[::1"]
)
def test_without_a_key_other_names_are_not(served, host):
    """A web page whose name leads here (DNS rebinding) has the browser send that name."""
    assert served.http.get("/v1/models", headers={"host": host}).status_code == 403


# ---- the log ------------------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [json.loads(JsonLines().format(record)) for record in caplog.records if record.name.startswith("andromeda")]


def test_the_log_has_a_line_a_request_and_no_word_of_it(served, caplog):
    caplog.set_level(logging.INFO, logger="andromeda")
    answer = served.http.post("/v1/completions", json={**ASKED, "n": 2, "user": "a name"})
    (line,) = lines(caplog)
    assert line["message"] == "request" and line["route"] == "/v1/completions" and line["status"] == 200
    assert line["id"] == answer.headers["x-request-id"]
    usage = answer.json()["usage"]
    assert (line["prompt_tokens"], line["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert sum(line["finish_reasons"].values()) == 2  # type: ignore[attr-defined]
    caplog.clear()
    served.http.post("/v1/completions", json={**ASKED, "secret": 1})
    (line,) = lines(caplog)
    assert (line["status"], line["error"]) == (400, "unknown_parameter")
    assert "sea" not in caplog.text + json.dumps(line)


def test_a_bug_is_logged_with_its_traceback_and_told_without(served, caplog, monkeypatch):
    monkeypatch.setattr(served.state, "check_model", lambda name: 1 / 0)
    answer = served.http.post("/v1/completions", json=ASKED)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error" and "Zero" not in answer.text
    assert any("ZeroDivisionError" in str(line.get("traceback")) for line in lines(caplog))
    assert served.state.texts == 0


def test_an_engine_that_is_no_more_is_no_health(served):
    assert served.http.get("/health").status_code == served.http.get("/ready").status_code == 200
    served.backend.alive = False
    try:
        assert served.http.get("/health").status_code == served.http.get("/ready").status_code == 503
        answer = served.http.post("/v1/completions", json=ASKED)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "failed"
    finally:
        served.backend.alive = True


# ---- metrics ------------------------------------------------------------------------------------------


def values(served: Served) -> dict[str, float]:
    text = served.http.get("/metrics").text
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def test_metrics_count_what_was_done(served):
    served.state.metrics.watch_engine(served.backend.stats)
    before = served.backend.stats().total_new_tokens
    answer = served.http.post("/v1/completions", json={**ASKED, "n": 3, "max_tokens": 5}).json()
    served.http.post("/v1/completions", json={"model": "another"})
    served.http.get("/nowhere")
    found = values(served)
    written = answer["usage"]["completion_tokens"]
    assert found['andromeda_requests_total{route="/v1/completions",status="200"}'] == 1
    assert found['andromeda_requests_total{route="/v1/completions",status="404"}'] == 1
    assert found['andromeda_requests_total{route="none",status="404"}'] == 1, "a path that is made up is no label"
    assert found['andromeda_errors_total{type="invalid_request_error"}'] == 2
    assert found["andromeda_time_to_first_token_seconds_count"] == 1
    assert found["andromeda_time_between_tokens_seconds_count"] == written - 3
    assert found["andromeda_request_seconds_count"] == 1
    ends = sum(value for name, value in found.items() if name.startswith("andromeda_finished_texts_total"))
    assert ends == 3
    assert found["andromeda_engine_new_tokens_total"] == before + written
    assert found["andromeda_engine_running"] == found["andromeda_texts"] == found["andromeda_engine_used_pages"] == 0
    assert found["andromeda_engine_num_pages"] == served.backend.stats().num_pages


def test_two_servers_count_apart(served):
    other = ServerState(NAME, served.state.limits, served.state.service)
    served.http.post("/v1/completions", json=ASKED)
    with TestClient(create_app(other), base_url="http://localhost") as http:
        assert "time_to_first_token_seconds_count 0.0" in http.get("/metrics").text


def test_a_client_that_was_gone_before_any_answer_has_a_status_of_its_own():
    async def says_nothing(*_: Any) -> None:
        """As an answer whose client went away."""

    metrics, scope = Metrics(), {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(says_nothing, None, metrics)(scope, says_nothing, says_nothing))  # type: ignore[arg-type]
    counted = metrics.registry.get_sample_value("andromeda_requests_total", {"route": "none", "status": "499"})
    assert counted == metrics.registry.get_sample_value("andromeda_disconnects_total") == 1
