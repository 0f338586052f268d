"""Processes that begin in a tenth of a second: forks of one that has imported what takes others ten seconds."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

PRELOADED = [  # what is not installed is left out
    "torch._dynamo", "torch.distributed.fsdp", "torch.nn.parallel", "deepspeed.runtime.zero.muon.muon_optimizer",
    "jsonargparse", "docstring_parser", "pytest", "hypothesis", "tests.ranks", "tests.commands.launcher",
    "tests.commands.kill_training", "andromeda.training.engines",
]  # fmt: skip


def forks() -> ForkServerContext:
    """All that ask share one server; it lives as long as the process that asked first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
