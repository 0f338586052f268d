"""What a run writes down as it goes: metrics.jsonl, heads.jsonl, and the dashboards that its recipe names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from andromeda.training.metrics import MetricsFile, read_metrics
from andromeda.training.recipe import Recipe
from andromeda.training.run import RunDirectory
from andromeda.training.trackers import Trackers


class Records:
    """Of the process that writes.

    Args:
        step: where training goes on; what was written beyond it is dropped everywhere.
        warn: takes a line for whoever waits.
    """

    def __init__(self, run: RunDirectory, recipe: Recipe, step: int, warn: Callable[[str], object]) -> None:
        self._metrics, self._heads = MetricsFile(run.metrics, step), MetricsFile(run.heads, step)
        lines = read_metrics(run.metrics) + read_metrics(run.heads) if recipe.track else []
        lines.sort(key=lambda line: line["step"])
        self._trackers = Trackers(recipe.track, run.path, recipe.to_dict(), lines, warn)

    def metrics(self, line: dict[str, Any]) -> None:
        self._metrics.write(line)
        self._trackers.write(line)

    def heads(self, line: dict[str, Any]) -> None:
        self._heads.write(line)
        self._trackers.write(line)

    def sync(self) -> None:
        """On the disk, before a checkpoint that counts on it."""
        self._metrics.sync()
        self._heads.sync()

    def close(self) -> None:
        self._metrics.close()
        self._heads.close()
        self._trackers.close()
