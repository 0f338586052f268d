"""A small random model in the engine, behind the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from openai import OpenAI

from andromeda.config import AndromedaConfig
from andromeda.inference.engine.engine import Engine
from andromeda.inference.engine.request import Request, Stats, Update
from andromeda.inference.engine.service import Service as EngineService
from andromeda.model import Andromeda
from andromeda.serving.app import create_app
from andromeda.serving.limits import Limits
from andromeda.serving.service import LocalService
from andromeda.serving.state import ServerState
from andromeda.tokenizer import Tokenizer

SENTENCES = ["The sea, the sea! Zoë said: 日本語 🙂 and user assistant system\n", '{"name": "sea", "arguments": {}}\n']
NAME = "nano-verse"


class Backend:
    """The engine, which can be told to fail.

    Attributes:
        fails_after: so many updates, of whichever request, it fails once; None: it does not.
        alive: as it is said to be.
    """

    def __init__(self, engine: EngineService) -> None:
        self.check, self._engine = engine.check, engine
        self.fails_after: int | None = None
        self.alive = True

    async def stream(self, request: Request) -> AsyncIterator[Update]:
        updates: Any = self._engine.stream(request)
        try:
            async for update in updates:
                self._fail_in_time()
                yield update
        finally:
            await updates.aclose()

    def _fail_in_time(self) -> None:
        if self.fails_after is None:
            return
        if self.fails_after == 0:
            self.fails_after = None
            raise RuntimeError("a page is gone")
        self.fails_after -= 1

    async def close(self) -> None:
        """Other servers use the engine yet."""

    def stats(self) -> Stats:
        return self._engine.stats()

    @property
    def idle(self) -> bool:
        stats = self.stats()
        return stats.running == stats.waiting == stats.used_pages == 0


@dataclass(frozen=True)
class Served:
    """A server in this process.

    Attributes:
        client: OpenAI's own.
        http: plain requests.
    """

    client: Any
    http: TestClient
    state: ServerState
    backend: Backend
    tokenizer: Tokenizer
    model: Andromeda


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a model is slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([sentence * 3 for sentence in SENTENCES], vocab_size=320)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Andromeda:
    torch.manual_seed(5)
    config = AndromedaConfig(
        num_tokens=tokenizer.vocab_size, max_seq_len=64, dim=16, depth=2, dim_head=8, heads=2, alibi_num_heads=1
    )  # fmt: skip
    model = Andromeda(config).eval()
    with torch.no_grad():
        model.output_weight.mul_(30)  # far from uniform, so that greedy choices are no accident of rounding
    return model


@pytest.fixture(scope="session")
def backend(model: Andromeda, tokenizer: Tokenizer) -> Iterator[Backend]:
    engine = EngineService(Engine(model, vocab_size=tokenizer.vocab_size, num_pages=1024, max_running=16))
    yield Backend(engine)
    asyncio.run(engine.close())


@pytest.fixture
def served(backend: Backend, model: Andromeda, tokenizer: Tokenizer) -> Iterator[Served]:
    limits = Limits(max_context_tokens=1024, max_output_tokens=128, max_texts=8, request_seconds=30)
    state = ServerState(NAME, limits, LocalService(backend, tokenizer, limits))
    with TestClient(create_app(state), base_url="http://localhost") as http:
        client = OpenAI(api_key="none", base_url="http://localhost/v1", http_client=http, max_retries=0)
        yield Served(client, http, state, backend, tokenizer, model)
