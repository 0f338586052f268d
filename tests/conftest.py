"""What every test shares: a fair share of the processor, reproducible properties, and no silent skip without a GPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

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
    settings.register_profile("andromeda", deadline=None, print_blob=True)  # a busy machine is no failure
    settings.load_profile("andromeda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_readme.py")  # a minute; last, it would keep one worker alone


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    with quick_interpreter():
        yield
