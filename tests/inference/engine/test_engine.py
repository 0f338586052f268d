"""The engine writes what plain `generate` writes, one request at a time: whatever else runs, and however it is run."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from andromeda.config import preset
from andromeda.errors import AndromedaError
from andromeda.inference.engine.blocks import PAGE
from andromeda.inference.engine.engine import Engine
from andromeda.inference.engine.request import Request, Stats, Token, Update
from andromeda.inference.generate import generate
from andromeda.inference.grammar import Grammars
from andromeda.inference.sampling import GREEDY, Sampling
from andromeda.kernels.cpu.library import without_library
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer
from tests.inference.test_generate import CONFIGS, build

SAMPLINGS = [
    GREEDY,
    Sampling(temperature=0.8, top_p=0.9),
    Sampling(temperature=1.2, top_k=20, min_p=0.01, repetition_penalty=1.2),
    Sampling(frequency_penalty=0.7, presence_penalty=-0.3, logit_bias={3: 2.0, 5: -100.0}),
    replace(GREEDY, frequency_penalty=1.5, repetition_penalty=1.1),
]


def alone(model: Andromeda, request: Request) -> list[int]:
    """What `generate` writes."""
    stream = generate(
        model, request.ids, max_new_tokens=request.max_new_tokens, sampling=request.sampling,
        stop_ids=request.stop_ids, seed=request.seed,
    )  # fmt: skip
    return list(stream)


@dataclass
class Run:
    """Requests at an engine, and what has come of them."""

    engine: Engine
    requests: dict[int, Request] = field(default_factory=dict)
    texts: dict[int, list[Token]] = field(default_factory=dict)
    last: dict[int, Update] = field(default_factory=dict)

    def add(self, request: Request) -> int:
        number = self.engine.add(request)
        self.requests[number], self.texts[number] = request, []
        return number

    def step(self) -> None:
        for number, update in self.engine.step():
            assert number not in self.last
            self.texts[number] += update.tokens
            if update.finish_reason is not None:
                self.last[number] = update

    def finish(self) -> None:
        while self.engine.busy:
            self.step()
        self.engine.close()

    def ids(self, number: int) -> list[int]:
        return [token.id for token in self.texts[number]]


def written(engine: Engine, *requests: Request) -> list[list[int]]:
    """All at once."""
    run = Run(engine)
    for request in requests:
        run.add(request)
    run.finish()
    return [run.ids(number) for number in run.requests]


def some_request(rng: random.Random, before: list[Request], longest: int, most: int, num_tokens: int) -> Request:
    """A prompt of one to `longest` tokens, and one to `most` new ones."""
    ids = [rng.randrange(num_tokens) for _ in range(rng.choice([1, 2, PAGE, PAGE + 1, rng.randint(1, longest)]))]
    if before and rng.random() < 0.4:  # as an earlier one begins, so that the cache has something
        ids = (list(rng.choice(before).ids) + ids)[:longest]
    stop_ids = frozenset({rng.randrange(num_tokens)} if rng.random() < 0.5 else ())
    return Request(ids, rng.choice([1, 5, 20, most]), rng.choice(SAMPLINGS), stop_ids, rng.randrange(2**40))


WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "no speculation": {"speculate": 0},
    "no prefix cache": {"prefix_cache": False},
    "small steps": {"step_tokens": 12},
    "static tensors, no speculation": {"static": True, "speculate": 0},
    "static tensors, preemption": {"static": True, "num_pages": 7, "max_running": 5},
    "preemption": {"num_pages": 7},
    "preemption, small steps, no speculation": {"num_pages": 7, "step_tokens": 12, "speculate": 0},
}


@dataclass(frozen=True)
class Case:
    """Requests, when they come (steps before the next), and what `generate` writes for each."""

    model: Andromeda
    requests: list[Request]
    pauses: list[int]
    texts: list[list[int]]

    @classmethod
    def random(
        cls, model: Andromeda, seed: int, count: int, longest: int, most: int, sampling: Sampling | None = None
    ) -> Case:
        rng, requests = random.Random(seed), list[Request]()
        for _ in range(count):
            request = some_request(rng, requests, longest, most, model.config.num_tokens)
            requests.append(replace(request, sampling=sampling or request.sampling))
        texts = [alone(model, request) for request in requests]
        return cls(model, requests, [rng.randrange(5) for _ in requests], texts)

    def check(self, **way: Any) -> Stats:
        """The engine writes the same; returns its statistics."""
        run = Run(Engine(self.model, **({"max_running": 4, "num_pages": 40} | way)))
        for request, pause in zip(self.requests, self.pauses, strict=True):
            run.add(request)
            for _ in range(pause):
                run.step()
        run.finish()
        assert [run.ids(number) for number in run.requests] == self.texts
        for number, request in run.requests.items():
            stopped = run.ids(number)[-1] in request.stop_ids
            assert run.last[number].finish_reason == ("stop" if stopped else "length")
        stats = run.engine.stats()
        assert (stats.running, stats.waiting, stats.used_pages) == (0, 0, 0)
        assert stats.total_new_tokens == sum(map(len, self.texts))
        assert stats.total_prompt_tokens == sum(len(request.ids) for request in self.requests)
        assert stats.total_cached_tokens == sum(update.cached_tokens for update in run.last.values())
        return stats


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_writes_what_it_writes_alone(name):
    longest = 60 if name == "absolute positions" else 150
    Case.random(build(**CONFIGS[name]), 1, 6, longest, 140).check(num_pages=7, step_tokens=50)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.random(build(shift_tokens=2), 7, 12, 150, 140)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_writes_what_is_written_alone(case, way):
    stats = case.check(**WAYS[way])
    assert (stats.total_cached_tokens > 0) == ("no prefix cache" not in way)
    assert (stats.total_accepted_tokens > 0) == ("no speculation" not in way)
    assert (stats.total_preemptions > 0) == ("preemption" in way)


def test_without_the_kernels_in_cpp_the_same_is_written(case):
    with without_library():
        case.check()


@pytest.fixture(scope="module")
def many() -> Case:
    """Greedy: 8,000 draws in float32 come upon a probability that rounding moves across a filter's edge."""
    torch.manual_seed(0)
    return Case.random(Andromeda(preset("nano")).eval(), 1, 200, 3000, 300, GREEDY)


ON = {"speculate": 15, "prefix_cache": True, "num_pages": 60, "step_tokens": 100}  # 59 pages: they preempt each other
OFF = {"speculate": 0, "prefix_cache": False, "num_pages": 6000, "step_tokens": 4000}  # no prompt is cut


@pytest.mark.slow
@pytest.mark.parametrize("off", [(), *((one,) for one in ON), tuple(ON)])
def test_200_prompts_at_random_times(many, off):
    """Prompts of 1 to 3,000 tokens, with each of it on, each off alone, and all off."""
    stats = many.check(max_running=16, **(ON | {name: OFF[name] for name in off}))
    assert (stats.total_preemptions > 0) == ("num_pages" not in off)
    assert (stats.total_cached_tokens > 0) == ("prefix_cache" not in off)
    assert (stats.total_accepted_tokens > 0) == ("speculate" not in off)


# ---- chance ----------------------------------------------------------------------------------------


def test_a_seed_writes_the_same_whatever_else_runs():
    model, request = build(), Request([1, 2, 3], 20, Sampling(temperature=1.5), seed=5)
    others = [Request([4] * n, 25, Sampling(temperature=0.9), seed=n) for n in range(1, 5)]
    text = written(Engine(model, num_pages=20), request)[0]
    assert text == written(Engine(model, num_pages=20), *others, request)[-1] == alone(model, request)


def test_without_a_seed_texts_differ():
    model, request = build(), Request([1, 2, 3], 20)
    assert len({tuple(text) for text in written(Engine(model, num_pages=20), *[request] * 4)}) == 4


def test_the_number_of_samples_changes_no_text():
    """Samples of one prompt share its pages."""
    model, prompt = build(), [7] * (2 * PAGE + 3)
    run = Run(Engine(model, num_pages=40))
    for seed in range(6):
        run.add(Request(prompt, 12, seed=seed))
    run.finish()
    assert all(run.ids(number) == alone(model, request) for number, request in run.requests.items())
    assert run.engine.stats().total_cached_tokens == 5 * 2 * PAGE


FEW_TOKENS = {1: 100.0, 2: 100.0, 3: 100.0, 4: 98.5}  # biases under which a text soon repeats itself


@pytest.mark.parametrize("stop_ids", [frozenset(), frozenset({4})])
@pytest.mark.parametrize("penalty", [0.0, 0.4])
def test_drafts_that_were_drawn_change_no_text(penalty, stop_ids):
    """Many are right, several in a row, with a stop among them and with penalties that they add to."""
    model = build()
    sampling = Sampling(frequency_penalty=penalty, presence_penalty=-penalty, logit_bias=FEW_TOKENS)
    requests = [Request([1, 2, 3, 4] * 5, 40, sampling, stop_ids, seed) for seed in range(12)]
    engine = Engine(model, num_pages=40)
    assert written(engine, *requests) == [alone(model, request) for request in requests]
    assert engine.stats().total_accepted_tokens > (0 if stop_ids else 20)


# ---- what comes with tokens -----------------------------------------------------------------------


def test_logprobs_are_those_of_the_models_own_distribution():
    model = build(torch.float64)
    sampling = Sampling(temperature=1.5, presence_penalty=1.0, logit_bias=FEW_TOKENS)
    request = Request([1, 2, 3, 4] * 5, 40, sampling, seed=1, top_logprobs=3)
    for speculate in (0, 4):
        run = Run(Engine(model, num_pages=20, speculate=speculate))
        number = run.add(request)
        run.finish()
        ids = run.ids(number)
        assert (run.engine.stats().total_accepted_tokens > 0) == (speculate > 0)
        with torch.no_grad():
            logprobs = model(torch.tensor([[*request.ids, *ids]]))[0, 19:-1].float().log_softmax(-1)
        for token, row in zip(run.texts[number], logprobs, strict=True):
            assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-5)
            best = row.topk(3)
            assert [best_id for best_id, _ in token.top] == best.indices.tolist()
            assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_no_logprobs_unless_asked_for_and_none_of_others_if_0():
    run = Run(Engine(build(), num_pages=20))
    plain, own = run.add(Request([1], 3)), run.add(Request([1], 3, top_logprobs=0))
    run.finish()
    assert {(token.logprob, token.top) for token in run.texts[plain]} == {(None, ())}
    assert all(token.logprob is not None and token.top == () for token in run.texts[own])


def test_a_prefix_that_is_there_is_not_read_again(monkeypatch):
    model, read = build(), []
    engine = Engine(model, num_pages=20)
    hidden = model.hidden

    def watched(ids: torch.Tensor, **rest: Any) -> torch.Tensor:
        read.append(ids.shape[1])
        return hidden(ids, **rest)

    monkeypatch.setattr(model, "hidden", watched)
    run, prompt = Run(engine), list(range(60)) * 3
    run.add(Request(prompt, 1))
    while engine.busy:
        run.step()
    second = run.add(Request(prompt, 1))
    run.finish()
    assert read == [180, 180 - 2 * PAGE] and run.last[second].cached_tokens == 2 * PAGE


# ---- what constraints allow ------------------------------------------------------------------------


class Counting:
    """A constraint under which each token is one more than the one before it, or (where `free`) two more."""

    def __init__(self, first: int, free: bool, force: bool) -> None:
        self.next, self.free, self.force = [first], free, force
        self.moves: list[tuple[str, Any]] = []

    def _allowed(self) -> list[int]:
        return [self.next[-1] % 61, (self.next[-1] + 1) % 61] if self.free else [self.next[-1] % 61]

    def fill_mask(self, row) -> None:
        row[:] = 0
        for token in self._allowed():
            row.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    def advance(self, tokens) -> int:
        for moved, token in enumerate(tokens):
            if token not in self._allowed():
                return moved
            self.next.append(token + 1)
        return len(tokens)

    def rollback(self, tokens: int) -> None:
        if tokens:
            del self.next[-tokens:]

    def forced(self) -> list[int]:
        return [(self.next[-1] + i) % 61 for i in range(5)] if self.force and not self.free else []


@pytest.mark.parametrize("speculate", [0, 6])
@pytest.mark.parametrize("force", [False, True])
def test_a_constraint_is_kept_to_beside_texts_without(speculate, force):
    model, run = build(), Run(Engine(build(), num_pages=40, speculate=speculate))
    strict = run.add(Request([1], 70, Sampling(temperature=2.0), seed=1, constraint=Counting(9, False, force)))
    plain = run.add(Request([1], 30, Sampling(temperature=2.0), seed=2))
    loose = run.add(Request([1], 30, Sampling(temperature=2.0), seed=3, constraint=Counting(9, True, force)))
    run.finish()
    assert run.ids(strict) == [(9 + i) % 61 for i in range(70)]
    assert run.ids(plain) == alone(model, run.requests[plain])
    steps = {(b - a) % 61 for a, b in zip(run.ids(loose), run.ids(loose)[1:], strict=False)}
    assert steps == {1, 2}
    if speculate and force:
        assert run.engine.stats().total_accepted_tokens >= 50


def test_a_constrained_text_is_the_same_with_drafts():
    texts = []
    for speculate in (0, 8):
        request = Request([1, 2], 60, Sampling(temperature=2.0), seed=3, constraint=Counting(9, True, True))
        texts += written(Engine(build(), num_pages=20, speculate=speculate), request)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("speculate", [0, 6])
def test_a_constraint_that_fails_ends_its_text_alone(speculate):
    class Broken(Counting):
        def fill_mask(self, row):
            if len(self.next) > 3:
                raise ValueError("no more\nof this")
            super().fill_mask(row)

        def forced(self):
            raise ValueError("no more of this either")

    class Empty(Counting):
        def fill_mask(self, row):
            super().fill_mask(row)
            if len(self.next) > 3:
                row[:] = 0

    class Fickle(Counting):
        def advance(self, tokens):
            return min(2, super().advance(tokens)) if len(self.next) < 4 else 0

    model, run = build(), Run(Engine(build(), num_pages=20, speculate=speculate))
    wrong = {
        run.add(Request([1], 20, constraint=kind(5, False, False))): message
        for kind, message in (
            (Broken, "engine: ValueError: no more"),
            (Empty, "the constraint allows no token any more"),
            (Fickle, "engine: the constraint takes back token 8, which it allowed"),
        )
    }
    good = run.add(Request([1], 20, seed=1))
    run.finish()
    for number, message in wrong.items():
        assert run.ids(number) == [5, 6, 7] and run.last[number].finish_reason == "error"
        assert message in (run.last[number].error or "")
    assert run.ids(good) == alone(model, run.requests[good])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_is_kept_to_and_drafts_change_no_text(temperature):
    pytest.importorskip("llguidance")
    tokenizer = Tokenizer.train([json.dumps({"name": "sea", "kind": ["calm", "wild"]}) * 3], vocab_size=290)
    schema = {
        "type": "object",
        "properties": {
            "name": {"enum": ["the sea", "the moon"]},
            "kind": {"type": "array", "items": {"enum": [1, 23]}},
        },
        "required": ["name", "kind"],
        "additionalProperties": False,
    }
    grammar, model, texts = Grammars(tokenizer).json_schema(schema), build(num_tokens=tokenizer.vocab_size + 30), []
    for speculate in (0, 12):
        engine = Engine(model, vocab_size=tokenizer.vocab_size, num_pages=40, speculate=speculate)
        sampling, stops = Sampling(temperature=temperature), frozenset(tokenizer.stop_ids)
        requests = [Request([1, 2], 150, sampling, stops, seed, constraint=grammar.constraint()) for seed in range(4)]
        texts.append(written(engine, *requests))
        assert (engine.stats().total_accepted_tokens > 0) == (speculate > 0)
    assert texts[0] == texts[1]
    finished = [ids[:-1] for ids in texts[0] if ids[-1] in tokenizer.stop_ids]
    assert finished or temperature == 0
    for ids in finished:
        answer = json.loads(tokenizer.decode(ids))
        assert answer["name"] in ("the sea", "the moon") and set(answer["kind"]) <= {1, 23}


# ---- ends ------------------------------------------------------------------------------------------


def test_aborts_at_random_moments_leak_nothing_and_change_no_other_text(case):
    rng = random.Random(3)
    run, expected = Run(Engine(case.model, max_running=4, num_pages=6, step_tokens=20)), {}
    for request, text, pause in zip(case.requests, case.texts, case.pauses, strict=True):
        expected[run.add(request)] = text
        for _ in range(2 * pause):
            run.step()
        if rng.random() < 0.3:
            run.engine.abort(rng.choice(list(run.requests)))
    run.finish()
    stats, ended = run.engine.stats(), set(run.last)
    assert stats.used_pages == 0 and 0 < len(ended) < len(expected)
    for number, text in expected.items():
        assert run.ids(number) == (text if number in ended else text[: len(run.ids(number))])


def test_what_fails_in_a_step_ends_those_in_it_and_not_the_engine(monkeypatch):
    model = build()
    run, hidden, calls = Run(Engine(model, num_pages=20, max_running=2)), model.hidden, []

    def failing(*args, **rest):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory\nin many lines")
        return hidden(*args, **rest)

    monkeypatch.setattr(model, "hidden", failing)
    lost = [run.add(Request([n], 9, seed=n)) for n in (1, 2)]
    waiting = run.add(Request([3], 9, seed=3))
    run.finish()
    monkeypatch.undo()
    for number in lost:
        assert run.last[number].error == "engine: RuntimeError: out of memory" and len(run.ids(number)) == 2
    assert run.ids(waiting) == alone(model, run.requests[waiting])
    assert run.engine.stats().used_pages == 0


def test_what_fails_for_one_text_of_a_step_takes_no_last_token_from_another(monkeypatch):
    model = build()
    run = Run(Engine(model, num_pages=20))
    ending, failing = run.add(Request([1], 1, seed=1)), run.add(Request([2], 9, seed=2, top_logprobs=1))
    going_on = run.add(Request([3], 9, seed=3))

    def no_memory(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("andromeda.inference.engine.engine.with_logprobs", no_memory)
    run.finish()
    assert (
        run.last[ending].finish_reason == "length" and run.last[failing].error == "engine: RuntimeError: out of memory"
    )
    assert run.ids(going_on) == alone(model, run.requests[going_on])
    assert run.engine.stats().used_pages == 0


def test_logits_that_are_no_numbers_end_the_text():
    model = build()
    with torch.no_grad():
        next(model.blocks[1].parameters()).view(-1)[0] = torch.nan
    run = Run(Engine(model, num_pages=20))
    number = run.add(Request([1, 2], 5))
    run.finish()
    assert "NaN or infinity" in (run.last[number].error or "")


def test_learned_positions_end_the_text():
    run = Run(Engine(build(use_abs_pos_emb=True, max_seq_len=20), num_pages=20))
    number = run.add(Request([1] * 15, 100))
    run.finish()
    assert len(run.ids(number)) == 6 and run.last[number].finish_reason == "length"


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 5), "prompt is empty"),
        (Request([1, 61], 5), "token id 61 is out of range"),
        (Request([1], 0), "max_new_tokens=0"),
        (Request([1], 5, seed=-1), "seed=-1"),
        (Request([1], 5, top_logprobs=-1), "top_logprobs=-1"),
        (Request([1], 5, Sampling(logit_bias={50: 1.0})), "token id 50, but there are only 50"),
        (Request([1] * 100, 30), "100 tokens and 30 new ones do not fit in the cache, which has room for 129"),
    ],
)
def test_what_could_never_be_answered_is_refused(request_, message):
    engine = Engine(build(), num_pages=3, vocab_size=50)
    with pytest.raises(AndromedaError, match=message):
        engine.check(request_)
    with pytest.raises(AndromedaError, match=message):
        engine.add(request_)


def test_what_just_fits_is_answered():
    model, request = build(), Request([1] * 100, 29, GREEDY)
    assert written(Engine(model, num_pages=3), request) == [alone(model, request)]


def test_prompts_beyond_learned_positions_are_refused():
    engine = Engine(build(use_abs_pos_emb=True, max_seq_len=20), num_pages=20)
    with pytest.raises(AndromedaError, match="21 tokens, but with use_abs_pos_emb=True max_seq_len=20"):
        engine.check(Request([1] * 21, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_running": 0}, "max_running=0"),
        ({"step_tokens": -1}, "step_tokens=-1"),
        ({"speculate": 16}, "speculate=16"),
        ({"num_pages": 1}, "room for 0 pages of 64 tokens"),
        ({"memory_bytes": 1000}, "room for 0 pages"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(AndromedaError, match=message):
        Engine(build(), **options)


def test_memory_is_counted_in_pages():
    model = build()
    pages = Engine(model, num_pages=5)._runner.pages
    assert Engine(model, memory_bytes=pages.nbytes).stats().num_pages == 4
    assert Engine(model, memory_bytes=pages.nbytes - 1).stats().num_pages == 3
    assert Engine(model).stats().num_pages > 100
