"""The engine's thread and asyncio: the same texts, and nothing held for those who went away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from andromeda.checkpoint import save_checkpoint
from andromeda.errors import AndromedaError
from andromeda.inference.engine.engine import Engine
from andromeda.inference.engine.loading import load_engine
from andromeda.inference.engine.request import Backend, Request, Update
from andromeda.inference.engine.service import Service
from andromeda.inference.generate import generate
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer
from tests.inference.test_generate import build


def alone(model: Andromeda, request: Request) -> list[int]:
    return list(generate(model, request.ids, max_new_tokens=request.max_new_tokens, seed=request.seed))


async def text_of(service: Service, request: Request) -> tuple[list[int], Update]:
    ids, last = [], None
    async for update in service.stream(request):
        ids += [token.id for token in update.tokens]
        last = update
    assert last is not None and last.finish_reason is not None
    return ids, last


def serve(use: Callable[[Service, Andromeda], Awaitable[None]], **options) -> None:
    """Runs `use`, and sees that the thread ends and nothing is left."""

    async def main() -> None:
        model = build()
        service = Service(Engine(model, **({"num_pages": 20} | options)))
        backend: Backend = service
        try:
            await use(service, model)
        finally:
            await backend.close()
        assert not service._thread.is_alive()
        stats = service.stats()
        assert (stats.running, stats.waiting, stats.used_pages) == (0, 0, 0)

    asyncio.run(asyncio.wait_for(main(), 120))


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.005)


def test_many_streams_at_once_have_the_texts_of_each_alone():
    async def use(service, model):
        requests = [Request([n, 1], 15, seed=n) for n in range(12)]
        got = await asyncio.gather(*(text_of(service, request) for request in requests))
        assert [ids for ids, _ in got] == [alone(model, request) for request in requests]
        assert {last.finish_reason for _, last in got} == {"length"}
        assert service.stats().total_new_tokens == 12 * 15

    serve(use, max_running=4)


def test_a_stream_that_is_given_up_frees_its_pages_at_once():
    async def use(service, model):
        stream = service.stream(Request([1] * 100, 1000, seed=1))
        await anext(stream)
        assert service.stats().used_pages > 0
        await stream.aclose()
        await until(lambda: service.stats().used_pages == 0)
        assert service.stats().running == 0 and service.stats().total_new_tokens < 900

    serve(use)


def test_a_task_that_is_cancelled_frees_its_pages_and_those_who_wait_are_let_in():
    async def use(service, model):
        long = asyncio.create_task(text_of(service, Request([1] * 100, 1000, seed=1)))
        await until(lambda: service.stats().running == 1)
        waiting = asyncio.create_task(text_of(service, Request([2], 5, seed=2)))
        await until(lambda: service.stats().waiting == 1)
        long.cancel()
        ids, _ = await waiting
        assert ids == alone(model, Request([2], 5, seed=2))

    serve(use, max_running=1)


def test_what_is_open_when_it_closes_ends_with_an_error_and_no_more_is_taken():
    async def use(service, model):
        open_ = asyncio.create_task(text_of(service, Request([1], 1000, seed=1)))
        await until(lambda: service.stats().running == 1)
        await service.close()
        _, last = await open_
        assert last.finish_reason == "error" and "closed before the text ended" in (last.error or "")
        with pytest.raises(AndromedaError, match="takes no requests"):
            await anext(service.stream(Request([1], 5)))

    serve(use)


def test_a_request_that_cannot_be_answered_is_refused_before_it_is_asked():
    async def use(service, model):
        for refused in (service.check, lambda request: anext(service.stream(request))):
            with pytest.raises(AndromedaError, match="prompt is empty"):
                await refused(Request([], 5))

    serve(use)


def test_a_request_that_cannot_be_taken_ends_itself_alone(monkeypatch):
    async def use(service, model):
        going_on = asyncio.create_task(text_of(service, Request([1], 200, seed=1)))
        await until(lambda: service.stats().running == 1)

        def no_memory(*_):
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr("andromeda.inference.engine.engine.Draws", no_memory)
            _, last = await text_of(service, Request([2], 5))
        assert last.error == "engine: the request could not be taken: MemoryError"
        ids, _ = await going_on
        assert ids == alone(model, Request([1], 200, seed=1)) and service.alive

    serve(use)


def test_an_engine_that_breaks_leaves_nobody_waiting(monkeypatch):
    async def use(service, model):
        def broken():
            raise RuntimeError("a bug")

        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        monkeypatch.setattr(service._engine._scheduler, "plan", broken)
        _, last = await text_of(service, Request([1], 5))
        assert last.finish_reason == "error"
        with pytest.raises(AndromedaError, match="takes no requests"):
            await anext(service.stream(Request([1], 5)))

    serve(use)


def test_two_event_loops_may_ask_one_engine():
    model = build()
    service, texts = Service(Engine(model, num_pages=20)), {}

    def client(seed):
        texts[seed] = asyncio.run(text_of(service, Request([seed], 9, seed=seed)))[0]

    threads = [threading.Thread(target=client, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    asyncio.run(service.close())
    assert texts == {seed: alone(model, Request([seed], 9, seed=seed)) for seed in (1, 2)}


def test_an_engine_is_loaded_with_its_tokenizer(tmp_path):
    tokenizer = Tokenizer.train(["The sea, the sea!\n" * 3], vocab_size=275)
    model = build(num_tokens=tokenizer.vocab_size + 9)
    save_checkpoint(tmp_path / "model", model, files=tokenizer.save)
    engine, loaded = load_engine(tmp_path / "model", num_pages=9)
    assert loaded.encode("The sea") == tokenizer.encode("The sea")
    assert engine.vocab_size == tokenizer.vocab_size and engine.stats().num_pages == 8
    engine.add(Request([1, 2], 40, seed=1))
    ids = []
    while engine.busy:
        ids += [token.id for _, update in engine.step() for token in update.tokens]
    engine.close()
    assert ids == list(generate(model, [1, 2], max_new_tokens=40, seed=1, vocab_size=tokenizer.vocab_size))
