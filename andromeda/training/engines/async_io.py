"""DeepSpeed's `async_io`, through which things go to NVMe and back: C++ that takes minutes to build, once a machine.

Run it to build: python -m andromeda.training.engines.async_io
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from andromeda.atomic import locked
from andromeda.errors import AndromedaError

NAMES = ("pin_memory", "async_io")  # the second needs the first
COMMAND = "python -m andromeda.training.engines.async_io"


def check() -> None:
    """Raises AndromedaError where it is not built."""
    if not is_built():
        raise AndromedaError(
            f"recipe: offload='nvme' needs DeepSpeed's async_io, which is not built here; `{COMMAND}` builds it, in "
            "minutes, and needs a C++ compiler and libaio's headers (libaio-dev)"
        )


def is_built() -> bool:
    from deepspeed.git_version_info import installed_ops

    if installed_ops.get("async_io"):  # with DeepSpeed itself
        return True
    return all((folder / f"{folder.name}.so").exists() and not _lock(folder).exists() for folder in _folders())


def build() -> None:
    """Builds it, where it is not yet; a killed build is taken up again.

    Raises:
        AndromedaError: something is missing for it.
    """
    builder = _builder()
    if not builder.is_compatible():
        raise AndromedaError("async_io: libaio's headers are missing; install libaio-dev (libaio-devel on Fedora)")
    first, *_ = _folders()
    with locked(first.parent):
        for folder in _folders():
            _lock(folder).unlink(missing_ok=True)  # PyTorch's, which outlives a kill and would be waited for
        try:
            builder.load()
        except RuntimeError as error:
            raise AndromedaError(f"async_io: cannot be built: {str(error).splitlines()[0]}") from error


def _builder() -> Any:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder()


def _folders() -> list[Path]:
    """Where PyTorch builds each."""
    from torch.utils.cpp_extension import _get_build_directory

    return [Path(_get_build_directory(name, verbose=False)) for name in NAMES]


def _lock(folder: Path) -> Path:
    return folder / "lock"


if __name__ == "__main__":
    build()
