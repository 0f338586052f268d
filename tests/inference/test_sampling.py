"""Every filter against its definition, spelt out over plain lists; draws against the exact distribution."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from andromeda.errors import AndromedaError
from andromeda.inference.sampling import GREEDY, History, Sampling, probabilities, sample

# Quarters have many ties and no rounding; None is a forbidden token.
logits_lists = st.lists(
    st.one_of(st.integers(-40, 40).map(lambda n: n / 4), st.none()), min_size=1, max_size=12
).filter(lambda row: any(x is not None for x in row))  # fmt: skip


def row(values: list[float | None]) -> Tensor:
    return torch.tensor([[-math.inf if x is None else x for x in values]])


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    exps = [math.exp(x - top) for x in values]
    return [x / sum(exps) for x in exps]


def kept(logits: Tensor, sampling: Sampling) -> set[int]:
    return set(probabilities(logits, sampling)[0].nonzero().flatten().tolist())


def allowed(values: list[float | None]) -> list[int]:
    return [token for token, x in enumerate(values) if x is not None]


@given(logits_lists, st.sampled_from([0.25, 0.5, 1.0, 2.0]))
def test_the_temperature_divides_the_logits(values, temperature):
    expected = softmax([-math.inf if x is None else x / temperature for x in values])
    got = probabilities(row(values), Sampling(temperature=temperature))[0].tolist()
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-12)


@given(logits_lists, st.integers(1, 14))
def test_top_k_keeps_the_k_most_probable_and_their_equals(values, k):
    ranked = sorted((values[token] for token in allowed(values)), reverse=True)
    smallest = ranked[min(k, len(ranked)) - 1]
    assert kept(row(values), Sampling(top_k=k)) == {token for token in allowed(values) if values[token] >= smallest}


def test_a_top_p_that_float32_takes_for_none_keeps_the_first():
    assert kept(row([1.0, 3.0, 2.0]), Sampling(top_p=1e-60)) == {1}


@given(logits_lists, st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_tokens_that_reach_it(values, p):
    mass = torch.tensor(softmax([-math.inf if x is None else x for x in values]), dtype=torch.float64)
    got = kept(row(values), Sampling(top_p=p))
    inside = mass[sorted(got)]
    assert inside.sum() >= p - 1e-6
    assert len(got) == 1 or inside.sum() - inside.min() < p + 1e-6  # one fewer would not do
    assert all(mass[token] <= inside.min() for token in set(allowed(values)) - got)


@given(logits_lists, st.sampled_from([0.01, 0.1, 0.3, 0.9, 1.0]))
def test_min_p_keeps_what_is_probable_beside_the_most_probable(values, min_p):
    top = max(values[token] for token in allowed(values))
    expected = {token for token in allowed(values) if math.exp(values[token] - top) >= min_p}
    assert kept(row(values), Sampling(min_p=min_p)) == expected


@given(logits_lists, st.sets(st.integers(0, 11)), st.sampled_from([0.5, 1.25, 2.0]))
def test_the_repetition_penalty_is_that_of_the_paper(values, history, penalty):
    seen = torch.tensor([[token in history for token in range(len(values))]])
    penalised = [
        x if x is None or token not in history else (x / penalty if x > 0 else x * penalty)
        for token, x in enumerate(values)
    ]
    got = probabilities(row(values), Sampling(repetition_penalty=penalty), History(seen, seen.float()))
    torch.testing.assert_close(got, row(penalised).softmax(-1))


@given(
    logits_lists,
    st.lists(st.integers(0, 3), min_size=12, max_size=12),
    st.sampled_from([-2.0, 0.0, 0.5]),
    st.sampled_from([-0.25, 0.0, 2.0]),
    st.dictionaries(st.integers(0, 11), st.sampled_from([-100.0, -1.5, 0.5, 100.0]), max_size=3),
)
def test_bias_and_penalties_of_what_was_generated_are_those_of_openai(values, times, frequency, presence, bias):
    counts = torch.tensor([times[: len(values)]], dtype=torch.float32)
    bias = {token: value for token, value in bias.items() if token < len(values)}
    penalised = [
        x if x is None else x + bias.get(token, 0) - times[token] * frequency - (times[token] > 0) * presence
        for token, x in enumerate(values)
    ]
    sampling = Sampling(frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias)
    got = probabilities(row(values), sampling, History(counts > 0, counts))
    torch.testing.assert_close(got, row(penalised).softmax(-1))


def test_a_history_counts_what_was_generated_alone():
    history = History.of(torch.tensor([[0, 1], [3, 3]]), 4)
    for ids in ([1, 2], [1, 3]):
        history.record(torch.tensor(ids))
    assert history.seen.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert history.counts.tolist() == [[0, 2, 0, 0], [0, 0, 1, 1]]


def test_settings_with_equal_biases_are_one():
    first, second = (Sampling(logit_bias={1: 2.0}) for _ in range(2))
    assert first == second and hash(first) == hash(second) and first != Sampling(logit_bias={1: 3.0})


def test_a_bias_of_no_token_is_refused():
    Sampling(logit_bias={9: 1.0}).check(10)
    with pytest.raises(AndromedaError, match="logit_bias has token id 10, but there are only 10 tokens"):
        Sampling(logit_bias={3: 1.0, 10: 1.0}).check(10)


@given(logits_lists, st.integers(0, 12), st.floats(0.05, 1), st.floats(0, 1), st.floats(0.1, 3))
def test_each_filter_works_on_what_the_one_before_it_left(values, k, p, min_p, temperature):
    """Temperature, top-k, top-p, min-p, one after the other, is all of them at once; the most probable token stays."""
    together = Sampling(temperature=temperature, top_k=k, top_p=p, min_p=min_p)
    logits = row(values) / temperature
    for step in (Sampling(top_k=k), Sampling(top_p=p), Sampling(min_p=min_p)):
        logits = probabilities(logits, step).log()
    got = probabilities(row(values), together)
    torch.testing.assert_close(got, logits.exp(), rtol=1e-4, atol=1e-6)
    assert got[0, row(values).argmax()] > 0


@given(logits_lists, st.integers(0, 5))
def test_a_temperature_of_zero_is_greedy(values, k):
    logits = row(values)
    for temperature in (0.0, 1e-9):
        sampling = Sampling(temperature=temperature, top_k=k, top_p=0.5)
        assert sample(logits, sampling).tolist() == [logits.argmax()]
        assert kept(logits, sampling) == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [1.1e-5, 1e-3, 1e4])
def test_extreme_temperatures_and_logits_give_probabilities(temperature):
    p = probabilities(torch.tensor([[3e38, 0.0, -3e38, 1.0]]), Sampling(temperature=temperature))
    assert p.isfinite().all() and p.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(top_k=3),
        Sampling(top_p=0.8),
        Sampling(min_p=0.2),
        Sampling(temperature=1.5, top_k=6, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
    ],
)
def test_draws_have_the_exact_distribution(sampling):
    """Pearson's chi-square test at 1 in 10,000, for a seed that was not chosen."""
    num_draws, num_tokens = 20_000, 8
    logits = torch.tensor([1.0, -2.0, 0.5, 2.0, -torch.inf, 0.0, 1.5, -1.0]).expand(num_draws, num_tokens)
    seen = (torch.arange(num_tokens) % 3 == 0).expand(num_draws, num_tokens)
    drawn = sample(logits, sampling, torch.Generator().manual_seed(0), History(seen, seen.float()))
    expected = probabilities(logits[:1], sampling, History(seen[:1], seen[:1].float()))[0].double() * num_draws
    counts = drawn.bincount(minlength=num_tokens).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    degrees = torch.tensor((int(possible.sum()) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(degrees, statistic / 2) > 1e-4


def test_rows_are_drawn_independently():
    logits = torch.zeros(4000, 2)
    drawn = sample(logits, Sampling(), torch.Generator().manual_seed(1)).double()
    assert abs(torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1]) < 0.06  # 4 standard deviations


def test_the_same_seed_draws_the_same():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    draws = [sample(logits, Sampling(), torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])


def test_half_precision_is_widened_first():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    for sampling in (Sampling(), Sampling(temperature=0.3, top_p=0.9)):
        assert probabilities(logits, sampling).dtype == torch.float32
        assert probabilities(logits, sampling).equal(probabilities(logits.float(), sampling))


@pytest.mark.parametrize("sampling", [Sampling(), GREEDY, Sampling(top_k=2, top_p=0.5, min_p=0.1)])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_refused(sampling, wrong):
    logits = torch.zeros(3, 5)
    logits[1, 2] = wrong
    with pytest.raises(AndromedaError, match="row 1 of the model's logits holds NaN or infinity"):
        sample(logits, sampling)


@pytest.mark.parametrize("sampling", [Sampling(), GREEDY])
def test_a_row_that_forbids_everything_is_refused(sampling):
    logits = torch.zeros(3, 5)
    logits[2] = -math.inf
    with pytest.raises(AndromedaError, match="every token of row 2 is forbidden"):
        sample(logits, sampling)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
        ("top_k", -1), ("top_k", 2.5), ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan),
        ("frequency_penalty", 2.1), ("presence_penalty", -2.1), ("presence_penalty", math.nan),
        ("logit_bias", {-1: 0.0}), ("logit_bias", {1: 100.5}), ("logit_bias", {1: math.nan}),
        ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", math.nan),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(AndromedaError, match=f"sampling: {name}="):
        replace(Sampling(), **{name: value})
