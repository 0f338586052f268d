"""What the verbs read and write: text as training reads it, JSON files that appear whole, figures for a person."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from andromeda.atomic import replace_file
from andromeda.errors import AndromedaError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def read_text(path: str, name: str) -> str:
    """All of a UTF-8 file, line ends as they are, without a byte order mark.

    Args:
        name: what error messages call it.

    Raises:
        AndromedaError: it cannot be read, or is not UTF-8.
    """
    try:
        return decode(Path(path).read_bytes(), name)
    except OSError as error:
        raise AndromedaError(f"{name}: cannot be read: {error.strerror}; name a text file") from error


def decode(data: bytes, name: str) -> str:
    """UTF-8 bytes as `read_text` has them. Raises AndromedaError for others."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AndromedaError(f"{name}: is not UTF-8 text (byte {error.start}); convert it") from error


def check_json_path(path: str | None) -> None:
    """Before long work: that its result can be written.

    Raises:
        AndromedaError: the path is a directory, or a file of something else, or lies in none that can be written.
    """
    if path is None:
        return
    parent = Path(os.path.realpath(path)).parent
    if Path(path).is_dir():
        raise AndromedaError(f"--json {path}: is a directory; name a file")
    if not parent.is_dir():
        raise AndromedaError(f"--json {path}: there is no directory {parent}; make it first")
    if not os.access(parent, os.W_OK):
        raise AndromedaError(f"--json {path}: the directory {parent} cannot be written; choose another place")
    if Path(path).is_file() and not _is_json(Path(path).read_bytes()):
        raise AndromedaError(f"--json {path}: holds something other than JSON, which would be lost; name another file")


def _is_json(content: bytes) -> bool:
    """Whether a file holds JSON, or nothing."""
    try:
        json.loads(content or b"null")
    except (ValueError, RecursionError):
        return False
    return True


def write_json(path: str, values: dict[str, Any]) -> None:
    """Writes a file that appears whole, or to a device or a pipe.

    Raises:
        AndromedaError: the file cannot be written.
    """
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
        else:
            replace_file(target, text)
    except OSError as error:
        raise AndromedaError(f"--json {path}: cannot be written: {error.strerror}; choose another place") from error


def say(line: str) -> None:
    """To whoever waits, at once."""
    print(line, flush=True)


def warn(text: str) -> None:
    """To whoever waits, apart from what was asked for."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


@contextmanager
def hushed(quiet: bool) -> Iterator[None]:
    """Within it a process that is to be quiet says nothing; what is raised goes on."""
    with ExitStack() as stack:
        if quiet:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123 - no path
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def plain_console(stderr: bool = False) -> Console:
    """A console that prints names as they are: brackets and colons in them mean nothing."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def plain_table(*columns: str) -> Table:
    """A table whose first column is text and the others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def plural(number: int, noun: str) -> str:
    """1 token, 2,048 tokens."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def count(number: float) -> str:
    """2.33 B, 4.10 M, 512."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{significant(number / size)} {unit}"
    return f"{number:g}"


def binary_bytes(number: float) -> str:
    """4.5 MiB, 16 KiB."""
    units = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    unit, size = next(((unit, size) for unit, size in units if number >= size), units[-1])
    return f"{number / size:,.0f} {unit}" if number >= 100 * size else f"{number / size:.3g} {unit}"


def significant(number: float) -> str:
    """Three significant digits, and all of those before the point: 0.0132, 2.20, 13,651."""
    return f"{number:,.0f}" if abs(number) >= 99.95 else f"{number:#.3g}"
