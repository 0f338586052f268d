"""Two engines behind one server, by Ray Serve: the same answers, and what dies with a replica is little and is told."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest

from andromeda.checkpoint import save_checkpoint
from andromeda.inference.sampling import Sampling
from andromeda.inference.text import stream_text
from andromeda.model import Andromeda
from andromeda.serving.limits import Limits
from andromeda.serving.state import ServerState
from andromeda.tokenizer import Tokenizer
from tests.serving.conftest import NAME
from tests.serving.port import Port, serving, until

pytestmark = pytest.mark.slow
LIMITS = Limits(max_context_tokens=4096, max_output_tokens=2000, max_texts=64, request_seconds=150)
CLIENTS = 12


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory, model: Andromeda, tokenizer: Tokenizer) -> Iterator[Port]:
    ray = pytest.importorskip("ray")
    from andromeda.serving.replicas import ReplicaService, start_ray

    folder = tmp_path_factory.mktemp("served") / "model"
    save_checkpoint(folder, model, files=tokenizer.save)
    start_ray(2)
    try:
        service = ReplicaService(str(folder), LIMITS, 2)
        service.deploy()
        with serving(ServerState(NAME, LIMITS), service) as port:
            until(lambda: port.state.service is not None)
            yield port
    finally:
        ray.shutdown()


def replicas() -> set[int]:
    """Their process ids."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]
        if command[0].startswith("ray::ServeReplica:andromeda"):
            found.add(process.pid)
    return found


def never_ending(tokenizer: Tokenizer, number: int, tokens: int, stream: bool) -> dict[str, Any]:
    bias = {str(token): -100 for token in tokenizer.stop_ids}
    prompt = f"{number} The sea, the sea! " * 8
    return {"model": NAME, "prompt": prompt, "max_tokens": tokens, "seed": number, "logit_bias": bias, "stream": stream}


def ask(port: Port, body: dict[str, Any]) -> str:
    """How it ended: `whole`, or an error's code."""
    answer = httpx.post(f"{port.url}/v1/completions", json=body, timeout=120)
    if not body["stream"]:
        return "whole" if answer.status_code == 200 else str(answer.json()["error"]["code"])
    events = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: {")]
    if "error" in events[-1]:
        return str(events[-1]["error"]["code"])
    return "whole" if events[-1]["choices"][0]["finish_reason"] == "length" else "cut"


@contextmanager
def load(port: Port, tokenizer: Tokenizer) -> Iterator[Counter[tuple[bool, str]]]:
    """Clients that ask one thing after another; how each of their requests ended, by whether it was a stream."""
    ends: Counter[tuple[bool, str]] = Counter()
    going = threading.Event()
    going.set()

    def run(number: int) -> None:
        stream = number % 2 == 0
        while going.is_set():
            try:
                end = ask(port, never_ending(tokenizer, number, 60, stream))
            except Exception as error:
                end = repr(error)
            ends[stream, end] += 1

    clients = [threading.Thread(target=run, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield ends
    finally:
        going.clear()
        for client in clients:
            client.join(120)


def test_answers_are_those_of_one_engine(port, model, tokenizer):
    for seed in range(4):
        body = {"model": NAME, "prompt": f"The sea {seed}", "seed": seed, "max_tokens": 20}
        answer = httpx.post(f"{port.url}/v1/completions", json=body, timeout=60).json()
        expected = stream_text(model, tokenizer, f"The sea {seed}", sampling=Sampling(), seed=seed, max_new_tokens=20)
        assert answer["choices"][0]["text"] == "".join(expected)
    refused = httpx.post(f"{port.url}/v1/completions", json={"model": NAME, "prompt": [10**6]}, timeout=60)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"


def test_a_prompt_goes_where_its_beginning_was_read(port):
    def cached(number: int, end: str) -> int:
        prompt = f"{number} and the sea, " * 40 + end
        body = {"model": NAME, "prompt": prompt, "max_tokens": 1}
        answer = httpx.post(f"{port.url}/v1/completions", json=body, timeout=60).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    first = [cached(number, "once") for number in range(100, 112)]
    assert all(tokens == 0 for tokens in first)
    assert all(cached(number, "again") >= 64 for number in range(100, 112)), "by chance half of them"


def test_a_client_that_goes_away_frees_its_pages(port, tokenizer):
    from andromeda.serving.replicas import ReplicaService

    service = port.state.service
    assert isinstance(service, ReplicaService)

    def used() -> int:
        """Pages, of whichever replicas are asked."""
        return max(service._handle.stats.remote().result(timeout_s=20).used_pages for _ in range(6))

    with httpx.stream("POST", f"{port.url}/v1/completions", json=never_ending(tokenizer, 1, 2000, True)) as answer:
        lines = answer.iter_lines()
        next(lines)
        until(lambda: used() > 0)
    until(lambda: used() == 0)


def test_a_replica_that_is_killed_takes_nothing_with_it_but_streams_that_had_begun(port, tokenizer):
    before = replicas()
    assert len(before) == 2
    with load(port, tokenizer) as ends:
        until(lambda: ends.total() > 2 * CLIENTS, seconds=150)
        os.kill(min(before), signal.SIGKILL)
        done = ends.total()
        until(lambda: ends.total() > done + 4 * CLIENTS, seconds=200)
    assert set(ends) <= {(True, "whole"), (False, "whole"), (True, "replica_died")}, ends
    assert ends[True, "replica_died"] <= CLIENTS // 2
    assert ends[True, "whole"] > CLIENTS and ends[False, "whole"] > CLIENTS
    until(lambda: len(replicas() - {min(before)}) == 2, seconds=200)


def test_replicas_are_renewed_one_after_the_other_and_nobody_notices(port, tokenizer):
    from andromeda.serving.replicas import ReplicaService

    before = replicas()
    assert isinstance(port.state.service, ReplicaService)
    with load(port, tokenizer) as ends:
        until(lambda: ends.total() > CLIENTS, seconds=150)
        port.state.service.deploy()
        done = ends.total()
        until(lambda: ends.total() > done + CLIENTS, seconds=150)
    assert set(ends) == {(True, "whole"), (False, "whole")}, ends
    until(lambda: not before & replicas(), seconds=150)
    time.sleep(1)
    assert len(replicas()) == 2
