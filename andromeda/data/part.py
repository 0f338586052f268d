"""A part of a source: a run of its files, of its samples, or of its documents. See `parts` for what they are for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """One of several: number `number` of `count`, from 0 on.

    Raises:
        ValueError: there is no such part.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ValueError(f"part {self.number} of {self.count}: there is none")

    @property
    def name(self) -> str:
        return f"{self.number:05}-of-{self.count:05}"

    def of(self, number: int) -> range:
        """Which of `number` things are in this part."""
        return range(self.number * number // self.count, (self.number + 1) * number // self.count)

    def of_files(self, paths: list[Path]) -> list[Path]:
        """The files of which the first byte is in this part; one that is not there counts for nothing."""
        sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
        total = max(1, sum(sizes))
        first = [0, *accumulate(sizes)][:-1]
        return [
            path
            for path, start in zip(paths, first, strict=True)
            if min(self.count - 1, start * self.count // total) == self.number
        ]


WHOLE = Part(0, 1)
