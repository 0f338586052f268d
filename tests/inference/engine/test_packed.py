"""Packed blocks are the model's, in fewer products; so are steps over static tensors, and CUDA graphs of them."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from andromeda.config import preset
from andromeda.errors import AndromedaError
from andromeda.inference.engine.engine import Engine
from andromeda.inference.engine.packed import can_pack, normalise, pack
from andromeda.inference.engine.request import Request
from andromeda.inference.generate import generate
from andromeda.inference.sampling import GREEDY, Sampling
from andromeda.model import Andromeda
from tests.inference.test_generate import CONFIGS, build, some_ids


def test_packing_leaves_the_model_as_it_is_and_holds_nothing_twice():
    model = build()
    plain, ids = copy.deepcopy(model), some_ids(40)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    blocks = pack(model)
    assert blocks is not None and len(blocks) == len(model.blocks)
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name])
    torch.testing.assert_close(model(ids), plain(ids))
    for block, packed in zip(model.blocks, blocks, strict=True):
        for linear in (block.attention.to_qkv, block.feed_forward.up):
            assert linear.weight.untyped_storage().data_ptr() == packed.way_in.untyped_storage().data_ptr()
        for linear in (block.attention.to_out, block.feed_forward.down):
            assert linear.weight.untyped_storage().data_ptr() == packed.way_out.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_can_be_packed(name):
    assert can_pack(build(**CONFIGS[name])) == CONFIGS[name].get("parallel_blocks", True)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_activations_and_types(activation, dtype):
    """In bfloat16 log-probabilities are near, as sums are rounded otherwise."""
    model, prompt = build(dtype, ff_activation=activation), some_ids(50)[0].tolist()
    engine = Engine(model, num_pages=9)
    engine.add(Request(prompt, 1, GREEDY, top_logprobs=61))
    ((_, update),) = engine.step()
    engine.close()
    with torch.no_grad():
        expected = model(torch.tensor([prompt]))[0, -1].float().log_softmax(-1)
    got = dict(update.tokens[0].top)
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-6
    assert [got[token] for token in range(61)] == pytest.approx(expected.tolist(), abs=tolerance)


@pytest.mark.slow
def test_what_is_compiled_writes_the_same():
    model, prompt = build(), some_ids(90)[0].tolist()
    engine = Engine(model, num_pages=9, compile=True)
    engine.add(Request(prompt, 30, GREEDY))
    ids = [token.id for _ in range(30) for _, update in engine.step() for token in update.tokens]
    engine.close()
    blocks = engine._runner._blocks
    assert blocks is not None and blocks[0].normalise is blocks[1].normalise is not normalise
    assert ids == list(generate(model, prompt, max_new_tokens=30, sampling=GREEDY))


def test_eight_bits_move_no_weight_by_more_than_half_a_step_and_logits_by_little():
    torch.manual_seed(0)
    model = Andromeda(preset("nano", depth=2)).eval()
    plain, prompt = copy.deepcopy(model), some_ids(50)[0].tolist()
    engine = Engine(model, num_pages=9, quantize="int8")
    weights, quantised = dict(plain.named_parameters()), 0
    for name, weight in model.named_parameters():
        if "norm" in name or "gain" in name or name.startswith("embedding"):
            assert weight.equal(weights[name])
            continue
        quantised += 1
        step = weights[name].abs().amax(1, keepdim=True) / 127
        moved = (weight.dequantize() - weights[name]).abs()
        assert moved.any() and (moved <= step / 2 + 1e-7).all()
    assert quantised == 2 * 4 + 1
    with torch.no_grad():
        logits, expected = (x(torch.tensor([prompt])) for x in (model, plain))
    assert 0 < (logits - expected).norm() / expected.norm() < 0.02
    number = engine.add(Request(prompt, 20, seed=1))
    ids = [token.id for _ in range(40) for _, update in engine.step() for token in update.tokens]
    engine.close()
    assert number == 1 and ids == list(generate(model, prompt, max_new_tokens=20, seed=1))


def test_other_numbers_of_bits_are_refused():
    with pytest.raises(AndromedaError, match="quantize='int3' must be one of int8"):
        Engine(build(), quantize="int3")


@pytest.mark.gpu
@pytest.mark.parametrize("speculate", [0, 4])
def test_cuda_graphs_write_the_same(speculate):
    """As steps without graphs, while texts come and go. In bfloat16 other numbers of rows are rounded otherwise."""
    torch.manual_seed(0)
    model, rng = Andromeda(preset("nano")).to("cuda", torch.bfloat16).eval(), random.Random(0)
    requests = [
        Request([rng.randrange(2048) for _ in range(rng.randint(1, 300))], rng.randint(1, 80), sampling, seed=seed)
        for seed, sampling in enumerate([GREEDY, Sampling(), Sampling(temperature=0.7, top_p=0.9)] * 4)
    ]
    texts = []
    for static in (True, False):
        engine, texts_now = Engine(model, max_running=6, num_pages=80, speculate=speculate, static=static), {}
        assert (engine._runner._static is not None) == static
        for request in requests:
            texts_now[engine.add(request)] = list[int]()
            for number, update in engine.step():
                texts_now[number] += [token.id for token in update.tokens]
        while engine.busy:
            for number, update in engine.step():
                texts_now[number] += [token.id for token in update.tokens]
        engine.close()
        texts.append(list(texts_now.values()))
    assert [len(text) for text in texts[0]] == [request.max_new_tokens for request in requests]
    same = sum(a == b for a, b in zip(*texts, strict=True))
    assert same >= 9  # of 12


@pytest.mark.gpu
def test_an_engine_on_a_gpu_writes_what_generate_writes():
    torch.manual_seed(0)
    model = Andromeda(preset("nano")).to("cuda").eval()  # float32
    prompts = [some_ids(n, seed=n)[0].tolist() for n in (1, 30, 200)]
    engine = Engine(model, num_pages=40)
    texts = {engine.add(Request(prompt, 40, seed=1)): list[int]() for prompt in prompts}
    while engine.busy:
        for number, update in engine.step():
            texts[number] += [token.id for token in update.tokens]
    engine.close()
    assert list(texts.values()) == [list(generate(model, prompt, max_new_tokens=40, seed=1)) for prompt in prompts]
