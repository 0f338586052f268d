"""What a run writes down as it goes: metrics.jsonl, heads.jsonl, and the dashboards that its recipe names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from andromeda.errors import AndromedaError
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
        self._warn, self._failing = warn, set[MetricsFile]()
        self._trackers = Trackers(recipe.track, run.path, recipe.to_dict(), lines, warn)

    def metrics(self, line: dict[str, Any]) -> None:
        self._write(self._metrics, line)

    def heads(self, line: dict[str, Any]) -> None:
        self._write(self._heads, line)

    def _write(self, file: MetricsFile, line: dict[str, Any]) -> None:
        """A file that cannot be written is told of, and tried again with its next line and in `sync`."""
        try:
            file.write(line)
            self._failing.discard(file)
        except AndromedaError as error:
            if file not in self._failing:
                self._warn(str(error))
            self._failing.add(file)
        self._trackers.write(line)

    def sync(self) -> None:
        """On the disk, before a checkpoint that counts on it. Raises AndromedaError where that cannot be."""
        try:
            self._metrics.sync()
        finally:
            self._heads.sync()

    def close(self) -> None:
        self._metrics.close()
        self._heads.close()
        self._trackers.close()
