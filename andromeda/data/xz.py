"""Files of .xz: all their streams, and what padding is between them.

`lzma.open` takes a stream that is damaged at its beginning, or stands behind padding, for the end of the file.
"""

from __future__ import annotations

import io
import lzma
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

BLOCK = 1 << 16  # bytes that are read at a time


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """
    Raises:
        OSError, lzma.LZMAError, EOFError: here and within the block; EOFError where the file ends within a stream.
    """
    with path.open("rb") as file, io.BufferedReader(_Streams(file), BLOCK) as streams:
        yield streams


class _Streams(io.RawIOBase):
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._begin()

    def _begin(self) -> None:
        self._file.seek(0)
        self._stream, self._given, self._position = lzma.LZMADecompressor(), b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if self._stream.eof and not self._next_stream():
                return 0
            if not self._given and self._stream.needs_input:
                self._given = self._file.read(BLOCK)
                if not self._given:
                    raise EOFError("it ends within a stream")
            data, self._given = self._stream.decompress(self._given, len(buffer)), b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _next_stream(self) -> bool:
        rest = self._stream.unused_data
        while not (rest := rest.lstrip(b"\0")):
            if not (rest := self._file.read(BLOCK)):
                return False
        self._stream, self._given = lzma.LZMADecompressor(), rest
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Reads up to there, from the beginning if it lies behind."""
        if whence == os.SEEK_END:
            while self.read(BLOCK):
                pass
        target = offset if whence == os.SEEK_SET else self._position + offset
        if target < self._position:
            self._begin()
        while self._position < target and self.read(min(BLOCK, target - self._position)):
            pass
        return self._position
