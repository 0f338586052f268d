"""The C++ kernels beside this file, compiled when they are first wanted and kept in the user's cache directory.

What is compiled is this package's own source, by the C++ compiler that is found ($CXX, or one by its usual names), in
about two seconds; by each process where nothing can be kept. Without a compiler, or where it fails, there is no
library, and what is written in plain PyTorch runs.
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
    name, sources = f"cpu-{key.hexdigest()[:24]}.so", [path for path in files if path.suffix == ".cpp"]
    directory = _directory()
    if directory is None:  # what is loaded outlives its file
        with tempfile.TemporaryDirectory() as passing:
            return _open(_compile(sources, flags, Path(passing) / name))
    kept = directory / name
    if kept.exists():
        try:
            return _open(kept)
        except (OSError, AttributeError) as error:  # empty after a crash of the machine, say, or of another machine
            LOG.warning("%s is compiled anew: %s", kept, error)
    return _open(_compile(sources, flags, kept))


def _open(path: Path) -> ctypes.CDLL:
    kernels = ctypes.CDLL(str(path))
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


def _compile(sources: list[Path], flags: tuple[str, ...], to: Path) -> Path:
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
                return made.replace(to)  # whole, whoever else compiles
            problem = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
    raise _NoLibraryError(f"{compiler} failed: {problem}")


def _directory() -> Path | None:
    """Where it is kept. None: the user has no such place, or others may write there, and what lies there is run."""
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "andromeda"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except (OSError, RuntimeError):  # nobody's home
        return None
    own = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return directory if own and os.access(directory, os.W_OK) else None
