"""What a recipe says of LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from andromeda.errors import AndromedaError


@dataclass(frozen=True)
class LoraRecipe:
    """An adapter beside the matrices of every block."""

    TARGETS: ClassVar[tuple[str, ...]] = ("to_qkv", "to_out", "up", "down")

    rank: int = 8
    alpha: int = 16  # what is learned counts alpha / rank
    targets: list[str] = field(default_factory=lambda: list(LoraRecipe.TARGETS))
    dropout: float = 0.0  # of what the adapter reads; on one process alone

    def check(self) -> None:
        """By the recipe: jsonargparse, which builds this, would take an error here for one of its own.

        Raises:
            AndromedaError: a value out of range, or a target that is no matrix of a block.
        """
        self._require(self.rank >= 1, "rank", "must be at least 1")
        self._require(self.alpha >= 1, "alpha", "must be at least 1")
        self._require(0 <= self.dropout < 1, "dropout", "must lie in [0, 1)")
        self._require(bool(self.targets), "targets", f"names none of {', '.join(self.TARGETS)}")
        for name in self.targets:
            self._require(name in self.TARGETS, "targets", f"names {name!r}; use some of {', '.join(self.TARGETS)}")

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise AndromedaError(f"recipe: lora.{name}={getattr(self, name)!r} {what}")
