"""A part of the weights, of the gradients and of the optimizer's state in each process, off the GPU where asked:
DeepSpeed's ZeRO-3 (Rajbhandari et al. 2020, arXiv:1910.02054) and ZeRO-Infinity (2021, arXiv:2104.07857).

Each parameter is a sub-group of its own, as DeepSpeed calls what it brings into memory together. Weights are float32
here too; the objective's autocast makes products in bfloat16. DeepSpeed's own checkpoints are not used: docs/LOG.md.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.training.engines import async_io
from andromeda.training.engines.single import Engine
from andromeda.training.imports import no_warnings
from andromeda.training.nebula.objective import Mixed
from andromeda.training.objective import Batch
from andromeda.training.processes import Processes
from andromeda.training.recipe import Recipe
from andromeda.training.state import by_parameter, set_generators

INSTALL = "pip install 'andromeda-lm[deepspeed]'"
BUCKET = 50_000_000  # numbers that are exchanged together
GATHERED = 200_000_000  # weights that are kept whole because they are needed again soon
# Parameters on NVMe that are whole at the same time: the logits' matrix, the four of a block, and one to spare.
BUFFERS = 6
STATES = 4  # that AdamW needs of a parameter in memory: itself, its gradient and two moments


class ZeRO3(Engine):
    """`Engine` of one or several processes that share everything out; a checkpoint is gathered by the first."""

    def __init__(self, recipe: Recipe, model: Andromeda, processes: Processes) -> None:
        self._library, self._config = _import(), _config(recipe, model, processes)
        _join_alone(processes)
        super().__init__(recipe, model, processes)
        self.averaged_over = processes.ranks
        self._engine, *_ = self._library.initialize(model=self.objective, optimizer=self.optimizer, config=self._config)
        self._zero = self._engine.optimizer

    @property
    def num_learned(self) -> int:
        return sum(parameter.ds_numel for _, parameter, _ in self._groups())  # type: ignore[attr-defined]

    def place(self, model: Andromeda) -> Andromeda:
        """Shares the parameters out one by one, so the model need not fit on the device."""
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.processes.device))
        # Without it DeepSpeed does so itself, and on a CPU through buffers in bfloat16: docs/LOG.md.
        self._library.zero.Init(module=model, config_dict_or_path=self._config)
        return model

    def accumulate(self, batch: Batch | Mixed, divisor: Tensor | float, last: bool) -> Tensor:
        """Each batch's gradient is shared out at once: whole ones would need as much memory as the weights.

        Raises:
            AndromedaError: out of memory; what DeepSpeed was about is lost then.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        try:
            totals = self.plain.totals(self._engine(batch))
            self._engine.backward(totals[0] * self.averaged_over / divisor)
        except torch.OutOfMemoryError as error:
            raise AndromedaError(
                "training: out of memory, and engine='zero3' cannot try a step again; set checkpointing=full, or less "
                "in batch_size or in the length of sequences"
            ) from error
        return totals.detach()

    def clip(self) -> Tensor:
        """`move` clips; this is the norm by which it will."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norm: Tensor = combine_grad_norm_groups(self._zero._get_norm_groups())
        return norm

    def step(self) -> None:
        self._engine.step()

    def forget(self) -> None:
        """As DeepSpeed does after an overflow: the next batch's gradient then takes the place of this one."""
        self._zero._overflow_clean_up(1.0)

    @contextmanager
    def whole(self) -> Iterator[None]:
        matrices = nn.Linear | nn.Embedding
        modules = [module for module in self.model.modules() if not isinstance(module, matrices)]
        small = [parameter for module in modules for parameter in module.parameters(recurse=False)]
        with self._library.zero.GatheredParameters(small):
            yield

    def weights(self) -> Mapping[str, Tensor]:
        kept = {}
        for name, parameter in self.model.named_parameters():
            with self._library.zero.GatheredParameters(parameter):
                if self.processes.first:
                    kept[name] = parameter.detach().to("cpu", copy=True)
        return kept

    def optimizer_tensors(self) -> Mapping[str, Tensor]:
        kept = {}
        for name, parameter, group in self._groups():
            with self._in_memory(group) as (_, state):
                for key, value in state.items():
                    whole = value if value.dim() == 0 else self._gathered(value, parameter)
                    if self.processes.first:
                        kept[f"{name}/{key}"] = whole.to("cpu", copy=True)
        return kept

    def take(self, weights: Mapping[str, Tensor]) -> None:
        self._zero._partition_all_parameters()
        for name, parameter, group in self._groups():
            with self._in_memory(group, changed=True) as (weight, _):
                weight.data.copy_(self.part(weights[name], parameter))
                self._zero._reassign_or_swap_out_partitioned_parameters(group)  # what the forward pass gathers

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        held, generators = by_parameter(tensors, [name for name, *_ in self._groups()])
        for name, parameter, group in self._groups():
            with self._in_memory(group, changed=True) as (weight, state):
                for key, whole in held[name].items():
                    value = (whole if whole.dim() == 0 else self.part(whole, parameter)).to(weight.device)
                    if key in state:  # on NVMe its file belongs to this very tensor
                        state[key].copy_(value)
                    else:
                        state[key] = value.clone()
        set_generators(generators)

    def part(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """Flat; the last process' is filled up with zeros."""
        size: int = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        flat = F.pad(tensor.flatten(), (0, size * self.processes.ranks - tensor.numel()))
        return flat[size * self.processes.rank :][:size]

    def _gathered(self, part: Tensor, parameter: Tensor) -> Tensor:
        part = part.detach().to(self.processes.device)
        parts = [torch.empty_like(part) for _ in range(self.processes.ranks)]
        dist.all_gather(parts, part)
        shape = parameter.ds_shape  # type: ignore[attr-defined]
        return torch.cat(parts)[: shape.numel()].view(shape)

    def _groups(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Each parameter with its name and the number of its sub-group, in which it is alone."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group, (parameter,) in enumerate(self._zero.fp16_groups):
            yield names[id(parameter)], parameter, group

    @contextmanager
    def _in_memory(self, group: int, changed: bool = False) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """This process' part of a parameter, flat, and of its state, from NVMe if they are there."""
        swapped = self._zero._swappable_optimizer_subgroup(group)
        if swapped:
            self._zero._optimizer_states_and_gradient_swap_in(group)
        weight = self._zero.fp32_partitioned_groups_flat[group]
        yield weight, self.optimizer.state[weight]
        if swapped and changed:
            self._zero._optimizer_states_and_gradient_swap_out(group)
        elif swapped:
            self._zero._release_swap_buffers(group)


def check(recipe: Recipe) -> None:
    """Before any work.

    Raises:
        AndromedaError: DeepSpeed is not installed or cannot be imported, what it needs for NVMe is not built, or its
            directory does not serve.
    """
    if find_spec("deepspeed") is None:
        raise AndromedaError(f"recipe: engine='zero3' needs deepspeed, which is not installed; {INSTALL}")
    _import()
    if recipe.offload == "nvme":
        assert recipe.nvme_path is not None
        _check_directory(Path(recipe.nvme_path))
        async_io.check()


def _check_directory(path: Path) -> None:
    """That files in it can be written past the system's cache, as async_io does."""
    probe = path / f".andromeda-{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600))
        probe.unlink()
    except OSError as error:
        raise AndromedaError(
            f"recipe: nvme_path={str(path)!r}: files cannot be written there directly ({error.strerror}); name a "
            "directory on a disk of this machine"
        ) from error


def _import() -> ModuleType:
    """DeepSpeed, which then speaks of errors alone. Raises AndromedaError where it cannot be imported."""
    try:
        with no_warnings():
            import deepspeed
    except Exception as error:
        what = str(error).splitlines()[0]
        raise AndromedaError(
            f"recipe: engine='zero3' needs deepspeed, which cannot be imported here: {what}"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    # Sums through shared memory, for its inference on CPUs: minutes to build, and nothing here uses them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _join_alone(processes: Processes) -> None:
    """A group of this process alone, where no launcher made one."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if processes.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _config(recipe: Recipe, model: Andromeda, processes: Processes) -> dict[str, Any]:
    """DeepSpeed's own, of https://www.deepspeed.ai/docs/config-json."""
    zero: dict[str, Any] = {
        "stage": 3,
        "sub_group_size": 1,  # numbers at least: so each parameter
        "reduce_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_live_parameters": GATHERED,
        "stage3_max_reuse_distance": GATHERED,
        "stage3_param_persistence_threshold": 10 * model.config.dim,  # gains and norms are whole everywhere
    }
    if recipe.offload != "none":
        place: dict[str, Any] = {"device": recipe.offload}
        if recipe.offload == "nvme":
            place["nvme_path"] = str(_swap_directory(recipe, processes))
            # What is gathered ahead holds a buffer, and validation takes another way than the trace it follows.
            zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
        largest = max(-(-p.numel() // processes.ranks) for p in model.parameters())
        zero["offload_optimizer"] = {**place, "buffer_count": STATES}
        zero["offload_param"] = {**place, "buffer_count": BUFFERS, "buffer_size": largest, "max_in_cpu": 0}
    return {
        "train_micro_batch_size_per_gpu": 1,  # for its own figures
        "gradient_clipping": recipe.clip_norm or 0.0,
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's fused AdamW takes the same steps on every device
        "zero_optimization": zero,
    }


def _swap_directory(recipe: Recipe, processes: Processes) -> Path:
    """A new one of this process, in one of the run; what a killed run left there is removed."""
    assert recipe.nvme_path is not None
    run = hashlib.sha256(os.path.realpath(recipe.output).encode()).hexdigest()[:16]
    shared = Path(recipe.nvme_path) / f"andromeda-{run}"
    if processes.first:
        shutil.rmtree(shared, ignore_errors=True)
    processes.wait()
    own = shared / str(processes.rank)
    shutil.rmtree(own, ignore_errors=True)  # where each machine has a disk of its own
    own.mkdir(parents=True)
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own
