"""Data sets of the Hugging Face hub, read row by row as they come over the network, by the package `datasets`.

A revision is a commit, so the same spec reads the same rows, and its name is fingerprint enough. A folder of the corpus
may stand for a repository (`hub: ./folder`): its files are then the fingerprint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from andromeda.data import files
from andromeda.errors import AndromedaError

COMMIT = re.compile("[0-9a-f]{40}")
SHOWN = 300  # characters of what `datasets` says


@dataclass(frozen=True)
class Hub:
    """One split of a data set.

    Attributes:
        name: of the repository, as in allenai/c4; or a folder of the corpus, as in ./c4.
        split: such as train.
        revision: the commit, of a repository.
        config: of those that have several.

    Raises:
        AndromedaError: a repository without a commit, or a folder with one or outside the corpus.
    """

    name: str
    split: str
    revision: str | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        if self.is_folder:
            if self.revision is not None or ".." in Path(self.name).parts:
                raise AndromedaError(f"hub: {self.name} is a folder of the corpus: no `revision`, and no ..")
        elif not COMMIT.fullmatch(self.revision or ""):
            raise AndromedaError(
                f"hub: {self.name} needs the `revision` that is meant, a commit of 40 digits, for without it the same "
                f"spec would read other rows one day; it stands at huggingface.co/datasets/{self.name}/commits/main"
            )

    @property
    def is_folder(self) -> bool:
        return self.name.startswith("./")

    @property
    def where(self) -> str:
        """What documents' places begin with: repository, commit, configuration and split."""
        commit = f"@{self.revision[:12]}" if self.revision else ""
        return "/".join(part for part in (f"{self.name}{commit}", self.config, self.split) if part)

    def files(self, corpus: Path) -> list[Path]:
        """Those of a folder, in the order of their names; none of a repository.

        Raises:
            AndromedaError: there is no such folder, one in it cannot be listed, or a name in it is not UTF-8.
        """
        if not self.is_folder:
            return []
        if not (corpus / self.name).is_dir():
            raise AndromedaError(f"hub: no folder {self.name} in {corpus}; is that the corpus?")
        return sorted(files.matching(corpus / self.name, "**", f"hub: {self.name}"))

    def rows(self, corpus: Path, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """
        Args:
            columns: those that are needed; a row without one of them is given whole.

        Raises:
            AndromedaError: there is no such data set, it cannot be reached, or not to its end, that takes a package, or
                `datasets` would take a folder for the repository.
        """
        if not self.is_folder and Path(self.name).exists():
            raise AndromedaError(
                f"{self.where}: datasets would read the folder {Path(self.name).absolute()} instead; run the command "
                "elsewhere, or name a folder of the corpus as ./folder"
            )
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise AndromedaError(f"{self.where}: needs a package; pip install 'andromeda-lm[hub]'") from error
        name, number = str(corpus / self.name) if self.is_folder else self.name, 0
        try:
            found = load_dataset(name, self.config, split=self.split, revision=self.revision, streaming=True)
            for row in found:
                yield {column: row[column] for column in columns} if all(c in row for c in columns) else row
                number += 1
        except Exception as error:  # those of `datasets`, of its network and of its file formats have no common kind
            said = " ".join(str(error).split())[:SHOWN]
            raise AndromedaError(
                f"{self.where}, after row {number}: cannot be read by datasets ({type(error).__name__}: {said}); look "
                "at the name, the split and the network, and run the same command again"
            ) from error
