"""The repository as a whole: its corpus, its layers, and what must not be in it."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import andromeda

ROOT = Path(__file__).parents[1]
VERSE = ROOT / "examples" / "verse"
TRAIN, VALIDATION = VERSE / "train.jsonl", VERSE / "validation.txt"
LEFT_BY_RUNNING = {"runs", "build", "dist", "__pycache__"}

MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|root|home|Users|farm|opt|mnt|tmp)/\w")
REGISTRY = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch|--(?:extra-)?index-url|file:/{2}")


def repository_files() -> Iterator[Path]:
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name for name in folders
            if name == ".ci" or not (name.startswith(".") or name in LEFT_BY_RUNNING or name.endswith(".egg-info"))
        ]  # fmt: skip
        yield from (Path(folder, name) for name in names if name != ".git")  # a file, of a worktree


def volumes() -> list[dict[str, str]]:
    return [json.loads(line) for line in TRAIN.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """examples/verse/build.py as a module."""
    spec = importlib.util.spec_from_file_location("build_verse", VERSE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_corpus_has_the_promised_form_and_size(build: ModuleType) -> None:
    assert 1_000_000 < TRAIN.stat().st_size + VALIDATION.stat().st_size < 3_000_000
    assert 100_000 < VALIDATION.stat().st_size < 200_000
    for volume in volumes():
        assert set(volume) == {"title", "author", "source", "text"}
        assert all(volume.values())
    for text in [*(volume["text"] for volume in volumes()), VALIDATION.read_text(encoding="utf-8").rstrip("\n")]:
        for poem in text.split(build.SEPARATOR):
            assert poem == poem.strip()
            assert not build.UNWANTED.search(poem.replace(poem.split("\n")[0], "", 1)), poem


def test_readme_of_the_corpus_counts_what_is_there(build: ModuleType) -> None:
    readme = (VERSE / "README.md").read_text(encoding="utf-8")
    assert build.table(volumes()) in readme
    for path in (TRAIN, VALIDATION):
        assert f"{path.stat().st_size:,}" in readme


def test_nothing_of_the_validation_text_is_trained_on(build: ModuleType) -> None:
    held_out = set(build.word_runs(VALIDATION.read_text(encoding="utf-8")))
    assert len(held_out) > 20_000
    for volume in volumes():
        for poem in volume["text"].split(build.SEPARATOR):
            assert held_out.isdisjoint(build.word_runs(poem)), f"{volume['author']}: {poem}"


def test_no_path_of_one_machine_and_no_package_index() -> None:
    for path in repository_files():
        if path.suffix in {".png", ".jsonl", ".safetensors"}:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found = MACHINE_PATH.search(line) or REGISTRY.search(line)
            assert not found, f"{path.relative_to(ROOT)}:{number}: {line}"


def test_only_the_corpus_is_large() -> None:
    large = {path for path in repository_files() if path.stat().st_size > 2_000_000}
    assert large == {TRAIN}


def test_imports_go_one_way() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_kernels_import_torch_and_triton_alone() -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in (ROOT / "andromeda" / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.startswith("andromeda.kernels") or name.split(".")[0] in allowed, f"{path.name}: {name}"


def test_changelog_leads_with_the_version() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == andromeda.__version__
