"""Training small enough for a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.commands.launcher import Launcher
from tests.commands.runs import write_recipe


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No summary, no long measurement; and so small a model is slower on two threads."""
    monkeypatch.setattr("andromeda.commands.session.summarise", lambda *_: True)
    monkeypatch.setattr("andromeda.training.metrics.PEAK_SECONDS", 0.0)
    monkeypatch.setattr("andromeda.training.metrics.PEAK_SIZE", {"cpu": 64, "cuda": 64})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Starts the two processes of a run."""
    return Launcher(tmp_path_factory.mktemp("logs"))
