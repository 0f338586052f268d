"""Steps: every sequence once and in order, whatever the batch size, and about as many tokens each time."""

from __future__ import annotations

import sys
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.training.steps import ENDLESS, Step, Steps

stages = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 100)), min_size=1, max_size=5)


def laid_out(stages: list[tuple[int, int]], batch_size: int, accumulated: int) -> Steps:
    """Of stages of (sequences, seq_len)."""
    counts, lengths = zip(*stages, strict=True)
    return Steps(tuple(accumulate(counts)), lengths, batch_size, accumulated)


def walk(steps: Steps, sequence: int = 0) -> list[Step]:
    taken = []
    while sequence < steps.ends[-1]:
        taken.append(steps.at(sequence))
        sequence += taken[-1].count
    return taken


def numbers(step: Step) -> list[int]:
    return list(range(step.first, step.first + step.count))


def test_by_hand() -> None:
    steps = Steps(ends=(10, 17), lengths=(256, 1024), batch_size=1, accumulate=2)
    assert walk(steps) == [
        Step(0, 8, 256, 4), Step(8, 2, 256, 4), Step(10, 2, 1024, 1), Step(12, 2, 1024, 1), Step(14, 2, 1024, 1),
        Step(16, 1, 1024, 1),
    ]  # fmt: skip
    assert steps.tokens == 2048
    assert [steps.left(sequence) for sequence in (0, 8, 9, 10, 16, 17)] == [6, 5, 5, 4, 1, 0]


@given(stages, st.integers(1, 9), st.integers(1, 4))
def test_each_sequence_once_in_order_and_no_step_crosses_a_border(
    drawn: list[tuple[int, int]], batch_size: int, accumulated: int
) -> None:
    steps = laid_out(drawn, batch_size, accumulated)
    taken = walk(steps)
    assert [number for step in taken for number in numbers(step)] == list(range(steps.ends[-1]))
    assert len(taken) == steps.left(0)
    for place, step in enumerate(taken):
        assert steps.left(step.first) == len(taken) - place
        stage = next(stage for stage, end in enumerate(steps.ends) if step.first < end)
        assert step.first + step.count <= steps.ends[stage] and step.seq_len == drawn[stage][1]
        tokens = step.at_once * step.seq_len
        assert steps.tokens // accumulated - step.seq_len < tokens <= steps.tokens // accumulated
        assert step.count == min(step.at_once * accumulated, steps.ends[stage] - step.first)


@given(stages, st.integers(1, 9), st.integers(1, 9), st.data())
def test_another_batch_size_goes_on_with_the_next_sequence(
    drawn: list[tuple[int, int]], before: int, after: int, data: st.DataObject
) -> None:
    first = walk(laid_out(drawn, before, 1))
    done = first[: data.draw(st.integers(0, len(first)))]
    position = sum(step.count for step in done)
    then = walk(laid_out(drawn, after, 2), position)
    assert [number for step in (*done, *then) for number in numbers(step)] == list(range(sum(n for n, _ in drawn)))


@given(stages, st.integers(1, 9), st.integers(1, 20))
def test_the_shares_of_processes_together_are_the_step(
    drawn: list[tuple[int, int]], batch_size: int, ranks: int
) -> None:
    for step in walk(laid_out(drawn, batch_size, 1)):
        shares = [step.share(rank, ranks) for rank in range(ranks)]
        assert [number for share in shares for number in numbers(share)] == numbers(step)
        counts = [share.count for share in shares]
        assert max(counts) - min(counts) <= 1
        assert {(share.seq_len, share.at_once) for share in shares} == {(step.seq_len, step.at_once)}


def test_text_has_no_end() -> None:
    steps = Steps((ENDLESS,), (256,), 4, 2)
    assert steps.at(10**15) == Step(10**15, 8, 256, 4)
    assert steps.left(0) > sys.maxsize // 10


@pytest.mark.parametrize("sequence", [-1, 17, 18])
def test_no_such_sequence(sequence: int) -> None:
    with pytest.raises(IndexError, match=f"sequence {sequence} of 17"):
        Steps((10, 17), (256, 1024), 1, 2).at(sequence)
