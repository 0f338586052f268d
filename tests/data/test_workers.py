"""Batches done in several processes: in their order, few at a time, errors as if in one."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from andromeda.data import workers
from andromeda.data.workers import AHEAD, Workers, apart, cores
from andromeda.errors import AndromedaError


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(multiprocessing.active_children())  # other files' tests keep some
    monkeypatch.setattr(workers, "HERE", 10)
    yield
    assert set(multiprocessing.active_children()) <= before


class Square:
    """Of even numbers, slowly; 13 is an error, 99 the end."""

    def __call__(self, number: int) -> tuple[int, int]:
        if number == 99:
            os._exit(1)
        if number == 13:
            raise AndromedaError("13 brings bad luck")
        time.sleep(0.02 * (number % 2 == 0))
        return number * number, os.getpid()


def sized(numbers: range, size: int = 6) -> Iterator[tuple[int, int]]:
    return ((number, size) for number in numbers)


@pytest.mark.parametrize("number", [1, 2])
def test_results_come_in_order_and_little_work_is_done_here(number: int) -> None:
    with Workers(Square(), number) as pool:
        results = list(pool.map(sized(range(12))))
        again = list(pool.map(sized(range(12, 13))))
    assert [square for square, _ in [*results, *again]] == [n * n for n in range(13)]
    processes = [process for _, process in results]
    assert processes[0] == os.getpid(), "the first ten bytes"
    assert (set(processes[1:]) == {os.getpid()}) == (number == 1)


def test_only_so_many_batches_are_taken_ahead() -> None:
    taken = []

    def batches() -> Iterator[tuple[int, int]]:
        for number in range(12):
            taken.append(number)
            yield number, 100

    with Workers(Square(), 2) as pool:
        for done, _ in enumerate(pool.map(batches()), start=1):
            assert len(taken) <= done + 2 * AHEAD


def failing(numbers: range) -> Iterator[tuple[int, int]]:
    yield from sized(numbers)
    raise AndromedaError("the file ends here")


@pytest.mark.parametrize(
    ("batches", "good", "message"),
    [
        (lambda: sized(range(20)), 13, "13 brings bad luck"),
        (lambda: failing(range(8)), 8, "the file ends here"),
        (lambda: failing(range(14)), 13, "13 brings bad luck"),  # the first one
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_the_first_error_comes_behind_what_was_before_it(
    batches: Callable[[], Iterator[tuple[int, int]]], good: int, message: str, number: int
) -> None:
    done: list[tuple[int, int]] = []
    with pytest.raises(AndromedaError, match=message), Workers(Square(), number) as pool:
        done.extend(pool.map(batches()))
    with Workers(Square(), number) as pool:
        results = pool.map(batches())
        assert [next(results)[0] for _ in range(good)] == [n * n for n in range(good)]
        with pytest.raises(AndromedaError, match=message):
            next(results)


def test_a_process_that_dies() -> None:
    with pytest.raises(AndromedaError, match="a worker process died"), Workers(Square(), 2) as pool:
        list(pool.map(sized(range(98, 120))))


@pytest.mark.parametrize(("size", "number", "here"), [(10, 2, True), (11, 1, True), (11, 2, False)])
def test_what_is_much_is_done_apart(size: int, number: int, here: bool) -> None:
    square, process = apart(partial(Square(), 4), size, number)
    assert square == 16
    assert (process == os.getpid()) == here


@pytest.mark.parametrize(
    ("number", "message"),
    [(13, "^13 brings bad luck$"), (99, "^a worker process died, .* run the same command again")],
)
def test_what_goes_wrong_apart(number: int, message: str) -> None:
    with pytest.raises(AndromedaError, match=message):
        apart(partial(Square(), number), 11, 2)


def test_cores_are_those_that_may_be_used() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
