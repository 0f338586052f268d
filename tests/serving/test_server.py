"""A real port: clients that go away, dawdle, flood or lie; and an end that loses nothing."""

from __future__ import annotations

import gc
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import openai
import psutil
import pytest

from andromeda.serving.limits import Limits
from andromeda.serving.service import LocalService
from andromeda.serving.state import ServerState
from tests.serving.conftest import NAME, Backend
from tests.serving.port import Port, post, read_all, serving, until

LIMITS = Limits(
    max_context_tokens=4096, max_output_tokens=3000, max_texts=8, request_seconds=30, client_seconds=1.0,
    max_connections=64,
)  # fmt: skip
LONG: dict[str, Any] = {"model": NAME, "prompt": "The sea", "max_tokens": 3000, "logit_bias": {}, "seed": 1}


@dataclass(frozen=True)
class Here:
    port: Port
    backend: Backend

    @property
    def idle(self) -> bool:
        return self.backend.idle and self.port.state.texts == 0

    @property
    def disconnects(self) -> float:
        return self.port.state.metrics.registry.get_sample_value("andromeda_disconnects_total") or 0.0

    def lives(self) -> None:
        """It answers, and nothing is left of what came before."""
        until(lambda: self.idle)
        answer = httpx.post(f"{self.port.url}/v1/completions", json={"model": NAME, "prompt": "a", "max_tokens": 2})
        assert answer.status_code == 200
        until(lambda: self.idle)


@pytest.fixture(scope="module", autouse=True)
def _endless(tokenizer) -> None:
    """A text that does not end by itself."""
    LONG["logit_bias"] = {str(token): -100 for token in tokenizer.stop_ids}


@pytest.fixture(scope="module")
def here(backend, tokenizer) -> Iterator[Here]:
    with serving(ServerState(NAME, LIMITS), LocalService(backend, tokenizer, LIMITS)) as port:
        until(lambda: port.state.service is not None)
        yield Here(port, backend)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error(answer: bytes) -> dict[str, str]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_openai_s_client_over_a_real_port(here):
    client: Any = openai.OpenAI(api_key="none", base_url=f"{here.port.url}/v1", max_retries=0)
    asked = {"model": NAME, "messages": [{"role": "user", "content": "The sea"}], "max_tokens": 20, "seed": 1}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert whole._request_id.startswith("req_")


# ---- clients that go away ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("abruptly", [True, False])
def test_a_client_that_goes_away_frees_its_pages(here, stream, abruptly):
    client = here.port.connect()
    client.sendall(post("/v1/completions", json.dumps({**LONG, "n": 2, "stream": stream}).encode()))
    until(lambda: here.backend.stats().running == 2)
    if abruptly:  # RST in place of FIN
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    before = here.disconnects
    client.close()
    until(lambda: here.idle, seconds=3)
    until(lambda: here.disconnects == before + 1)
    here.lives()


def test_a_client_that_leaves_in_the_middle_of_its_request_is_no_failure(here, caplog):
    before = here.disconnects
    client = here.port.connect()
    client.sendall(HEAD + b"content-length: 99\r\n\r\n{")
    time.sleep(0.3)  # its head is read
    client.close()
    until(lambda: here.disconnects == before + 1)
    here.lives()
    assert "request failed" not in caplog.text


def test_a_client_that_does_not_read_is_cut_off(here):
    client = here.port.connect(receive_buffer=2048)
    client.sendall(post("/v1/chat/completions", json.dumps(
        {"model": NAME, "messages": [{"role": "user", "content": "a"}], "stream": True, "n": 2, "max_tokens": 3000,
         "logprobs": True, "top_logprobs": 20, "logit_bias": LONG["logit_bias"]}
    ).encode()))  # fmt: skip
    until(lambda: here.backend.stats().running == 2)
    started = time.monotonic()
    until(lambda: here.idle, seconds=25)
    assert time.monotonic() - started < 25
    client.close()
    here.lives()


# ---- clients that dawdle -----------------------------------------------------------------------------


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        HEAD,
        HEAD + b"content-length: 99\r\n\r\n{",
        HEAD + b"transfer-encoding: chunked\r\n\r\nfff\r\n{",
    ],
    ids=["nothing", "head", "body", "chunk"],
)
def test_a_request_that_does_not_come_is_given_up(here, begun):
    client = here.port.connect()
    client.sendall(begun)
    ends = time.monotonic() + 10 * LIMITS.client_seconds
    answer = b""
    try:
        while time.monotonic() < ends:  # a byte now and then keeps nothing open
            client.sendall(b" " if b"\r\n\r\n" in begun else b"x" if begun else b"")
            client.settimeout(0.2)
            try:
                piece = client.recv(65536)
            except TimeoutError:
                continue
            if not piece:
                break
            answer += piece
    except OSError:
        pass
    assert time.monotonic() < ends, "it was let dawdle"
    if begun and answer:
        assert status(answer) == 408 and error(answer)["code"] == "request_timeout"
    here.lives()


def test_dawdlers_do_not_keep_others_waiting(here):
    slow = [here.port.connect() for _ in range(40)]
    for client in slow:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: lo")
    started = time.monotonic()
    assert httpx.get(f"{here.port.url}/ready").status_code == 200
    assert time.monotonic() - started < 5
    until(lambda: all(closed(client) for client in slow))


def closed(client: socket.socket) -> bool:
    client.settimeout(0.01)
    try:
        return not client.recv(65536)
    except TimeoutError:
        return False
    except OSError:
        return True


# ---- clients that flood ------------------------------------------------------------------------------


def open_and_drop(port: Port, number: int) -> None:
    for count in range(number):
        with port.connect() as client:
            if count % 3 == 1:
                client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost")
            elif count % 3 == 2:
                client.sendall(post("/v1/completions", json.dumps({**LONG, "stream": True}).encode()))


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_connections_that_are_opened_and_dropped_leave_nothing(here, number):
    here.lives()
    process = psutil.Process()
    open_and_drop(here.port, number // 10)  # what is allocated once and kept
    until(lambda: here.port.state.texts == 0)  # some of them had asked for one
    here.lives()
    gc.collect()
    memory, files = process.memory_info().rss, process.num_fds()
    open_and_drop(here.port, number)
    until(lambda: here.port.state.texts == 0)
    here.lives()
    until(lambda: process.num_fds() <= files + 2)
    gc.collect()
    assert process.memory_info().rss < memory + 40 * 2**20


def test_too_many_connections_are_closed(here):
    clients = [here.port.connect() for _ in range(LIMITS.max_connections)]
    until(lambda: closed(here.port.connect()))
    for client in clients:
        client.close()
    here.lives()


def test_too_many_texts_are_told_to_come_again(here):
    client = here.port.connect()
    client.sendall(post("/v1/completions", json.dumps({**LONG, "n": 8, "stream": True}).encode()))
    until(lambda: here.port.state.texts == 8)
    answer = httpx.post(f"{here.port.url}/v1/completions", json={**LONG, "max_tokens": 1})
    assert answer.status_code == 429 and answer.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    client.close()
    here.lives()


# ---- clients that lie --------------------------------------------------------------------------------


def test_a_large_body_is_refused_before_it_is_read(here):
    head = post("/v1/completions", b"").replace(b"content-length: 0", b"content-length: 104857600")
    answer = here.port.say(head)
    assert status(answer) == 413 and error(answer)["type"] == "invalid_request_error"
    here.lives()


@pytest.mark.parametrize("chunked", [True, False])
def test_a_hundred_megabytes_leave_no_memory_behind(here, chunked):
    process = psutil.Process()
    here.lives()
    memory = process.memory_info().rss
    piece = b"x" * 2**20
    sent = 0
    with here.port.connect() as client:
        if chunked:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                           b"transfer-encoding: chunked\r\n\r\n")  # fmt: skip
        else:
            client.sendall(post("/v1/completions", b"").replace(b"content-length: 0", b"content-length: 104857600"))
        peak = memory
        try:
            for _ in range(100):
                sent += 1
                client.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
                peak = max(peak, process.memory_info().rss)
        except OSError:
            pass
        answer = read_all(client)
    assert not answer or status(answer) == 413
    assert sent < 100 or answer
    assert peak < memory + 30 * 2**20
    here.lives()


NESTED = b"[" * 100_000 + b"]" * 100_000
BODIES: dict[str, bytes] = {
    "nested": NESTED,
    "nested in a tool": b'{"model": "m", "messages": [], "tools": %s}' % NESTED,
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "a lone surrogate": rb'{"model": "nano-verse", "prompt": "\ud800"}',
    "not a number": b'{"model": "nano-verse", "prompt": "a", "temperature": NaN}',
    "infinity": b'{"model": "nano-verse", "prompt": "a", "temperature": 1e999}',
    "a number of 10,000 digits": b'{"model": "nano-verse", "prompt": "a", "seed": %s}' % (b"9" * 10_000),
    "n is 10**9": b'{"model": "nano-verse", "prompt": "a", "n": 1000000000}',
    "cut off": b'{"model": "nano-ver',
    "empty": b"",
    "a list": b"[1, 2]",
    "a million wrong messages": b'{"model": "nano-verse", "messages": [%s]}' % b",".join([b"1"] * 500_000),
    "names of 400,000 letters": b'{"model": "%s", "messages": [{"role": "%s"}]}' % (b"m" * 400_000, b"r" * 400_000),
    "a million ids that are none": b'{"model": "nano-verse", "prompt": [%s]}' % b",".join([b'"a"', *[b"1"] * 50_000]),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_makes_no_sense_is_a_400_at_once(here, case):
    started = time.monotonic()
    for route in ("/v1/completions", "/v1/chat/completions"):
        answer = here.port.say(post(route, BODIES[case]))
        assert status(answer) in (400, 404), answer[:500]
        assert error(answer)["type"] == "invalid_request_error"
        assert len(answer) < 2000
    assert time.monotonic() - started < 5
    here.lives()


def bomb(levels: int) -> dict[str, object]:
    """Each level refers ten times to the one below."""
    definitions: dict[str, object] = {"level0": {"type": "string", "minLength": 1000, "maxLength": 100000}}
    for level in range(1, levels):
        definitions[f"level{level}"] = {
            "type": "object",
            "properties": {f"p{number}": {"$ref": f"#/$defs/level{level - 1}"} for number in range(10)},
            "required": [f"p{number}" for number in range(10)],
        }
    return {"$defs": definitions, "$ref": f"#/$defs/level{levels - 1}"}


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


SCHEMAS: dict[str, dict[str, object]] = {
    "references upon references": bomb(30),
    "a loop of references": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "nested": nested(150),
    "a billion items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "a huge enumeration": {"enum": [f"value {number}" for number in range(20_000)]},
    "a pattern that explodes": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    "thousands of choices": {"anyOf": [{"type": "object", "properties": {f"p{n}": {}}} for n in range(5000)]},
    "a reference to elsewhere": {"$ref": "http://localhost:1/schema.json"},
}


@pytest.mark.parametrize("case", SCHEMAS)
def test_a_schema_that_is_a_bomb_does_not_go_off(here, case):
    """Refused, or kept to; in either case soon, while others are answered."""
    schema = SCHEMAS[case]
    form = {"type": "json_schema", "json_schema": {"name": "bomb", "schema": schema}}
    tool = {
        "type": "function",
        "function": {"name": "bomb", "parameters": {"type": "object", "properties": {"a": schema}}},
    }
    message = [{"role": "user", "content": "a"}]
    for asked in ({"response_format": form}, {"tools": [tool], "tool_choice": "required"}):
        started = time.monotonic()
        body = {"model": NAME, "messages": message, "max_tokens": 3, **asked}
        answer = httpx.post(f"{here.port.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code in (200, 400), answer.text
        assert answer.status_code == 400 or case not in ("a loop of references", "a reference to elsewhere")
        assert time.monotonic() - started < 20
    here.lives()


def test_what_is_no_http_is_refused(here):
    for nonsense in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
        b"GET /\r\n\r\n",
        b"x" * 100_000 + b"\r\n\r\n",
    ):
        answer = here.port.say(nonsense)
        assert status(answer) == 400 and error(answer)["type"] == "invalid_request_error"
    for head in (b"x: " + b"y" * 2_000_000, b"\r\n".join(b"x%d: y" % number for number in range(200_000))):
        answer = here.port.say(b"GET /ready HTTP/1.1\r\nhost: localhost\r\n" + head + b"\r\n\r\n")
        assert not answer or status(answer) == 400
    here.lives()


# ---- the end -----------------------------------------------------------------------------------------


def test_draining_ends_what_is_begun_and_takes_nothing_new(backend, tokenizer):
    limits = replace(LIMITS, request_seconds=60)
    state = ServerState(NAME, limits)
    found: list[bytes] = []
    with serving(state) as port:
        assert httpx.get(f"{port.url}/ready").status_code == 503, "no model yet"
        refused = httpx.post(f"{port.url}/v1/completions", json=LONG)
        assert (
            refused.status_code == 503
            and refused.json()["error"]["code"] == "starting"
            and refused.headers["retry-after"]
        )
        state.service = LocalService(backend, tokenizer, limits)
        assert httpx.get(f"{port.url}/ready").status_code == 200
        body = json.dumps({**LONG, "max_tokens": 1500, "stream": True}).encode()
        reader = threading.Thread(target=lambda: found.append(port.say(post("/v1/completions", body))))
        reader.start()
        until(lambda: backend.stats().running == 1)
        state.draining = True
        assert httpx.get(f"{port.url}/ready").status_code == 503
        refused = httpx.post(f"{port.url}/v1/completions", json=LONG)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
        assert httpx.get(f"{port.url}/health").status_code == 200
        reader.join(60)
    assert b"data: [DONE]" in found[0] and found[0].count(b"data: ") > 100
    with pytest.raises(ConnectionRefusedError):
        port.connect()


def test_a_request_has_its_time(backend, tokenizer):
    limits = replace(LIMITS, request_seconds=0.5)
    with serving(ServerState(NAME, limits), LocalService(backend, tokenizer, limits)) as port:
        until(lambda: port.state.service is not None)
        answer = httpx.post(f"{port.url}/v1/completions", json=LONG, timeout=30).json()
        assert answer["choices"][0]["finish_reason"] == "length" and answer["choices"][0]["text"]
        assert 0 < answer["usage"]["completion_tokens"] < 3000
        service = LocalService(backend, tokenizer, replace(limits, request_seconds=1e-9))
        port.state.service = service
        answer = httpx.post(f"{port.url}/v1/completions", json=LONG, timeout=30)
        assert answer.status_code == 503 and answer.headers["retry-after"], "not begun"
        until(lambda: backend.idle)
