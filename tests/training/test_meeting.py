"""Processes meet those of their own start, whatever dead ones left in the store."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store

from andromeda.errors import AndromedaError
from andromeda.training.meeting import meet

RANKS = 4
SOON = timedelta(seconds=0.1)


def start(store: Store, delays: list[float], patience: timedelta = timedelta(seconds=20)) -> list[Store]:
    """The parts of the store that as many processes get, which come one after the other."""

    def come(rank: int) -> Store:
        time.sleep(delays[rank])
        return meet(store, rank, RANKS, patience)

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(come, range(len(delays))))


@pytest.mark.parametrize("last", range(RANKS))
def test_each_start_has_a_part_of_its_own(last: int) -> None:
    """Whoever comes last: the others do not take the answers that an earlier start left."""
    store = HashStore()
    seen: list[str] = []
    for number in range(3):
        delays = [0.0] * RANKS
        delays[last] = 0.1 if number else 0.0
        parts = start(store, delays)
        for part in parts:
            assert not part.check(["who"])
        parts[0].set("who", str(number))
        seen += [part.get("who").decode() for part in parts]
    assert seen == [str(number) for number in range(3) for _ in range(RANKS)]


@pytest.mark.parametrize("seed", range(4))
def test_starts_that_died_while_they_met(seed: int) -> None:
    """Some came and others not; one may have read the answer, and be killed before it confirmed."""
    moments, store = random.Random(seed), HashStore()
    for _ in range(3):
        present = moments.sample(range(RANKS), moments.randrange(1, RANKS))
        threads = [threading.Thread(target=_gives_up, args=(store, rank)) for rank in present]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    parts = start(store, [moments.uniform(0, 0.1) for _ in range(RANKS)])
    parts[-1].set("x", "1")
    assert all(part.check(["x"]) for part in parts)


def _gives_up(store: Store, rank: int) -> None:
    with pytest.raises(AndromedaError):
        meet(store, rank, RANKS, SOON)


def test_who_does_not_come_is_named() -> None:
    with (
        pytest.raises(AndromedaError, match=r"process 0 of 4: .* within 0\.1 s: 2, 3; "),
        ThreadPoolExecutor(2) as pool,
    ):
        list(pool.map(lambda rank: meet(HASH, rank, RANKS, SOON), range(2)))


HASH = HashStore()
