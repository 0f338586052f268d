"""Dashboards of others, where a recipe names them (`track`). They show what metrics.jsonl and heads.jsonl hold.

The files are the truth: when a run begins or goes on, a dashboard is made anew from the lines that are kept, so that it
has no point twice and lacks none, whatever a killed process had sent. Nothing leaves the machine.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

from andromeda.errors import AndromedaError

Line = dict[str, Any]
Warn = Callable[[str], object]
PROJECT = "andromeda"  # of trackio
ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # with which trackio would send what it is given


class Tracker(Protocol):
    def write(self, line: Line) -> None:
        """A line of metrics or of heads; steps never fall."""

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Before any work. Raises AndromedaError where one is not installed, or would send what it is given elsewhere."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise AndromedaError(f"recipe: track={name!r} needs a package; pip install 'andromeda-lm[track]'")
    set_variables = [name for name in ELSEWHERE if os.environ.get(name)]
    if "trackio" in names and set_variables:
        raise AndromedaError(
            f"recipe: track='trackio' stays on this machine, but {set_variables[0]} is set; unset it, and send the run "
            "afterwards with `trackio sync`"
        )


class Trackers:
    """All that a recipe names. One that fails is told of and left alone: training does not depend on it.

    Args:
        directory: of the run.
        settings: what is said of the run beside its lines.
        lines: those that are there already, by rising steps.
        warn: takes a line for whoever waits.
    """

    def __init__(
        self, names: Sequence[str], directory: Path, settings: Line, lines: Sequence[Line], warn: Warn
    ) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            with self._alone(name):
                self._open[name] = KINDS[name](directory, settings)
        for line in lines:
            self.write(line)

    def write(self, line: Line) -> None:
        for name, tracker in list(self._open.items()):
            with self._alone(name):
                tracker.write(line)

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            with self._alone(name):
                tracker.close()

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a package of others raises is its own
            self._open.pop(name, None)
            self._warn(f"{name}: {type(error).__name__}: {error}; training goes on without it")


class TensorBoard:
    """Event files in RUN/tensorboard: scalars by step, and of all heads together histograms."""

    def __init__(self, directory: Path, settings: Line) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = directory / "tensorboard"
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
        # purge_step: a viewer that is open forgets what it had read of the files that are gone
        self._writer = SummaryWriter(str(folder), purge_step=0)
        self._writer.add_text("recipe", "\n".join(f"    {key}: {value}" for key, value in settings.items()))

    def write(self, line: Line) -> None:
        import numpy as np

        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])
        for name, values in head_values(line).items():
            self._writer.add_histogram(name, np.asarray(values), line["step"])

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A run of trackio's project `andromeda`, in its own store on this machine (`trackio show --project andromeda`)."""

    def __init__(self, directory: Path, settings: Line) -> None:
        import trackio

        self._trackio, here = trackio, str(directory.resolve())
        with suppress(ValueError):  # there is no such project yet
            for run in trackio.Api().runs(PROJECT):
                if (run.config or {}).get("directory") == here:
                    run.delete()
        with redirect_stdout(io.StringIO()):  # it greets
            trackio.init(
                project=PROJECT, name=str(directory), config={**settings, "directory": here}, embed=False,
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip

    def write(self, line: Line) -> None:
        self._trackio.log(scalars(line), step=line["step"])

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()


KINDS: dict[str, Callable[[Path, Line], Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio}


def scalars(line: Line) -> dict[str, float]:
    """The numbers of a line under the names of a dashboard; of its lists of heads the ends and the mean."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if key != "step" and isinstance(value, int | float):
            found[GROUPS.get(key, "training/" + key)] = value
    if "left_out" in line:
        found["training/left_out_sequences"] = line["left_out"][1] - line["left_out"][0] + 1
    for name, values in head_values(line).items():
        found |= {f"{name}_lowest": min(values), f"{name}_mean": mean(values), f"{name}_highest": max(values)}
    return found


GROUPS = {
    "loss": "loss/nats", "train_bits_per_byte": "loss/train_bits_per_byte",
    "validation_bits_per_byte": "loss/validation_bits_per_byte",
    "validation_loss": "loss/validation_nats",
    "tokens_per_second": "speed/tokens_per_second", "flops_per_second": "speed/flops_per_second",
    "possible_flops_per_second": "speed/possible_flops_per_second", "seconds": "speed/seconds",
    "peak_host_bytes": "memory/peak_host_bytes", "peak_device_bytes": "memory/peak_device_bytes",
}  # fmt: skip


def head_values(line: Line) -> dict[str, list[float]]:
    """Of all blocks' heads together; windows of those that have one."""
    named = {f"heads/{key}": line.get(key, []) for key in ("bounds", "windows", "entropies")}
    flat = {name: [x for block in blocks for x in block if x is not None] for name, blocks in named.items()}
    return {name: values for name, values in flat.items() if values}
