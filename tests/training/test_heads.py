"""Bounds, windows and entropies of heads: of the weights as they are, and of the probabilities that a text gives."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from andromeda.kernels.reference import reference_attention
from andromeda.model import Andromeda, Attention, Pass
from andromeda.training import heads
from andromeda.training.objective import Batch, NextToken

CPU = torch.device("cpu")


def text(tokens: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(64, (1, tokens), generator=generator)
    return ids, ids, (torch.arange(tokens) >= tokens // 3).long()[None]


def test_certificates_follow_the_weights(model: Andromeda) -> None:
    attention = model.blocks[1].attention
    with torch.no_grad():
        attention.q_gain[2, 3] = 3.0
    found = heads.certificates(model)
    tau = math.sqrt(8)
    assert found["bounds"][0] == pytest.approx([tau] * 4, abs=1e-4)
    assert found["bounds"][1] == pytest.approx([tau, tau, 3 * tau, tau], abs=1e-4)
    slopes = (2**-4, 2**-8)
    expected = [math.ceil((2 * tau - math.log(1e-2)) / slope) for slope in slopes]
    assert found["windows"] == [[*expected, None, None]] * 2


def test_without_qk_norm_or_slopes_there_is_nothing_to_certify(model: Andromeda) -> None:
    plain = dataclasses.replace(model.config, qk_norm=False, attn_qk_norm=False, attn_qk_norm_dim_scale=False)
    assert heads.certificates(Andromeda(plain)) == {}
    flat = dataclasses.replace(model.config, alibi_pos_bias=False)
    assert heads.certificates(Andromeda(flat)).keys() == {"bounds"}


def by_hand(model: Andromeda, batch: Batch, queries: list[int]) -> Tensor:
    """(depth, heads): from all probabilities, which the dense reference gives for values that are unit vectors."""
    found: list[Tensor] = []

    def look(attention: Attention, inputs: tuple[Tensor, Pass]) -> None:
        x, step = inputs
        q, k, _, geometry = attention.project(x, step)
        q, k = attention.normalise(q, k, step)
        unit = torch.eye(x.shape[1])[None, :, None]
        p = reference_attention(q, k, unit, geometry)
        found.append(torch.special.entr(p).sum(-1)[0, queries].mean(0))

    handles = [block.attention.register_forward_pre_hook(look) for block in model.blocks]
    model(batch[0], documents=batch[2])
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def test_entropies_are_those_of_the_probabilities(model: Andromeda, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = NextToken(model, CPU)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.q_gain.copy_(torch.rand(4, 8) * 4)
        whole = by_hand(model, text(40), list(range(40)))
        torch.testing.assert_close(
            torch.tensor(heads.entropies(model, objective, text(40))), whole, atol=1e-4, rtol=1e-4
        )
        monkeypatch.setattr(heads, "SPAN", 5)
        some = by_hand(model, text(40), [*range(5, 10), *range(15, 20), *range(25, 30), *range(35, 40)])
        found = torch.tensor(heads.entropies(model, objective, text(40)))
    torch.testing.assert_close(found, some, atol=1e-4, rtol=1e-4)
    assert (found - whole).abs().max() > 1e-3


@pytest.mark.slow
def test_compiled_blocks_are_looked_into(model: Andromeda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that comes after the compilation is passed over."""
    plain, batch = NextToken(model, CPU), text(40)
    expected = heads.entropies(model, plain, batch)
    block = model.blocks[1]
    monkeypatch.setattr(block, "forward", torch.compile(block.forward, backend="eager"))
    with torch.no_grad():
        plain(batch)
    assert heads.entropies(model, plain, batch, compiled=True) == expected


def test_looking_leaves_nothing_behind(model: Andromeda) -> None:
    objective, batch = NextToken(model, CPU), text(40)
    before = objective(batch)
    heads.entropies(model, objective, batch)
    assert torch.equal(objective(batch), before)
    assert all(not block.attention._forward_pre_hooks for block in model.blocks)


def test_queries_of_a_long_text_are_few_and_come_from_all_of_it() -> None:
    assert heads.spans(500) == [range(500)]
    assert heads.spans(100_000) == [range(end - 128, end) for end in (25_000, 50_000, 75_000, 100_000)]
