"""The C++ kernels beside this file, compiled when they are first wanted and kept in the user's cache directory.

What is compiled is this package's own source, by the C++ compiler that is found ($CXX, or one by its usual names), in
about two seconds. Without one, or where it fails, there is no library, and what is written in plain PyTorch runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

LOG = logging.getLogger(__name__)
SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd")
SECONDS = 120.0  # that a compiler may take
_left_out = False


class _NoLibraryError(Exception):
    """Why there is none."""


def library() -> ctypes.CDLL | None:
    """The kernels of this machine; None where it has none, which is said once in the log."""
    return None if _left_out else _found()


@contextmanager
def without_library() -> Iterator[None]:
    """Within the block there is none: for tests and comparisons."""
    global _left_out
    before, _left_out = _left_out, True
    try:
        yield
    finally:
        _left_out = before


@functools.cache
def _found() -> ctypes.CDLL | None:
    try:
        return _load()
    except (_NoLibraryError, OSError) as error:
        LOG.warning("texts are written by the slower path in plain PyTorch: %s", error)
        return None


def _load() -> ctypes.CDLL:
    flags = (*FLAGS, *_machine_flags())
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    key = hashlib.sha256(repr((flags, sys.platform, platform.machine())).encode())
    for path in files:
        key.update(path.read_bytes())
    kept = _directory() / f"cpu-{key.hexdigest()[:24]}.so"
    if not kept.exists():
        _compile([path for path in files if path.suffix == ".cpp"], flags, kept)
    kernels = ctypes.CDLL(str(kept))
    for name in ("andromeda_linear", "andromeda_attention", "andromeda_blocks"):
        kernels[name].restype = None
    return kernels


def _machine_flags() -> tuple[str, ...]:
    if sys.platform == "win32":
        raise _NoLibraryError("it is not made for Windows")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ()
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise _NoLibraryError("the processor has no AVX2")
    return ("-march=x86-64-v3",)


def _compile(sources: list[Path], flags: tuple[str, ...], to: Path) -> None:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise _NoLibraryError("there is no C++ compiler; install g++ 12 or newer, or clang")
    problem = ""
    with tempfile.TemporaryDirectory(dir=to.parent) as directory:
        made = Path(directory) / to.name
        for threads in (("-fopenmp",), ()):  # Apple's compiler has no OpenMP; one thread then
            command = [*shlex.split(compiler), *flags, *threads, *map(str, sources), "-o", str(made)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            except subprocess.TimeoutExpired:
                raise _NoLibraryError(f"{compiler} took more than {SECONDS:.0f} s") from None
            if done.returncode == 0:
                made.replace(to)  # whole, whoever else compiles
                return
            problem = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
    raise _NoLibraryError(f"{compiler} failed: {problem}")


def _directory() -> Path:
    """Where it is kept: the user's own, for what lies there is run."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "andromeda"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise _NoLibraryError(f"{directory} is not yours alone to write to; chmod 700 it")
    return directory
