"""Sections of a recipe that name files."""

from __future__ import annotations

from dataclasses import dataclass, field

Names = list[str] | str


@dataclass(frozen=True)
class Files:
    """Files to train on and to validate on, one or several each."""

    train: Names = field(default_factory=list)
    validation: Names = field(default_factory=list)

    @property
    def train_paths(self) -> list[str]:
        return listed(self.train)

    @property
    def validation_paths(self) -> list[str]:
        return listed(self.validation)


def listed(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else names
