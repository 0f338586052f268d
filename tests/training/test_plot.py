"""The loss curve."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from andromeda.training.plot import plot_losses

LINES = [
    {"tokens": 1000 * step, "train_bits_per_byte": 2 + 3 * math.exp(-step / 10)}
    | ({"validation_bits_per_byte": 2.2 + 3 * math.exp(-step / 10)} if step % 20 == 0 else {})
    for step in range(1, 101)
]


@pytest.mark.parametrize("lines", [LINES, LINES[:1], [], LINES[:19]], ids=["all", "one", "none", "no validation"])
def test_a_picture_appears(tmp_path: Path, lines: list[dict[str, float]]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "loss.png"
    assert plot_losses(lines, path, "runs/verse")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20]) >= 1000  # pixels wide
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert not plot_losses(LINES, tmp_path / "loss.png", "runs/verse")
    assert list(tmp_path.iterdir()) == []
