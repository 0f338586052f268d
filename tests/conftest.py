"""What every test shares: a fair share of the processor, reproducible properties, and no silent skip without a GPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings

from tests.interpreter import quick_interpreter

if not torch.cuda.is_available():  # then Triton's interpreter runs the kernels; it is chosen before they are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu" and not torch.cuda.is_available():
        raise pytest.UsageError("these tests need a CUDA device, and torch finds none")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = max(1, torch.get_num_threads() // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start
    examples = 200 if config.option.markexpr.startswith("hypothesis") else 50  # others each time
    settings.register_profile("andromeda", deadline=None, print_blob=True, max_examples=examples)  # busy is no failure
    settings.load_profile("andromeda")


LONGEST = [  # the first takes a minute, the last half of one; at the end they would keep one worker alone
    "test_readme.py", "test_train.py", "test_flash.py", "test_engines.py", "test_context.py", "test_bad_input.py",
    "test_decode.py", "test_context_parallel.py", "test_bench.py", "test_train_faults.py", "test_loss.py",
    "test_stages.py", "test_train_tasks.py", "test_full_build.py", "test_prefill.py", "test_train_many.py",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run on one worker, so that what they share is built once. Those for a GPU stand in few files."""
    from xdist.scheduler import LoadFileScheduling

    if config.option.markexpr == "gpu" or config.option.dist != "load":
        return None
    config.option.loadscopereorder = False  # the order is that of above
    return LoadFileScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Flushing helps where the power fails, and takes milliseconds. Other programs that tests start do flush."""
    with patch.object(os, "fsync", os.fstat):  # which also refuses what is no open file
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    with quick_interpreter():
        yield
