"""`andromeda train` by ZeRO-3 in one process, without a launcher: what it makes is what training without it makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from andromeda.commands.generate import generate
from andromeda.commands.train import train
from tests.commands.launcher import Launcher
from tests.commands.runs import ROOT, untimed


@pytest.mark.usefixtures("quick")
def test_one_that_keeps_things_off_its_device(
    launch: Launcher, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, off = recipe.parent / "one", recipe.parent / "off"
    train(str(recipe), [f"output={one}"])
    launch.one(recipe, f"output={off}", "engine=zero3", "offload=cpu").finish()
    for ours, theirs in zip(untimed(off), untimed(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    capsys.readouterr()
    for run in (one, off):
        generate(str(run), prompt="The sea", max_new_tokens=8, temperature=0)
    texts = [text.strip() for text in capsys.readouterr().out.split("The sea")[1:]]
    assert texts[0] == texts[1] != ""


@pytest.mark.slow
def test_on_its_own_it_says_what_others_say(recipe: Path) -> None:
    command = [sys.executable, "-m", "andromeda", "train", str(recipe), "steps=2", "engine=zero3", "offload=cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "warn" not in (result.stdout + result.stderr).lower()
