"""Processes that were started together find each other, whatever earlier ones left in the same store."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store

from andromeda.errors import AndromedaError

PATIENCE = timedelta(minutes=10)  # all are started at once; importing from a busy network drive takes a minute or two
PAUSE = 0.02  # seconds between two looks of the first process


def meet(store: Store, rank: int, ranks: int, patience: timedelta = PATIENCE) -> Store:
    """Waits until all processes of this start are here.

    torchrun hands the processes that it starts again the store of those that died, where their addresses still stand
    (PyTorch's issue 135712). Who reads them too soon is refused, or waits for nobody. Its count of restarts does not
    tell starts apart: each machine counts for itself. So each process leaves a name that it has just drawn; the first
    answers each name with its own, until all have found the answer.

    Returns:
        A part of the store that these processes alone know.

    Raises:
        AndromedaError: some did not come.
    """
    name = uuid.uuid4().hex
    if rank == 0:
        _gather(store, name, set(range(1, ranks)), ranks, patience)
        store.set(f"all are here/{name}", "")
        return PrefixStore(name, store)
    store.set(f"name/{rank}", name)
    start = _answer(store, f"first/{name}", rank, ranks, patience)
    store.set(f"here/{start}/{rank}", "")
    _answer(store, f"all are here/{start}", rank, ranks, patience)
    return PrefixStore(start, store)


def _gather(store: Store, name: str, missing: set[int], ranks: int, patience: timedelta) -> None:
    end = time.monotonic() + patience.total_seconds()
    answered: dict[int, bytes] = {}
    while missing:
        for rank in sorted(missing):
            if store.check([f"here/{name}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"name/{rank}"]) and (theirs := store.get(f"name/{rank}")) != answered.get(rank):
                store.set(f"first/{theirs.decode()}", name)
                answered[rank] = theirs
        if missing and time.monotonic() > end:
            raise _missing(0, ranks, sorted(missing), patience)
        time.sleep(PAUSE)


def _answer(store: Store, key: str, rank: int, ranks: int, patience: timedelta) -> str:
    try:
        store.wait([key], patience)
    except RuntimeError as error:  # its store is gone, or has no answer
        raise _missing(rank, ranks, [], patience) from error
    return store.get(key).decode()


def _missing(rank: int, ranks: int, missing: list[int], patience: timedelta) -> AndromedaError:
    named = f": {', '.join(map(str, missing))}" if missing else ""
    return AndromedaError(
        f"process {rank} of {ranks}: the others did not all come within {patience.total_seconds():g} s{named}; "
        "see what they say"
    )
