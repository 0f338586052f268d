"""Dashboards hold each point once, whatever was sent before a kill, and training does not depend on them."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from andromeda.errors import AndromedaError
from andromeda.training.recipe import DataRecipe, Recipe
from andromeda.training.records import Records
from andromeda.training.run import RunDirectory
from andromeda.training.trackers import KINDS, Trackers, check_trackers, head_values, scalars

HEADS = {
    "step": 4, "tokens": 40, "bounds": [[1.0, 2.0], [3.0, 4.0]], "windows": [[10, None], [30, None]],
    "entropies": [[0.5, 1.5], [0.5, 1.5]],
}  # fmt: skip


def metrics(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "loss": 8 / step, "gradient_norm": None, "tokens_per_second": 5.0}


def fail(line: str) -> None:
    raise AssertionError(line)


def record(folder: Path, track: list[Any], first: int, last: int, step: int) -> None:
    recipe = Recipe(data=DataRecipe(train="a.txt"), model={"preset": "nano"}, track=track)
    with closing(Records(RunDirectory(folder), recipe, step, fail)) as records:
        for at in range(first, last + 1):
            records.metrics(metrics(at))
            if at % 4 == 0:
                records.heads({**HEADS, "step": at})


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    """As TensorBoard reads them, nothing purged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=False)
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


def test_what_a_line_is_called() -> None:
    line = {**metrics(2), "validation_bits_per_byte": 1.5}
    assert scalars(line) == {
        "training/tokens": 20, "loss/nats": 4.0, "speed/tokens_per_second": 5.0, "loss/validation_bits_per_byte": 1.5,
    }  # fmt: skip
    assert scalars({"step": 7, "left_out": [3, 5], "gradient_norm": None}) == {"training/left_out_sequences": 3}
    assert head_values(HEADS)["heads/windows"] == [10, 30]
    assert scalars(HEADS)["heads/bounds_highest"] == 4.0 and scalars(HEADS)["heads/entropies_mean"] == 1.0


def test_tensorboard_has_each_point_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    record(tmp_path, ["tensorboard"], 1, 8, 0)
    record(tmp_path, ["tensorboard"], 6, 9, 5)  # killed: it goes on from the checkpoint of step 5
    shown = points(tmp_path, "loss/nats")
    assert [step for step, _ in shown] == [*range(1, 10)]
    assert [value for _, value in shown] == pytest.approx([8 / step for step in range(1, 10)])
    assert [step for step, _ in points(tmp_path, "heads/windows_highest")] == [4, 8]


def test_tensorboard_shows_the_histograms_of_heads(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record(tmp_path, ["tensorboard"], 1, 4, 0)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (shown,) = events.Histograms("heads/windows")
    assert (shown.step, shown.histogram_value.num, shown.histogram_value.max) == (4, 2, 30)


def test_a_dashboard_named_later_has_all_from_the_start(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    record(tmp_path, [], 1, 5, 0)
    assert not (tmp_path / "tensorboard").exists()
    record(tmp_path, ["tensorboard"], 6, 7, 5)
    assert [step for step, _ in points(tmp_path, "loss/nats")] == [1, 2, 3, 4, 5, 6, 7]


TRACKIO = """
import sys
from pathlib import Path
from tests.training.test_trackers import record
for folder in ("one", "two"):  # another run is left alone
    Path(sys.argv[1], folder).mkdir()
    record(Path(sys.argv[1], folder), ["trackio"], 1, 8, 0)
record(Path(sys.argv[1], "one"), ["trackio"], 6, 9, 5)
import trackio
from trackio.sqlite_storage import SQLiteStorage
for run in trackio.Api().runs("andromeda"):
    lines = SQLiteStorage.get_logs("andromeda", run.name, run_id=run.id)
    print(Path(run.name).name, [line["step"] for line in lines if "loss/nats" in line])
"""


def test_trackio_has_each_point_once_and_only_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    no_network = "import socket\nsocket.socket.connect = None\n"
    root = Path(__file__).parents[2]
    call = [sys.executable, "-c", no_network + TRACKIO, str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"one {[*range(1, 10)]}", f"two {[*range(1, 9)]}"]
    assert (tmp_path / "store" / "andromeda.db").exists()


class Broken:
    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.calls = 0

    def write(self, line: dict[str, Any]) -> None:
        self.calls += 1
        raise OSError("disk full")

    def close(self) -> None:
        raise AssertionError("it was left alone")


def test_one_that_fails_is_told_of_once_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "tensorboard", Broken)
    warned: list[str] = []
    trackers = Trackers(["tensorboard"], tmp_path, {}, [], warned.append)
    for step in (1, 2):
        trackers.write(metrics(step))
    trackers.close()
    assert warned == ["tensorboard: OSError: disk full; training goes on without it"]


def test_a_missing_package_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers([])
    for name in ("tensorboard", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(AndromedaError, match=rf"track='{name}' needs a package; pip install 'andromeda-lm\[track"):
            check_trackers([name])


def test_nothing_is_sent_that_the_recipe_does_not_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    with pytest.raises(AndromedaError, match=r"TRACKIO_SPACE_ID is set; unset it"):
        check_trackers(["trackio"])
