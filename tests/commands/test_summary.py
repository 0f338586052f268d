"""The page at the end of a run, from lines of metrics alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from andromeda.commands import summary
from andromeda.commands.summary import About, summarise
from andromeda.config import AndromedaConfig
from andromeda.training.processes import Processes
from andromeda.training.recipe import DataRecipe, Recipe
from andromeda.training.run import RunDirectory

CONFIG = AndromedaConfig(num_tokens=64, dim=32, depth=2, dim_head=8, heads=4, alibi_num_heads=2)


def line(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step, "tokens": 1000 * step, "loss": 3.0, "train_bits_per_byte": 2.0, "gradient_norm": 1.0,
        "learning_rate": 1e-3, "seconds": 70.0 * step, "tokens_per_second": 1000.0 + step, "flops_per_second": 5e11,
        "possible_flops_per_second": 2e12, "peak_host_bytes": 2**30 + step, **values,
    }  # fmt: skip


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(summary, "can_draw", lambda: False)

    def make(metrics: list[dict[str, Any]], heads: list[dict[str, Any]]) -> str:
        run = RunDirectory(tmp_path)
        for path, lines in ((run.metrics, metrics), (run.heads, heads)):
            path.write_text("".join(json.dumps(values) + "\n" for values in lines))
        recipe = Recipe(data=DataRecipe(train="a.txt"), model={"preset": "nano"})
        processes = Processes(0, 2, torch.device("cpu"))
        assert not summarise(run, About(recipe, CONFIG, processes, "Finished.", "verse", 256))
        return run.summary.read_text()

    return make


def test_what_came_of_it(page: Any) -> None:
    refused = {"step": 2, "left_out": [7, 8], "gradient_norm": None}
    text = page(
        [line(1, validation_bits_per_byte=1.75), refused, line(3), line(60, validation_bits_per_byte=1.875)],
        [
            {"step": 60, "bounds": [[1.0] * 4] * 2, "windows": [[90, 700, None, None], [80, 500, None, None]]},
        ],
    )
    for expected in (
        "| validation | 1.8750 bits per byte at step 60; lowest 1.7500 at step 1 |",
        "| tokens | 60,000 trained on, in 60 steps |",
        "| time | 1 h 10 min of training, without validation and checkpoints |",
        "| speed | 1,003 tokens a second; 25.0% of the possible 2.00 TFLOP/s (medians of the logged steps) |",
        "| peak memory | 1 GiB on the host |",
        "| left out | 1 step: step 2 (sequences 7 to 8) |",
        "2 processes, ddp, float32",
        "| checkpoints | none |",
        "| 1 | 0.00391 | 600 | 600 | 500 to 700 |",
        "learning_rate: 0.001",
    ):
        assert expected in text


def test_a_run_that_has_not_begun(page: Any) -> None:
    text = page([], [])
    assert "| left out | no step |" in text and "validation" not in text.split("## Recipe")[0]


def test_many_steps_are_left_out(page: Any) -> None:
    text = page([{"step": n, "left_out": [n, n], "gradient_norm": None} for n in range(1, 31)], [])
    assert "| 30 steps: step 1 (" in text and "step 20 (sequences 20 to 20) and 10 more |" in text
