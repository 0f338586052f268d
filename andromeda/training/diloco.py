"""Groups that train each by itself, far from each other, and now and then take a step together.

DiLoCo (Douillard et al. 2023, https://arxiv.org/abs/2311.08105): after some steps of its own each group has moved away
from the weights that all share. The mean of these moves is the gradient of an outer optimizer, SGD with Nesterov's
momentum, which moves the shared weights; all go on from there. Where that optimizer takes the whole mean and nothing
else, all go on from the mean of their weights: local SGD (Stich 2018, https://arxiv.org/abs/1805.09767). torchft finds
out who is there, by a lighthouse that all groups know, and makes their exchange outlive those that leave.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import TCPStore

from andromeda.errors import AndromedaError
from andromeda.tensorfile import load_tensors, save_tensors
from andromeda.training.engines import Engine
from andromeda.training.recipe import DiLoCoRecipe, Method, Recipe
from andromeda.training.state import TrainingState

if TYPE_CHECKING:
    from torchft import Manager

OUTER: dict[Method, dict[str, Any]] = {
    "diloco": {"lr": 0.7, "momentum": 0.9, "nesterov": True},  # as in the paper
    "local_sgd": {"lr": 1.0},
}
SLOWEST = 10e6  # bytes a second that an exchange is waited for
RETRIES = 10**6  # of asking the lighthouse, within the patience: it may be started again
FILE = "diloco.safetensors"
EXCHANGES = "exchanges"
COUNTS = ("step", "sequence", "tokens")  # of the training state, that go with a copy

Shared = tuple[dict[str, Tensor], int]  # weights and momentum, and how many exchanges made them


def load_shared(folder: Path) -> Shared | None:
    """What `save` left in a checkpoint; None: nothing. Raises AndromedaError where it is damaged."""
    if not (folder / FILE).exists():
        return None
    tensors, texts = load_tensors(folder / FILE)
    return tensors, int(texts[EXCHANGES])


class Group:
    """A group that there is alone."""

    @contextmanager
    def joined(self, say: Callable[[str], object]) -> Iterator[None]:  # noqa: ARG002 - for groups among others
        """Begins where the others are, and leaves them in the end."""
        yield

    def after_step(self) -> dict[str, int] | None:
        """An exchange with the others, where one is due. Returns a line of metrics of it."""
        return None

    def save(self, folder: Path) -> None:
        """Into the training state of a checkpoint."""


class Replica(Group):
    """A group among others, which come and go.

    Args:
        state: follows that of a group which is ahead, when this one joins it.
        shared: of the checkpoint that training goes on from; None: a new run.
        warn: takes a line for whoever waits.

    Raises:
        AndromedaError: torchft is not installed, the lighthouse does not answer, or this is one of several processes.
    """

    def __init__(
        self, recipe: Recipe, diloco: DiLoCoRecipe, engine: Engine, state: TrainingState, shared: Shared | None,
        warn: Callable[[str], object],
    ) -> None:  # fmt: skip
        if engine.processes.ranks > 1:
            raise AndromedaError("recipe: a group of diloco is one process so far; start it without torchrun")
        self.recipe, self.diloco, self.engine, self.state, self.warn = recipe, diloco, engine, state, warn
        self._shared = {
            name: nn.Parameter(weight.detach().to("cpu", copy=True)) for name, weight in engine.model.named_parameters()
        }
        self._outer = torch.optim.SGD(self._shared.values(), **OUTER[diloco.method])
        self._exchanges = 0
        if shared is not None:
            self._take(shared[0])
            self._exchanges = shared[1]
        self._manager: Manager | None = None

    @contextmanager
    def joined(self, say: Callable[[str], object]) -> Iterator[None]:
        say(f"diloco: waiting for the groups at {self.diloco.lighthouse}")
        self._manager = self._join()
        try:
            self.exchange()
            say(f"diloco: beginning at step {self.state.step:,}, an exchange every {self.diloco.every:,} steps")
            yield
        finally:
            self._leave()

    def _join(self) -> Manager:
        os.environ.setdefault("RUST_LOG", "error")  # before its library is loaded
        try:
            from torchft import Manager, ProcessGroupGloo
        except ImportError as error:
            raise AndromedaError(
                "recipe: diloco needs torchft, which is not installed; pip install 'andromeda-lm[diloco]'"
            ) from error
        from andromeda.training.copies import Copies

        logging.getLogger("torchft").setLevel(logging.CRITICAL)  # what fails is told below, in one line
        host = self.diloco.host or socket.gethostname()
        patience = timedelta(seconds=self.recipe.patience)
        connecting = min(patience, timedelta(seconds=60))
        num_bytes = 2 * sum(shared.nbytes for shared in self._shared.values())
        exchange = timedelta(seconds=60 + num_bytes / SLOWEST)  # then whoever has not come is left out
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        try:
            manager = Manager(
                pg=ProcessGroupGloo(timeout=exchange), load_state_dict=self._follow, state_dict=self._copy,
                min_replica_size=1, use_async_quorum=False, timeout=exchange, quorum_timeout=patience,
                connect_timeout=connecting, rank=0,
                world_size=1, quorum_retries=RETRIES, store_addr=host, store_port=self._store.port, hostname=host,
                lighthouse_addr=self.diloco.lighthouse, checkpoint_transport=Copies(host),
                replica_id=f"{self.recipe.seed:019}",  # all begin with the weights of the first in order
            )  # fmt: skip
        except RuntimeError as error:
            raise AndromedaError(
                f"recipe: diloco.lighthouse={self.diloco.lighthouse!r} does not answer "
                f"({str(error).splitlines()[0]}); start torchft_lighthouse there"
            ) from error
        manager.load_state_dict({"step": self._exchanges, "batches_committed": 0})
        return manager

    def after_step(self) -> dict[str, int] | None:
        step = self.state.step
        if step % self.diloco.every and step != self.recipe.num_steps:
            return None
        return self.exchange()

    def exchange(self) -> dict[str, int] | None:
        """Waits for the other groups and moves with them; whoever is behind is a copy of one that is ahead first.

        What fails is told, and this group goes on by itself until the next time.
        """
        try:
            manager = self._manager = self._manager or self._join()
            manager.start_quorum()
        except (RuntimeError, TimeoutError, AndromedaError) as error:
            self.warn(f"the lighthouse does not answer ({str(error).splitlines()[0]}); going on without the others")
            self._leave()  # a manager that failed once fails for ever
            return None
        weights = dict(self.engine.model.named_parameters())
        moves = {name: shared.detach() - weights[name].detach().cpu() for name, shared in self._shared.items()}
        for work in [manager.allreduce(move) for move in moves.values()]:
            work.wait()
        if not manager.should_commit():
            self.warn(f"step {self.state.step}: another group left while weights were exchanged; the next time counts")
            return None
        if any(move.any() for move in moves.values()):  # else all have just begun
            for name, move in moves.items():
                self._shared[name].grad = move
            self._outer.step()
        self.engine.take(self._shared)
        self._exchanges = manager.current_step()
        return {"step": self.state.step, "groups": manager.num_participants()}

    def _leave(self) -> None:
        if self._manager is not None:
            self._manager.shutdown(wait=False)
            self._manager = None

    def save(self, folder: Path) -> None:
        save_tensors(folder / FILE, self._together(), {EXCHANGES: str(self._exchanges)})

    # ---- copies --------------------------------------------------------------------------------------

    def _copy(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """All that another group needs to be like this one."""
        tensors = {f"weights/{name}": tensor for name, tensor in self.engine.weights().items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self.engine.optimizer_tensors().items()}
        tensors |= {f"together/{name}": tensor for name, tensor in self._together().items()}
        return tensors, {"counts": json.dumps({name: getattr(self.state, name) for name in COUNTS})}

    def _follow(self, copy: tuple[Mapping[str, Tensor], Mapping[str, str]]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}, "together": {}}
        for name, tensor in copy[0].items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        self.engine.take(parts["weights"])
        if parts["optimizer"]:  # none before the first step
            self.engine.restore(parts["optimizer"])
        self._take(parts["together"])
        for name, count in json.loads(copy[1]["counts"]).items():
            setattr(self.state, name, count)

    def _together(self) -> dict[str, Tensor]:
        """The shared weights, and the outer optimizer's momentum where it has one."""
        tensors = {f"shared/{name}": shared.detach() for name, shared in self._shared.items()}
        for name, shared in self._shared.items():
            if shared in self._outer.state:
                tensors[f"momentum/{name}"] = self._outer.state[shared]["momentum_buffer"]
        return tensors

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        for name, shared in self._shared.items():
            shared.data.copy_(tensors[f"shared/{name}"])
            if (momentum := tensors.get(f"momentum/{name}")) is not None:
                self._outer.state[shared]["momentum_buffer"] = momentum.clone()
