"""Directories and files that appear whole: written beside their place, flushed to the disk, then put there in one step.

A process killed at any moment, or a machine that loses power, leaves the old one or the new one: never a mix, never
neither. Beside a directory `NAME`, in the same parent, there may be for a while

* `.NAME.tmp-PID-MACHINE-TOKEN`, a directory being written, or one being removed. Its writer holds a lock on it that
  the kernel drops when the writer dies, so the next writer of NAME knows what to clean up;
* `.NAME.old`, the last complete version, only where the file system cannot exchange two directories in one step
  (NFS, for one) and only between two renames. `latest` finds it, and the next writer puts it back.

Writing directories needs a POSIX system; reading them does not, nor do files.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from andromeda.errors import AndromedaError

ABANDONED_SECONDS = 86400.0  # age at which a directory goes whose writer's lock cannot be seen from here


@contextmanager
def atomic_directory(target: str | Path, *, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yields a new, empty directory, which takes the place of `target` when the block ends without an exception.

    The old directory is replaced whole: what is not written again is gone. A symbolic link is followed, and what it
    points to is replaced. Several writers may work at the same time; the last one to end wins.

    Args:
        target: the directory; its parents are made where they are missing.
        replaceable: whether a directory that is not empty may be replaced, asked before anything is written.

    Raises:
        AndromedaError: `target` may not or cannot be replaced, or writing failed (the disk is full, say); what was
            there before is then unchanged.
    """
    target = Path(os.path.realpath(target))
    with _explained(target, "what was there before is unchanged; free space, or choose another place"):
        new_parents = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent):
            _recover(target)
            _check_replaceable(target, replaceable)
            _remove_abandoned(target)
            temporary = _make_temporary(target)
            lock = _lock(temporary, wait=True)
    try:
        with _explained(target, "what was there before is unchanged; free space, or choose another place"):
            yield temporary
            for path in (temporary, *temporary.rglob("*")):
                _sync(path)
            with locked(target.parent):
                _publish(temporary, target)
        with _explained(target, "the new version is in place, but may not outlive a power failure"):
            for parent in (target, *new_parents):
                _sync(parent.parent)
    finally:
        # Here lies either the old directory or a failed new one. What cannot be removed, the next writer removes.
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(lock)


def latest(target: str | Path) -> Path:
    """Where the last complete version of a directory lies that `atomic_directory` writes: for readers."""
    target = Path(os.path.realpath(target))
    aside = _aside(target)
    return aside if not target.exists() and aside.exists() else target


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file as `.NAME.tmp-PID` beside its place, and renames it.

    Raises:
        OSError: it cannot be written; what was there before is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_replaceable(target: Path, replaceable: Callable[[Path], bool]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise AndromedaError(f"{target}: is a file, and a directory is to be written there; choose another name")
    if os.path.ismount(target) or target.samefile(Path.cwd()):
        what = "a mount point" if os.path.ismount(target) else "the current directory"
        raise AndromedaError(f"{target}: is {what}, which cannot be replaced; choose a directory below it")
    if any(target.iterdir()) and not replaceable(target):
        raise AndromedaError(
            f"{target}: holds other files, which would be lost; choose a new directory, or empty this one first"
        )


@contextmanager
def _explained(target: Path, consequence: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AndromedaError(f"{target}: cannot be written: {error}; {consequence}") from error


# ---- putting a directory in its place ------------------------------------------------------------


def _publish(temporary: Path, target: Path) -> None:
    """Puts `temporary` in the place of `target`; the old directory, if any, is then where `temporary` was."""
    if not target.exists():
        os.rename(temporary, target)
        return
    shutil.copymode(target, temporary)
    if not _exchange(temporary, target):
        _exchange_by_renames(temporary, target)


def _exchange_by_renames(temporary: Path, target: Path) -> None:
    _recover(target)
    aside = _aside(target)
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(aside, target)
        raise
    os.rename(aside, temporary)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two directories in one step; False where the system or the file system cannot.

    Linux: renameat2(2) with RENAME_EXCHANGE; macOS: renamex_np(2) with RENAME_SWAP.
    """
    names = os.fsencode(one), os.fsencode(other)
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        current_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        failed = libc.renameat2(current_directory, names[0], current_directory, names[1], exchange)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        swap = 2  # RENAME_SWAP
        failed = libc.renamex_np(*names, swap)
    else:
        return False
    code = ctypes.get_errno()
    if failed and code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        raise OSError(code, os.strerror(code), str(other))
    return not failed


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _recover(target: Path) -> None:
    """After a writer died between the two renames: the old version goes back; after the second: it goes."""
    aside = _aside(target)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        os.rename(aside, target)


def _sync(path: Path) -> None:
    """Flushes a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems flush no directories; PostgreSQL (fd.c, fsync_fname_ext) goes on as well.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)


# ---- temporary directories and their writers -----------------------------------------------------


def _make_temporary(target: Path) -> Path:
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}-{_machine()}-{secrets.token_hex(4)}")
    temporary.mkdir()
    return temporary


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _remove_abandoned(target: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.tmp-\d+-([0-9a-f]{{8}})-[0-9a-f]{{8}}")
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and _is_abandoned(path, on_this_machine=match[1] == _machine()):
            shutil.rmtree(path, ignore_errors=True)  # its own writer may be removing it right now


def _is_abandoned(temporary: Path, on_this_machine: bool) -> bool:
    """Whether the writer is dead: by its lock, or by age where the lock cannot be seen."""
    if on_this_machine:
        try:
            lock = _lock(temporary, wait=False)
        except (BlockingIOError, FileNotFoundError):  # held; or just gone
            return False
        if lock is not None:
            _unlock(lock)
            return True
    try:
        return time.time() - temporary.stat().st_mtime > ABANDONED_SECONDS
    except FileNotFoundError:
        return False


@contextmanager
def locked(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """One process at a time, where the file system has locks; the lock dies with its process.

    `atomic_directory` makes, cleans up and renames directories under the lock of their parent, and never holds it while
    files are written.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
    """
    lock = _lock(directory, wait)
    try:
        yield
    finally:
        _unlock(lock)


def _lock(directory: Path, wait: bool) -> int | None:
    """Takes the lock on a directory; None where the file system has no locks. Errors are those of `locked`."""
    import fcntl  # POSIX alone; readers do without

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is None:
        return
    import fcntl

    fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough where a forked child holds the descriptor too
    os.close(lock)
