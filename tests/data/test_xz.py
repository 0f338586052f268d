"""Every stream of an .xz file is read, and what is no stream is told of."""

from __future__ import annotations

import io
import lzma
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.data import xz

ONE, TWO = lzma.compress(b"tiger" * 9), lzma.compress(b"worm")


def read(path: Path, data: bytes) -> bytes:
    path.write_bytes(data)
    with xz.opened(path) as file:
        return file.read()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (ONE, b"tiger" * 9),
        (ONE + TWO, b"tiger" * 9 + b"worm"),
        (ONE + bytes(8) + TWO + bytes(1 << 17), b"tiger" * 9 + b"worm"),  # padding, as the format allows
        (lzma.compress(b"") + TWO, b"worm"),
    ],
)
def test_all_streams_are_read(tmp_path: Path, data: bytes, expected: bytes) -> None:
    assert read(tmp_path / "a.xz", data) == expected


@pytest.mark.parametrize("place", [2, 30])
def test_a_stream_that_is_damaged_at_its_beginning_is_not_the_end(tmp_path: Path, place: int) -> None:
    damaged = TWO[:place] + bytes([TWO[place] ^ 255]) + TWO[place + 1 :]
    with pytest.raises(lzma.LZMAError):
        read(tmp_path / "a.xz", ONE + damaged)


def test_other_bytes_behind_a_stream(tmp_path: Path) -> None:
    with pytest.raises(lzma.LZMAError):
        read(tmp_path / "a.xz", ONE + b"something else")


@pytest.mark.parametrize("left", [1, 20, len(TWO) - 1])
def test_a_stream_that_is_cut_short(tmp_path: Path, left: int) -> None:
    with pytest.raises(EOFError):
        read(tmp_path / "a.xz", ONE + TWO[:left])


@given(
    st.lists(st.binary(max_size=99), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 99)), max_size=5),
)
def test_it_is_read_from_any_place_as_parquet_is(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], visits: Sequence[tuple[int, int]]
) -> None:
    path, whole = tmp_path_factory.mktemp("xz") / "a.xz", io.BytesIO(b"".join(parts))
    path.write_bytes(b"".join(map(lzma.compress, parts)))
    with xz.opened(path) as file:
        for place, length in visits:
            assert file.seek(min(place, len(whole.getvalue()))) == whole.seek(min(place, len(whole.getvalue())))
            assert file.read(length) == whole.read(length)
            assert file.tell() == whole.tell()
        assert file.seek(0, os.SEEK_END) == len(whole.getvalue())
