"""The mix: shares exact at every prefix, epochs exact, each sequence of the stream computed from its number alone."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from andromeda.data.mix import Draws, Mix, Stage, exact, interleave
from andromeda.errors import AndromedaError

SEQ_LEN = 8

# few or hundreds of sources; equal, random, or with one weight that dwarfs the others
weight_lists = st.one_of(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.lists(st.integers(1, 10**6), min_size=1, max_size=40),
    st.lists(st.sampled_from([1, 2, 3, 1000]), min_size=100, max_size=300),
    st.builds(lambda large, small: [large, *small], st.integers(1, 10**9), st.lists(st.integers(1, 3), max_size=30)),
)
fractions = st.fractions(min_value=Fraction(1, 20), max_value=3, max_denominator=20)


def whole(mix: Mix) -> Draws:
    return mix.draws(0, len(mix))


def one_stage(sizes: dict[str, int], **spec: Any) -> Mix:
    return Mix([Stage("s", SEQ_LEN, **spec)], {(source, SEQ_LEN): size for source, size in sizes.items()}, seed=0)


def assert_within_one(turns: list[int], shares: list[Fraction]) -> None:
    """After any number of turns, each source has had its share to within 1 - 1/(2k - 2), in whole numbers."""
    denominator = math.lcm(*(share.denominator for share in shares))
    weights = np.array([int(share * denominator) for share in shares])
    scale = 2 * len(shares) - 2 or 1
    assert int(weights.sum()) * len(turns) * scale < 2**62
    taken = np.zeros((len(turns), len(shares)), np.int64)
    taken[np.arange(len(turns)), turns] = 1
    np.cumsum(taken, axis=0, out=taken)
    expected = np.arange(1, len(turns) + 1)[:, None] * weights  # both times the sum of the weights
    assert (abs(taken * weights.sum() - expected) * scale <= (scale - 1) * weights.sum()).all()


# ---- whose turn it is ----------------------------------------------------------------------------


@given(weights=weight_lists)
def test_every_prefix_is_within_one_of_every_share(weights: list[int]) -> None:
    turns = 300_000 // max(100, len(weights))
    assert_within_one(list(islice(interleave(weights), turns)), [Fraction(weight) for weight in weights])


@given(weights=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_turns_repeat_with_the_sum_of_the_weights(weights: list[int]) -> None:
    period = sum(weights)
    turns = list(islice(interleave(weights), 3 * period))
    assert turns == turns[:period] * 3
    assert [turns[:period].count(source) for source in range(len(weights))] == weights
    assert turns == list(islice(interleave([7 * weight for weight in weights]), 3 * period))


@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=12))
def test_the_same_as_looking_at_every_source_every_turn(weights: list[int]) -> None:
    assert list(islice(interleave(weights), 200)) == list(islice(looking_at_all(weights), 200))


def looking_at_all(weights: list[int]) -> Any:
    """Tijdeman's rule in fractions: of those that may, the first whose time runs out, in whole turns."""
    share = [Fraction(weight, sum(weights)) for weight in weights]
    most = 1 - Fraction(1, max(1, 2 * len(weights) - 2))
    taken = [0] * len(weights)
    for turn in count(1):
        may = [source for source in range(len(weights)) if taken[source] + 1 - turn * share[source] <= most]
        soonest = min(may, key=lambda source: (taken[source] + most) // share[source])
        taken[soonest] += 1
        yield soonest


def test_turns_by_hand() -> None:
    assert list(islice(interleave([1]), 3)) == [0, 0, 0]
    assert list(islice(interleave([1, 1]), 4)) == [0, 1, 0, 1]
    assert list(islice(interleave([5, 3, 2]), 10)) == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1]


# ---- epochs rule ---------------------------------------------------------------------------------


@given(sources=st.lists(st.tuples(st.integers(1, 40), fractions), min_size=1, max_size=8))
def test_each_sequence_exactly_as_often_as_asked(sources: list[tuple[int, Fraction]]) -> None:
    assume(any(size * epochs >= 1 for size, epochs in sources))
    names = [f"source {number}" for number in range(len(sources))]
    mix = one_stage(
        {name: size for name, (size, _) in zip(names, sources, strict=True)},
        epochs={name: epochs for name, (_, epochs) in zip(names, sources, strict=True)},
    )
    drawn = whole(mix)
    for source, (size, epochs) in enumerate(sources):
        found = np.bincount(drawn.sequence[drawn.source == source], minlength=size)
        assert len(found) == size
        assert found.sum() == size * epochs // 1
        assert set(found.tolist()) <= {epochs // 1, -(-epochs // 1)}
    shares = [Fraction(size * epochs // 1) for size, epochs in sources]
    had = [number for number, share in enumerate(shares) if share]
    assert_within_one([had.index(source) for source in drawn.source.tolist()], [shares[number] for number in had])


@given(
    size=st.integers(1, 30),
    parts=st.lists(st.fractions(min_value=Fraction(1, 9), max_value=1, max_denominator=9), min_size=1, max_size=5),
)
def test_stages_of_one_length_share_an_epoch(size: int, parts: list[Fraction]) -> None:
    """Thirds of an epoch add up to one, whatever the number of sequences."""
    rest = -sum(parts, Fraction(0)) % 1
    asked = [*parts, rest] if rest else parts
    one = Fraction(1)
    stages = [Stage(f"{number}", SEQ_LEN, epochs={"verse": part, "other": one}) for number, part in enumerate(asked)]
    mix = Mix(stages, {("verse", SEQ_LEN): size, ("other", SEQ_LEN): 1}, seed=3)
    drawn = whole(mix)
    verse = drawn.source == 0
    assert np.bincount(drawn.sequence[verse]).tolist() == [sum(asked)] * size
    assert drawn.epoch[verse].tolist() == sorted(drawn.epoch[verse].tolist())
    assert np.bincount(drawn.epoch[verse]).tolist() == [size] * int(sum(asked))


def test_an_epoch_goes_on_after_a_stage_where_proportions_rule() -> None:
    stages = [
        Stage("a", SEQ_LEN, epochs={"x": Fraction(1, 2)}),
        Stage("b", SEQ_LEN, proportions={"x": Fraction(1), "y": Fraction(1)}, num_sequences=4),
        Stage("c", SEQ_LEN, epochs={"x": Fraction(1, 2)}),
    ]
    mix = Mix(stages, {("x", SEQ_LEN): 5, ("y", SEQ_LEN): 9}, seed=0)
    drawn = whole(mix)
    assert mix.counts.tolist() == [[2, 0], [2, 2], [3, 0]]
    assert drawn.epoch[drawn.source == 0].tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert sorted(drawn.sequence[drawn.source == 0][:5].tolist()) == list(range(5))


# ---- proportions rule ----------------------------------------------------------------------------


@given(sources=st.lists(st.tuples(st.integers(1, 40), fractions), min_size=1, max_size=8), length=st.integers(1, 400))
def test_proportions_hold_at_every_prefix_and_sources_repeat_evenly(
    sources: list[tuple[int, Fraction]], length: int
) -> None:
    sizes = {f"source {number}": size for number, (size, _) in enumerate(sources)}
    shares = [share for _, share in sources]
    mix = one_stage(sizes, proportions=dict(zip(sizes, shares, strict=True)), num_sequences=length)
    drawn = whole(mix)
    assert len(drawn.source) == length
    assert_within_one(drawn.source.tolist(), shares)
    assert mix.counts.tolist() == [np.bincount(drawn.source, minlength=len(sources)).tolist()]
    for source, (size, _) in enumerate(sources):
        found = np.bincount(drawn.sequence[drawn.source == source], minlength=size)
        assert len(found) == size and found.max() - found.min() <= 1


@given(sources=st.lists(st.tuples(st.integers(1, 40), fractions, fractions), min_size=1, max_size=6))
def test_max_epochs_are_kept_and_made_use_of(sources: list[tuple[int, Fraction, Fraction]]) -> None:
    sizes = {f"source {number}": size for number, (size, _, _) in enumerate(sources)}
    proportions = {name: share for name, (_, share, _) in zip(sizes, sources, strict=True)}
    most = {name: epochs for name, (_, _, epochs) in zip(sizes, sources, strict=True)}
    limits = [size * epochs // 1 for size, _, epochs in sources]
    shares = [share / sum(proportions.values()) for share in proportions.values()]
    longest = min(limit // share for limit, share in zip(limits, shares, strict=True))
    assume(longest > 0)
    mix = one_stage(sizes, proportions=proportions, max_epochs=most)
    assert len(mix) == longest
    assert (mix.counts[0] <= limits).all()
    assert any(longest + 1 > limit / share for limit, share in zip(limits, shares, strict=True))
    asked = one_stage(sizes, proportions=proportions, max_epochs=most, num_sequences=int(longest))
    assert np.array_equal(whole(asked).source, whole(mix).source)
    with pytest.raises(AndromedaError, match=r"would repeat 'source \d+' more.*at most \d+"):
        one_stage(sizes, proportions=proportions, max_epochs=most, num_sequences=int(longest) + 1)


# ---- the stream ----------------------------------------------------------------------------------


def curriculum(seed: int = 0) -> Mix:
    """Three stages of two lengths."""
    stages = [
        Stage("high", 8, epochs={"verse": Fraction(3, 2), "books": Fraction(1)}),
        Stage("medium", 8, proportions={"code": Fraction(1, 3), "verse": Fraction(2, 3)}, num_sequences=50),
        Stage("low", 32, proportions={"verse": Fraction(1), "books": Fraction(5)}, max_epochs={"books": Fraction(2)}),
    ]
    sizes = {("verse", 8): 20, ("books", 8): 31, ("code", 8): 4, ("verse", 32): 5, ("books", 32): 9}
    return Mix(stages, sizes, seed)


@given(data=st.data())
def test_any_part_of_the_stream_is_computed_from_its_number(data: st.DataObject) -> None:
    mix = curriculum()
    first = data.draw(st.integers(0, len(mix)))
    number = data.draw(st.integers(0, len(mix) - first))
    for part, all_of_it in zip(curriculum().draws(first, number), whole(mix), strict=True):
        assert np.array_equal(part, all_of_it[first : first + number])


def test_stages_follow_each_other_with_their_own_length() -> None:
    mix = curriculum()
    assert mix.sources == ("verse", "books", "code")
    assert mix.counts.tolist() == [[30, 31, 0], [33, 0, 17], [4, 17, 0]]
    assert mix.starts.tolist() == [0, 61, 111, 132]
    drawn = whole(mix)
    assert drawn.stage.tolist() == [0] * 61 + [1] * 50 + [2] * 21
    verse = drawn.source == 0
    assert drawn.epoch[verse & (drawn.stage < 2)].tolist() == [0] * 20 + [1] * 20 + [2] * 20 + [3] * 3
    assert drawn.epoch[verse & (drawn.stage == 2)].tolist() == [0] * 4  # another length: other sequences


def test_the_order_within_an_epoch_follows_from_seed_source_and_epoch_alone() -> None:
    sizes = {("x", SEQ_LEN): 30, ("y", SEQ_LEN): 30, ("z", SEQ_LEN): 7}
    alone = Mix([Stage("a", SEQ_LEN, epochs={"x": Fraction(2)})], sizes, seed=1)
    among = Mix(
        [
            Stage("b", SEQ_LEN, epochs={"z": Fraction(3), "y": Fraction(1), "x": Fraction(1, 3)}),
            Stage("c", SEQ_LEN, epochs={"x": Fraction(5, 3)}),
        ],
        sizes,
        seed=1,
    )

    def order(mix: Mix, source: str, epoch: int) -> tuple[int, ...]:
        drawn = whole(mix)
        return tuple(drawn.sequence[(drawn.source == mix.sources.index(source)) & (drawn.epoch == epoch)].tolist())

    assert [order(alone, "x", epoch) for epoch in (0, 1)] == [order(among, "x", epoch) for epoch in (0, 1)]
    other_seed = Mix(alone.stages, sizes, seed=2)
    orders = [order(alone, "x", 0), order(alone, "x", 1), order(among, "y", 0), order(other_seed, "x", 0)]
    assert len(set(orders)) == 4
    for found in orders:
        assert sorted(found) == list(range(30)) != list(found)


def test_the_stream_is_the_same_on_every_machine_and_in_every_version() -> None:
    mix = one_stage({"x": 4, "ü": 2}, epochs={"x": Fraction(3, 2), "ü": Fraction(1)})
    drawn = whole(mix)
    assert drawn.source.tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    assert drawn.epoch.tolist() == [0, 0, 0, 0, 0, 1, 0, 1]
    assert drawn.sequence.tolist() == [2, 3, 0, 0, 1, 3, 1, 0]


def test_hundreds_of_sources_and_long_stages() -> None:
    """Shares of six decimals, of which each source's count is checked every 1,000 sequences."""
    rng = np.random.default_rng(0)
    names = [f"source {number}" for number in range(300)]
    proportions = {
        name: exact(f"{value:.6f}", name) for name, value in zip(names, rng.pareto(1, 300) + 0.01, strict=True)
    }
    mix = one_stage(dict.fromkeys(names, 100), proportions=proportions, num_sequences=50_000)
    total = sum(proportions.values())
    taken = np.zeros(300, np.int64)
    for first in range(0, 50_000, 1000):
        taken += np.bincount(mix.draws(first, 1000).source, minlength=300)
        for number, name in enumerate(names):
            assert abs(int(taken[number]) - (first + 1000) * proportions[name] / total) < 1


def test_long_stages_with_simple_shares_take_no_memory() -> None:
    mix = one_stage({"x": 7, "y": 10**9}, proportions={"x": Fraction(1), "y": Fraction(3)}, num_sequences=4 * 10**9)
    assert len(mix) == 4 * 10**9
    assert mix.counts.tolist() == [[10**9, 3 * 10**9]]
    drawn = mix.draws(3_999_999_000, 1000)
    assert Counter(drawn.source.tolist()) == {0: 250, 1: 750}
    assert set(drawn.epoch[drawn.source == 1].tolist()) == {2}


@pytest.mark.parametrize(("first", "number"), [(-1, 1), (0, 133), (132, 1), (133, 0), (5, -1)])
def test_outside_the_stream(first: int, number: int) -> None:
    with pytest.raises(IndexError, match="of 132"):
        curriculum().draws(first, number)


# ---- what is refused -----------------------------------------------------------------------------

ONE, HALF = Fraction(1), Fraction(1, 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "neither epochs nor proportions"),
        ({"epochs": {"x": ONE}, "proportions": {"x": ONE}}, "has both epochs and proportions, and one must rule"),
        ({"epochs": {"x": ONE}, "num_sequences": 3}, "drop num_sequences and max_epochs"),
        ({"epochs": {"x": ONE}, "max_epochs": {"x": ONE}}, "drop num_sequences and max_epochs"),
        ({"proportions": {"x": ONE}}, "add num_sequences or max_epochs"),
        ({"proportions": {"x": ONE}, "num_sequences": 0}, "num_sequences is 0"),
        ({"proportions": {"x": ONE}, "max_epochs": {"y": ONE}}, "max_epochs names 'y', which has no proportion"),
        ({"proportions": {}, "num_sequences": 1}, "names no source"),
        ({"epochs": {}}, "names no source"),
        ({"epochs": {"x": Fraction(0)}}, "epochs of 'x' is 0; leave the source out"),
        ({"proportions": {"x": Fraction(-1)}, "num_sequences": 1}, "proportions of 'x' is -1"),
        ({"epochs": {"x": ONE, "y": ONE}}, "source 'y' has no sequences of 8 tokens"),
        ({"epochs": {"x": ONE, "z": ONE}}, "source 'z' has no sequences of 8 tokens"),
        ({"epochs": {"x": Fraction(1, 6)}}, "is 0 sequences long"),
        ({"epochs": {"x": Fraction(10**9)}}, "is 5000000000 sequences long"),
        ({"proportions": {"x": ONE}, "num_sequences": 2**32}, "is 4294967296 sequences long"),
        ({"proportions": {"x": ONE}, "max_epochs": {"x": Fraction(1, 6)}}, "is 0 sequences long"),
        ({"proportions": {"x": ONE}, "max_epochs": {"x": HALF}, "num_sequences": 3}, "num_sequences of at most 2,"),
    ],
)
def test_stages_that_cannot_be(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(AndromedaError, match="stage 's': ") as raised:
        one_stage({"x": 5, "z": 0}, **spec)
    assert message in str(raised.value)


def test_floats_are_not_exact() -> None:
    inexact: Any = {"x": 0.1}
    with pytest.raises(TypeError, match="epochs of 'x' must be a Fraction; got float"):
        Stage("s", SEQ_LEN, epochs=inexact)


def test_sequences_have_tokens_and_stages_their_own_names() -> None:
    with pytest.raises(AndromedaError, match="stage 's': seq_len is 0"):
        Stage("s", 0, epochs={"x": ONE})
    stage = Stage("s", SEQ_LEN, epochs={"x": ONE})
    with pytest.raises(AndromedaError, match="stage 's': there are two"):
        Mix([stage, stage], {("x", SEQ_LEN): 2}, seed=0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3),
        ("3", 3),
        (0.1, Fraction(1, 10)),
        ("0.30", Fraction(3, 10)),
        ("2/6", Fraction(1, 3)),
        (1e-7, Fraction(1, 10**7)),
    ],
)
def test_numbers_are_what_their_digits_say(value: object, expected: Fraction) -> None:
    assert exact(value, "here") == expected


@pytest.mark.parametrize(
    "value",
    [0, -1, "0.0", "1/0", "", "x", None, True, [1], float("nan"), float("inf"), 1e300, "1e999999999", "1 / 2", "٣"],
)
def test_what_is_no_number_above_zero(value: object) -> None:
    with pytest.raises(AndromedaError, match=r"^stage 'a', epochs: .* is not a number above zero"):
        exact(value, "stage 'a', epochs")


@given(numerator=st.integers(1, 10**18 - 1), denominator=st.integers(1, 10**18 - 1))
def test_fractions_stay_as_they_are(numerator: int, denominator: int) -> None:
    value = Fraction(numerator, denominator)
    assert exact(value, "here") == exact(f"{numerator}/{denominator}", "here") == value
