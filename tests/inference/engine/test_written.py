"""Blocks in C++: what they compute is what the model computes, and they compute what they can."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from andromeda.inference.engine import written
from andromeda.inference.engine.engine import Engine
from andromeda.inference.engine.request import Request
from andromeda.inference.generate import generate
from andromeda.inference.sampling import GREEDY
from andromeda.kernels.cpu.library import library, without_library
from tests.inference.test_generate import CONFIGS, build, some_ids

pytestmark = pytest.mark.skipif(library() is None, reason="the C++ kernels are not there")

PARALLEL = {name: config for name, config in CONFIGS.items() if config.get("parallel_blocks", True)}
OTHERS: dict[str, dict[str, Any]] = {
    "gelu": {"ff_activation": "gelu"},
    "silu": {"ff_activation": "silu"},
    "shift 2": {"shift_tokens": 2},
}


def watched(engine: Engine) -> list[int]:
    """How many tokens each step has that goes through the blocks in C++."""
    blocks, tokens = engine._runner._writing, list[int]()
    assert blocks is not None

    def run(x: torch.Tensor, *others: Any) -> Any:
        tokens.append(len(x))
        return blocks(x, *others)

    engine._runner._writing = run  # type: ignore[assignment]
    return tokens


@pytest.mark.parametrize("speculate", [0, 8])
@pytest.mark.parametrize("name", PARALLEL | OTHERS)
def test_logprobs_are_the_models(name, speculate):
    """Three texts at a time, beyond a page and the trained length. Greedy ones repeat themselves: drafts are right."""
    model = build(**(PARALLEL | OTHERS)[name])
    engine = Engine(model, num_pages=20, speculate=speculate)
    tokens, texts = watched(engine), {}
    for prompt in (some_ids(n, seed=n)[0].tolist() for n in (1, 30, 60)):
        request = Request(prompt, 30, GREEDY, top_logprobs=61)
        texts[engine.add(request)] = request, list[Any]()
    while engine.busy:
        for number, update in engine.step():
            texts[number][1].extend(update.tokens)
    accepted = engine.stats().total_accepted_tokens
    engine.close()
    assert len(tokens) > 5 and (max(tokens) > 3) == (speculate > 0) == (accepted > 0)
    for request, text in texts.values():
        ids = [*request.ids, *(token.id for token in text)]
        with torch.no_grad():
            exact = model.double()(torch.tensor([ids]))[0, len(request.ids) - 1 : -1].log_softmax(-1)
            model.float()
        got = torch.tensor([[dict(token.top)[i] for i in range(61)] for token in text], dtype=torch.float64)
        torch.testing.assert_close(got, exact, rtol=0, atol=2e-5)


def test_a_page_that_a_small_part_ends_in_is_gone_on_from():
    model, texts = build(shift_tokens=2), dict[int, list[int]]()
    engine = Engine(model, num_pages=9, max_running=1, step_tokens=12)
    tokens, start = watched(engine), some_ids(64)[0].tolist()
    prompts = [[*start, 1, 2, 3, 4, 5, 6], [*start, 7, 8]]
    for prompt in prompts:
        texts[engine.add(Request(prompt, 9, GREEDY))] = []
        while engine.busy:
            for number, update in engine.step():
                texts[number] += [token.id for token in update.tokens]
    assert tokens[:6] == [12, 12, 12, 12, 12, 10] and engine.stats().total_cached_tokens == 64
    engine.close()
    assert list(texts.values()) == [list(generate(model, ids, max_new_tokens=9, sampling=GREEDY)) for ids in prompts]


def test_parts_of_prompts_and_very_many_tokens_go_another_way(monkeypatch):
    monkeypatch.setattr("andromeda.inference.engine.runner.MOST_ROWS", 5)
    engine = Engine(build(), num_pages=40, speculate=0)
    tokens = watched(engine)
    for n in range(6):
        engine.add(Request(some_ids(17, seed=n)[0].tolist(), 3 + n, seed=n))
    while engine.busy:
        engine.step()
    engine.close()
    assert tokens == [5, 4, 3, 2, 1]  # neither the prompts' 102 nor 6


def test_for_whom_they_are(monkeypatch, caplog):
    def has_them(model: Any, **options: Any) -> bool:
        engine = Engine(model, num_pages=9, **options)
        engine.close()
        return engine._runner._writing is not None

    assert has_them(build())
    assert not has_them(build(torch.float64))
    assert not has_them(build(parallel_blocks=False))
    assert not has_them(build(dim_head=6))
    with without_library():
        assert not has_them(build())
    assert not caplog.records
    monkeypatch.setattr(written, "has_room", lambda num_bytes: num_bytes < 1000)
    with caplog.at_level(logging.WARNING):
        assert not has_them(build())
    assert "fit into memory once only" in caplog.text
