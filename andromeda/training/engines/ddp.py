"""A whole model in each process, and a part of each batch: PyTorch's DistributedDataParallel adds the gradients up."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.nn.parallel import DistributedDataParallel

from andromeda.training.engines.single import Engine


class DDP(Engine):
    """`Engine` of several processes, each of which holds all weights and the optimizer's whole state."""

    def wrap(self) -> None:
        self.objective = self._wrapped = DistributedDataParallel(self.objective)
        self.averaged_over = self.processes.ranks

    def adding_up(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._wrapped.no_sync()
