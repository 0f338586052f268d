"""A part of the weights, of the gradients and of the optimizer's state in each process: PyTorch's FSDP2.

Blocks gather their weights when they run and drop them behind (Zhao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from andromeda.training.engines.single import Engine
from andromeda.training.state import optimizer_tensors


class FSDP(Engine):
    """`Engine` of several processes that share the weights out; a checkpoint is gathered by the first."""

    def wrap(self) -> None:
        mesh = init_device_mesh(self.processes.device.type, (self.processes.ranks,))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.objective, mesh=mesh)
        self.averaged_over = self.processes.ranks

    def adding_up(self, last: bool) -> AbstractContextManager[None]:
        assert isinstance(self.objective, FSDPModule)
        self.objective.set_requires_gradient_sync(last)
        return nullcontext()

    def clip(self) -> Tensor:
        return _gathered(super().clip())

    @contextmanager
    def whole(self) -> Iterator[None]:
        modules = [module for module in self.objective.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.reshard()

    def weights(self) -> Mapping[str, Tensor]:
        return self._kept(self.model.state_dict())

    def optimizer_tensors(self) -> Mapping[str, Tensor]:
        return self._kept(optimizer_tensors(self.model, self.optimizer))

    def _kept(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One tensor whole at a time; on the CPU of the first process."""
        kept = {}
        for name, tensor in tensors.items():
            whole = _gathered(tensor)
            if self.processes.first:
                kept[name] = whole.cpu()
        return kept

    def part(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:  # a count of steps, say
            return tensor
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
