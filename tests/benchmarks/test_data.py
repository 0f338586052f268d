"""The corpora and the scripts that measure builds of data do what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from andromeda.benchmarks import corpus
from andromeda.data import shingles

ROOT = Path(__file__).parents[2]
TEXT = "The sea, the sea! It rolls; and 1.5 miles away, of all the sails there was but one, Tom's. " * 8


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(islice(corpus.documents(1), 2_000))


def test_a_corpus_follows_from_its_seed(tmp_path: Path) -> None:
    number, num_bytes = corpus.write(tmp_path / "one", 2_000_000, seed=3)
    assert corpus.write(tmp_path / "two", 2_000_000, seed=3) == (number, num_bytes)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert [(tmp_path / "one" / name).read_bytes() for name in names] == [
        (tmp_path / "two" / name).read_bytes() for name in names
    ]
    texts = [json.loads(line)["text"] for name in names for line in (tmp_path / "one" / name).open(encoding="utf-8")]
    assert len(texts) == number and sum(len(text.encode()) for text in texts) == num_bytes >= 2_000_000
    assert next(corpus.documents(4)) != texts[0]


def test_a_corpus_has_words_like_a_language_and_repeats_some_documents(texts: list[str]) -> None:
    counts = Counter(word for text in texts for word in shingles.words(text))
    share = counts["the"] / counts.total()
    assert 0.02 < share < 0.12 and counts.most_common(1)[0][0] == "the"
    assert sum(count == 1 for count in counts.values()) > len(counts) / 4
    equal = len(texts) - len(set(texts))
    assert 0.03 < equal / len(texts) < 0.08
    lengths = [len(text) for text in texts]
    assert max(lengths) > 20 * np.median(lengths)


@pytest.mark.parametrize("kind", [*corpus.KINDS, corpus.DECOY])
def test_a_copy_is_changed_as_much_as_it_says(kind: str, texts: list[str]) -> None:
    copy = corpus.plant([TEXT, texts[0]], kind, seed=0)[0]
    words, changed = shingles.words(TEXT), shingles.words(copy)
    if kind == "exact":
        assert copy == TEXT
    elif kind in ("case", "punctuation"):
        assert copy != TEXT and changed == words
    else:
        most = int(kind.split("%")[0]) * len(TEXT.split()) // 100
        differ = sum(one != other for one, other in zip(TEXT.split(), copy.split(), strict=True))
        assert most * 0.8 <= differ <= most


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("data_duplicates.py", "10% of words"),
        pytest.param("data.py", "ours, tokens, 1 workers", marks=pytest.mark.slow),
        pytest.param("data_memory.py", "MiB at most", marks=pytest.mark.slow),
    ],
)
def test_scripts_run(script: str, shown: str, tmp_path: Path) -> None:
    extra = ["--json", str(tmp_path / "found.json")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), "--check", *extra],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert json.loads((tmp_path / "found.json").read_bytes())
