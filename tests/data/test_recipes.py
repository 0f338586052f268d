"""The recipes: sound, within the corpus, and right about the fields of the corpora that they are for."""

from __future__ import annotations

import json
import lzma
import os
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from andromeda.data.build import build
from andromeda.data.report import num_read
from andromeda.data.sources import Source
from andromeda.data.spec import Spec, parse_spec, read_spec
from andromeda.data.stream import Stream
from andromeda.model import IGNORED

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "data").glob("*.yaml"))
CORPORA = Path(os.environ.get("ANDROMEDA_CORPORA", ROOT.parent / "shared" / "data"))
RECORDS, LONGEST = 25, 20_000  # of each file, and characters of each


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_it_is_built_and_uses_all_of_its_sources(path: Path) -> None:
    plan = read_spec(path)
    assert f"andromeda data build recipes/data/{path.name} build/{path.stem}" in plan.text
    assert {source.name for source in plan.sources} == {name for stage in plan.stages for name in stage.sources}


def beginnings(plan: Spec, folder: Path) -> None:
    """The first records of each file that a spec names, under the same names; of long texts the beginning."""
    files = {path for source in plan.sources if isinstance(source, Source) for path in source.paths(CORPORA)}
    for path in files | set(plan.decontaminate.paths(CORPORA) if plan.decontaminate else ()):
        target = folder / path.relative_to(CORPORA)
        target.parent.mkdir(parents=True, exist_ok=True)
        with lzma.open(path, "rt", encoding="utf-8") as file, lzma.open(target, "wt", preset=0) as copy:
            for record in map(json.loads, islice(file, RECORDS)):
                if isinstance(record.get("text"), str):
                    record["text"] = record["text"][:LONGEST]
                copy.write(json.dumps(record) + "\n")


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "small"], ids=lambda path: path.stem)
def test_a_recipe_builds_on_the_beginnings_of_the_real_corpora(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("rensa")
    if not CORPORA.is_dir():
        pytest.skip(f"{CORPORA} is not there; name the folder of the corpora in ANDROMEDA_CORPORA")
    plan = parse_spec("\n".join(map(shortened, path.read_text(encoding="utf-8").split("\n"))), path.name)
    beginnings(plan, tmp_path / "corpus")
    build(plan, tmp_path / "corpus", tmp_path / "out", lambda *_: None, num_workers=1)
    stream = Stream(tmp_path / "out")
    for name, store in stream.stores.items():
        assert len(store) >= 1 and not store.facts["unread"], name
        assert sum(store.facts["removed"].values()) <= 0.5 * num_read(store.facts), name
    learned = Counter[str]()
    for number in range(len(stream)):
        shown = stream.sequence(number)
        learned[shown.source] += int((shown.targets != IGNORED).sum())
        assert all(stream.where(piece) for piece in shown.pieces)
    assert set(learned) == set(stream.stores) and all(learned.values())


def shortened(line: str) -> str:
    """A recipe's line with a vocabulary that is trained at once, few generated documents and whole epochs."""
    line = re.sub(r"vocab_size: \d+|path: (build/pretraining/tokenizer|runs/longer|runs/sft)", "vocab_size: 1024", line)
    return re.sub(r"(?<=documents: )\d+", lambda number: str(min(int(number[0]), 10)), line).replace("1/2", "1")
