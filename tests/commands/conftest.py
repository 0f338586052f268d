"""Training small enough for a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.launcher import Launcher
from tests.commands.quick_training import quick_training
from tests.commands.runs import write_recipe


@pytest.fixture
def quick() -> Iterator[None]:
    with quick_training():
        yield


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Starts the two processes of a run."""
    return Launcher(tmp_path_factory.mktemp("logs"))
