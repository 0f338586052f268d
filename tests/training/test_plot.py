"""Pictures of runs of any length, with whatever their lines lack."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from andromeda.training.plot import can_draw, plot_curves, plot_heads, plot_losses

Line = dict[str, Any]
LINES: list[Line] = [
    {
        "step": step, "tokens": 1000 * step, "loss": 1.0, "train_bits_per_byte": 2 + 3 * math.exp(-step / 10),
        "gradient_norm": 30 / step, "learning_rate": 1e-3, "tokens_per_second": 1e4, "flops_per_second": 1e9,
        "possible_flops_per_second": 2e9,
    }
    | ({"validation_bits_per_byte": 2.2 + 3 * math.exp(-step / 10)} if step % 20 == 0 else {})
    for step in range(1, 101)
]  # fmt: skip
LEFT_OUT: list[Line] = [{"step": 7, "left_out": [12, 13], "gradient_norm": None}]
FIRST: list[Line] = [LINES[0] | {"gradient_norm": None}]
HEADS: list[Line] = [
    {
        "step": step, "tokens": step, "bounds": [[5.0 + step / 100, 6.0]] * 3, "windows": [[20, 300, None]] * 3,
        "entropies": [[1.0, 2.0, 3.0]] * 3,
    }
    for step in (10, 20)
]  # fmt: skip


def assert_picture(path: Path) -> None:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20]) >= 600  # pixels wide
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("lines", [LINES, [], LINES[:1]], ids=["all", "none", "one, no validation"])
def test_losses(tmp_path: Path, lines: list[Line]) -> None:
    pytest.importorskip("matplotlib")
    plot_losses(lines, tmp_path / "loss.png", "runs/verse")
    assert_picture(tmp_path / "loss.png")


@pytest.mark.parametrize("lines", [LINES + LEFT_OUT, FIRST, LEFT_OUT], ids=["all", "no norm", "left out"])
def test_curves(tmp_path: Path, lines: list[Line]) -> None:
    pytest.importorskip("matplotlib")
    plot_curves(lines, tmp_path / "curves.png", "runs/verse", 1.0 if len(lines) > 1 else None)
    assert_picture(tmp_path / "curves.png")


@pytest.mark.parametrize("missing", [(), ("entropies", "windows")])
def test_heads(tmp_path: Path, missing: tuple[str, ...]) -> None:
    pytest.importorskip("matplotlib")
    lines = [{key: value for key, value in line.items() if key not in missing} for line in HEADS]
    plot_heads(lines, tmp_path / "heads.png", "runs/verse", 0 if "windows" in missing else 2, 256)
    assert_picture(tmp_path / "heads.png")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert can_draw()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not can_draw()
