"""The recipes: each stands in the docs, and those of the stages run in the order in which the docs have them."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from andromeda.cli import main
from andromeda.training.recipe import read_recipe
from tests.test_readme import shorten, steps_of

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAGES = [ROOT / "README.md", ROOT / "docs" / "training.md"]
QUICKER = {
    "train": ["steps=2", "batch_size=1", "save_every=2", "validate_every=2"],
    "chat": ["--max-new-tokens=4"],
    "data": [],
}


def commands(page: Path) -> list[str]:
    return [step.text for step in steps_of(page.read_text(encoding="utf-8")) if step.kind == "shell"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_read_says_how_it_is_run_and_stands_in_the_docs(path: Path) -> None:
    recipe, command = read_recipe(path), f"andromeda train recipes/{path.name}"
    assert recipe.output == f"runs/{path.stem}"
    shown = [line for page in PAGES for line in commands(page)]
    assert any(line.startswith(command) for line in shown)
    assert command in path.read_text(encoding="utf-8")
    for name in [recipe.data.build, recipe.model_from]:
        assert name is None or any(name.split("/")[1] in line for line in shown), name


@pytest.mark.slow
def test_the_stages_run_one_after_the_other(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/training.md has them, on less data and for two steps each."""
    pytest.importorskip("peft")
    for name in ("recipes", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shorten(tmp_path / "examples" / "verse" / "train.jsonl", 200_000)
    shorten(tmp_path / "examples" / "verse" / "validation.txt", 8_000)
    shorten(tmp_path / "examples" / "preferences" / "train.jsonl", 20_000)
    for path in (tmp_path / "recipes" / "data").glob("*.yaml"):
        fewer = re.sub(r"(?<=documents: )\d+", lambda found: str(int(found[0]) // 40), path.read_text(encoding="utf-8"))
        path.write_text(fewer, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    block = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").split("## Stages")[1].split("\n## ")[0]
    stages = [shlex.split(step.text)[1:] for step in steps_of(block)]
    trained = [Path(stage[-1]).stem for stage in stages if stage[0] == "train"]
    assert trained == ["verse", "longer", "sft", "dpo", "lora"]
    for stage in stages:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1 + 1 =\n"), encoding="utf-8"))
        assert main([*stage, *QUICKER[stage[0]]]) == 0, stage
    assert main(["generate", "runs/dpo", "--prompt", "THE SEA", "--max-new-tokens", "4"]) == 0
