"""The processes of a run: one, or as many as torchrun or `accelerate launch` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from andromeda.errors import AndromedaError
from andromeda.training import meeting
from andromeda.training.watch import Watch

PATIENCE = timedelta(days=1)  # one process reads and tokenises while the others wait; a dead one is noticed at once
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Attributes:
        rank: from 0. ranks: how many there are.
        device: of this process.
        control: the group in which they agree, by tensors on the CPU; None: there is one alone.
        watch: ends this one when they hang; None: nobody does.
        together: how many in a row, a team, share each sequence.
        team: those of this one's; None: it is alone.
    """

    rank: int
    ranks: int
    device: torch.device
    control: Any = None
    watch: Watch | None = None
    together: int = 1
    team: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """The one that writes and speaks."""
        return self.rank == 0

    @property
    def teams(self) -> int:
        """How many share the sequences out."""
        return self.ranks // self.together

    @property
    def team_number(self) -> int:
        return self.rank // self.together

    @property
    def leads(self) -> bool:
        """Whether it is the first of its team, which counts what all of them have."""
        return self.rank % self.together == 0

    def in_teams(self, together: int) -> Processes:
        """The same, in teams of so many. All call it."""
        if together == 1:
            return self
        firsts = range(0, self.ranks, together)
        groups = [dist.new_group(list(range(first, first + together)), timeout=PATIENCE) for first in firsts]
        return replace(self, together=together, team=groups[self.rank // together])

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes, of a small tensor on the CPU; it is left as it is."""
        if self.control is None:
            return values
        self.moved()
        total = values.clone()
        dist.all_reduce(total, group=self.control)
        return total

    def wait(self) -> None:
        """Until all are here."""
        if self.control is not None:
            self.moved()
            dist.barrier(group=self.control)

    def moved(self) -> None:
        """Between two pieces of work that take a while: this process does not hang."""
        if self.watch is not None:
            self.watch.moved()

    def patience(self, seconds: float) -> AbstractContextManager[None]:
        """Within it all processes end when for so long none has moved."""
        return nullcontext() if self.watch is None else self.watch.patience(seconds)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs the block before the others do."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


def check_teams(together: int, ranks: int) -> None:
    """Before any work. Raises AndromedaError where so many processes make no whole number of teams."""
    if ranks % together:
        raise AndromedaError(
            f"recipe: context_parallel={together} needs a multiple of {together} processes, and there "
            f"{'is 1' if ranks == 1 else f'are {ranks}'}; start as many with torchrun --nproc-per-node"
        )


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Those that the launcher's variables name; without them this process alone.

    Raises:
        AndromedaError: variables that are missing or no numbers, fewer GPUs than processes of this machine, or
            processes that cannot reach each other; within, that another process is gone.
    """
    if "WORLD_SIZE" not in os.environ:
        yield Processes(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    rank, ranks, device = _number("RANK"), _number("WORLD_SIZE"), _device()
    for name in VARIABLES:
        if name not in os.environ:
            raise AndromedaError(f"{name} is not set, but WORLD_SIZE is; start with torchrun or accelerate launch")
    with ExitStack() as stack:
        try:
            store = next(dist.rendezvous("env://", rank, ranks, timeout=meeting.PATIENCE))[0]
            ours: Any = meeting.meet(store, rank, ranks)
            watch = Watch(dist.PrefixStore("watch", ours.clone()), rank, ranks, PATIENCE.total_seconds())
            stack.enter_context(watch.looking())
            with watch.patience(meeting.PATIENCE.total_seconds()):
                control = _connect(ours, rank, ranks, device)
        except (RuntimeError, ValueError) as error:
            raise AndromedaError(
                f"process {rank} of {ranks} cannot join the others: {str(error).splitlines()[0]}"
            ) from error
        try:
            yield Processes(rank, ranks, device, control, watch)
        except RuntimeError as error:
            if not _is_lost(error):
                raise
            raise AndromedaError(
                f"process {rank} of {ranks}: another process is gone, so this one stops; what it said stands above, "
                "and the same command goes on from the last checkpoint"
            ) from error
        finally:
            with watch.patience(meeting.PATIENCE.total_seconds()):
                dist.destroy_process_group()


def _is_lost(error: RuntimeError) -> bool:
    """Whether an exchange failed, by gloo, which names its source file, or NCCL."""
    return "gloo/" in str(error) or isinstance(error, dist.DistBackendError)


def _connect(store: dist.Store, rank: int, ranks: int, device: torch.device) -> Any:
    """The group for work, PyTorch's default one, and that for agreement, which is returned."""
    cuda = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks, timeout=PATIENCE,
        device_id=device if cuda else None,
    )  # fmt: skip
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = _number("LOCAL_RANK")
    if local >= torch.cuda.device_count():
        raise AndromedaError(
            f"process {local} of this machine finds {torch.cuda.device_count()} GPUs; start one process a GPU, with "
            "torchrun --nproc-per-node"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _number(name: str) -> int:
    try:
        return int(os.environ.get(name, "0"))
    except ValueError as error:
        raise AndromedaError(f"{name}={os.environ[name]!r} must be a number; it is the launcher's to set") from error
