"""Files, compressed or not: their names, bytes, lines and text, and what can be wrong with them."""

from __future__ import annotations

import errno
import gzip
import hashlib
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from andromeda.data import xz
from andromeda.errors import AndromedaError

COMPRESSED = (".gz", ".xz", ".zst")
BLOCK = 1 << 20  # bytes
MOST_WINDOW = 31  # the longest that zstd can look back, in powers of two of bytes; large public dumps use all of it


def matching(folder: Path, pattern: str, who: str) -> set[Path]:
    """All that a pattern matches; folders only where it does not end in *, for then they may be meant.

    ** enters no links to folders.

    Raises:
        AndromedaError: it is no pattern, a folder cannot be listed, or a name is not UTF-8; `who` asks for it.
    """
    parts = Path(pattern).parts
    if parts[-1:] == ("**",):
        parts = (*parts, "*")  # as Python has read it since 3.13
    try:
        for number, part in enumerate(parts):
            if any(character in part for character in "*?["):
                above = parts[: number + (part == "**")]  # ** looks into all that it matches
                _check_listed(folder.glob("/".join(above)) if above else [folder], who)
        found = {path for path in folder.glob("/".join(parts)) if parts[-1] != "*" or not path.is_dir()}
    except (ValueError, IndexError) as error:
        raise AndromedaError(f"{who}: {pattern!r} is no pattern of files; write one such as poems/*.jsonl") from error
    for path in found:
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise AndromedaError(f"{who}: {str(path)!a}: its name is not UTF-8; rename the file") from error
    return found


def _check_listed(folders: Iterable[Path], who: str) -> None:
    """What cannot be listed glob would pass over in silence."""
    for folder in folders:
        if folder.is_dir():
            try:
                os.scandir(folder).close()
            except OSError as error:
                raise AndromedaError(f"{who}: {folder}: cannot be listed: {error.strerror}") from error


def kind(path: Path) -> str:
    """The suffix, that of a compression left out: .jsonl of poems.jsonl.xz."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


class MissingPackageError(AndromedaError):
    """A file's kind takes a package that is not installed: nothing is wrong with the file."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(f"{name}: needs a package for {kind}; pip install 'andromeda-lm[data]'")


class DamagedError(AndromedaError):
    """A compressed file that is not what was compressed: checksums stand at the end, so what was read may be wrong."""


@contextmanager
def opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed.

    Args:
        name: of the file, in messages.

    Raises:
        AndromedaError: it cannot be read or decompressed, here or within the block; MissingPackageError where that
            takes a package, DamagedError where what was read already may be wrong.
    """
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": xz.opened}
    damaged: tuple[type[Exception], ...] = (gzip.BadGzipFile, lzma.LZMAError, zlib.error)
    if path.suffix == ".zst":
        zstd = _zstd(name)
        openers[".zst"] = partial(zstd.open, options={zstd.DecompressionParameter.window_log_max: MOST_WINDOW})
        damaged = (*damaged, zstd.ZstdError)
    try:
        if _checked_size(path) == 0 and path.suffix in COMPRESSED:  # to gzip, an archive of nothing
            raise EOFError("it is empty")
        with openers.get(path.suffix, partial(open, mode="rb"))(path) as file:
            yield file
    except EOFError as error:
        raise AndromedaError(f"{name}: cannot be decompressed ({error}); fetch the file again") from error
    except damaged as error:
        raise DamagedError(f"{name}: cannot be decompressed ({error}); fetch the file again") from error
    except OSError as error:
        raise AndromedaError(f"{name}: cannot be read: {error.strerror or error}") from error


def sha256(path: Path) -> str:
    """Of a file's bytes as they lie there.

    Raises:
        AndromedaError: it cannot be read.
    """
    try:
        _checked_size(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AndromedaError(f"{path}: cannot be read: {error.strerror or error}") from error


def _checked_size(path: Path) -> int:
    """Its bytes; raises where it is no file, for to open a pipe is to wait for ever."""
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no file, but a pipe, socket or device")
    return found.st_size


def _zstd(name: str) -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise MissingPackageError(name, ".zst") from error
    return zstd


def lines(file: IO[bytes], longest: int) -> Iterator[bytes | None]:
    """The lines of a file with their ends; None for one above `longest` bytes, which is never held as a whole."""
    while line := file.readline(longest + 1):
        if len(line) <= longest:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(BLOCK)
        yield None


def decode(data: bytes, where: str) -> str:
    """UTF-8, without a byte order mark.

    Raises:
        AndromedaError: it is something else; `where` says of what.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AndromedaError(
            f"{where}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}); convert it, with iconv say"
        ) from error


def check_unicode(text: str, where: str, name: str) -> str:
    """The text itself.

    Raises:
        AndromedaError: it holds a lone surrogate, which JSON can spell and UTF-8 cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AndromedaError(
            f"{where}: {name} is not valid Unicode (a lone surrogate at character {error.start}); drop the line"
        ) from error
    return text
