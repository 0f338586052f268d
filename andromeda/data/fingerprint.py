"""Fingerprints of what a build reads: SHA-256 over the names and bytes of a source's files.

A build is named by them before it begins. What it read is compared with them again when a source is through, so that
a file which changes meanwhile is an error, and never a build that belongs to no corpus.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypeAlias

from andromeda.data import files
from andromeda.data.decontaminate import Decontaminate
from andromeda.data.generated import Generated
from andromeda.data.sources import Source
from andromeda.errors import AndromedaError

AnySource: TypeAlias = Source | Generated


def fingerprint(source: AnySource | Decontaminate, corpus: Path) -> str:
    """Of its files; of a data set of the hub, its name and commit. What is generated follows from the spec alone.

    Raises:
        AndromedaError: a pattern matches nothing, or a file cannot be read and the source does not say `bad: skip`.
    """
    if isinstance(source, Generated):
        return ""
    digest = hashlib.sha256()
    if isinstance(source, Source) and source.hub is not None:
        digest.update(f"{source.hub.where}\0{source.hub.revision}\n".encode())
    for path in source.paths(corpus):
        digest.update(f"{path.relative_to(corpus).as_posix()}\0{_file(source, path)}\n".encode())
    return digest.hexdigest()


def _file(source: Source | Decontaminate, path: Path) -> str:
    try:
        return files.sha256(path)
    except AndromedaError as error:
        if isinstance(source, Decontaminate):
            raise
        return source.left_out(path.name, error, "file cannot be read").reason


def check_unchanged(source: AnySource | Decontaminate, corpus: Path, key: str) -> None:
    """
    Raises:
        AndromedaError: the fingerprint is another than it was.
    """
    if fingerprint(source, corpus) != key:
        name = "decontaminate" if isinstance(source, Decontaminate) else f"source {source.name}"
        raise AndromedaError(
            f"{name}: its files changed while they were read; wait until nothing writes to {corpus}, and build in a "
            "new directory"
        )
