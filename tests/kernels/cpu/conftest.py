"""These tests are of the C++ kernels, so they need a compiler; where there is one it must do."""

from __future__ import annotations

import os
import shutil

import pytest

from andromeda.kernels.cpu.library import COMPILERS, library


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    if library() is None:
        found = os.environ.get("CXX") or any(map(shutil.which, COMPILERS))
        assert not found, "the C++ kernels were not compiled; the log says why"
        pytest.skip("there is no C++ compiler")
