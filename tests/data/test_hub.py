"""Data sets as sources, from a folder that is laid out as a repository of the hub is; no test needs the network."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from andromeda.data.build import build, verify
from andromeda.data.fingerprint import fingerprint
from andromeda.data.hub import Hub
from andromeda.data.sources import Source
from andromeda.data.spec import parse_spec
from andromeda.data.stream import Stream
from andromeda.errors import AndromedaError

datasets = pytest.importorskip("datasets", reason="sources from the hub need datasets")
pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPEC = """
tokenizer: {vocab_size: 300}
sources:
  poems: {hub: ./poems, split: train, licence: none, text: "{title}: {text}", bad: skip}
  lines: {files: [a.jsonl], licence: none}
stages: {all: {seq_len: 32, epochs: {poems: 1, lines: 1}}}
"""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "poems" / "data").mkdir(parents=True)
    rows = [{"title": f"poem {number}", "text": f"tiger {number}", "year": number} for number in range(40)]
    rows[7]["text"] = None
    for part, name in ((rows[:25], "train-00000"), (rows[25:35], "train-00001"), (rows[35:], "test-00000")):
        parquet.write_table(pa.Table.from_pylist(part), tmp_path / "poems" / "data" / f"{name}-of-00002.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "tiger"}) + "\n")
    return tmp_path


def built(corpus: Path, name: str, spec: str = SPEC) -> dict[str, Any]:
    return build(parse_spec(spec, "spec.yaml"), corpus, corpus / name, lambda *_: None, 1)


def test_rows_are_documents_that_say_where_they_come_from(corpus: Path) -> None:
    facts = built(corpus, "out")["sources"]["poems"]
    assert (facts["num_documents"], facts["unread"]) == (34, {"no `text`": 1})
    stream = Stream(corpus / "out", check=True)
    store = stream.stores["poems"]
    numbers = [number for number in range(35) if number != 7]
    assert [store.where(place) for place in range(34)] == [f"./poems/train:{number}" for number in numbers]
    ids = store.piece(33, 0, int(store.lengths[33]))[0][1:]
    assert stream.tokenizer.decode(ids.tolist()) == "poem 34: tiger 34"
    assert Hub("a/b", "train", COMMIT, "en").where == "a/b@0123456789ab/en/train"


def test_the_same_bytes_twice_and_another_key_for_other_rows(corpus: Path) -> None:
    first, second = built(corpus, "one"), built(corpus, "two")
    assert first == second
    assert verify(corpus / "two") == []
    parquet.write_table(pa.table({"title": ["a"], "text": ["b"]}), corpus / "poems" / "data" / "train-00002.parquet")
    with pytest.raises(AndromedaError, match="was begun with another spec, tokenizer or corpus"):
        built(corpus, "one")


def test_commit_split_and_configuration_are_the_fingerprint() -> None:
    hubs = [
        Hub("a/b", "train", COMMIT), Hub("a/c", "train", COMMIT), Hub("a/b", "test", COMMIT),
        Hub("a/b", "train", COMMIT, "en"), Hub("a/b", "train", COMMIT[:-1] + "8"),
    ]  # fmt: skip
    keys = {fingerprint(Source("s", (), "none", hub=hub), Path("nowhere")) for hub in hubs}
    assert len(keys) == len(hubs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"./poems": "a/b"}, "sources.poems: hub: a/b needs the `revision` that is meant, a commit of 40 digits"),
        ({"split: train": "split: train, revision: main"}, "is a folder of the corpus: no `revision`"),
        ({"split: train, ": ""}, "sources.poems: has no `split`, which it needs"),
        ({"hub: ./poems": "hub: ./poems, files: [a.jsonl]"}, "names both files and hub"),
        ({"hub: ./poems, ": ""}, "has no `files`, which it needs"),
        ({"./poems": "./none"}, "no folder ./none in"),
        ({"split: train": "split: trane", ", bad: skip": ""}, "source poems: ./poems/trane, after row 0: .*Bad split"),
        ({"{title}": "{titel}", ", bad: skip": ""}, "poems/train:0: has no `titel` .there are: title, text, year."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(corpus: Path, change: dict[str, str], message: str) -> None:
    text = SPEC
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(AndromedaError, match=message):
        built(corpus, "out", text)


@pytest.mark.parametrize("bad", ["stop", "skip"])
def test_what_interrupts_it_stops_the_build_always(corpus: Path, bad: str) -> None:
    """It could be the network, and another build would have more of it under the same name."""
    path = corpus / "poems" / "data" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(AndromedaError, match=r"source poems: ./poems/train, after row \d+: cannot be read by datasets"):
        built(corpus, "out", SPEC.replace("bad: skip", f"bad: {bad}"))
    assert not (corpus / "out" / "manifest.json").exists()


def test_without_the_network_it_is_told_in_one_line(corpus: Path) -> None:
    text = SPEC.replace("./poems, ", f"a/b, revision: {COMMIT}, ")
    with pytest.raises(
        AndromedaError, match=r"source poems: a/b@0123456789ab/train, after row 0: cannot be read"
    ) as raised:
        built(corpus, "out", text)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize("name", ["a/b", "{here}/a/b"])
def test_a_folder_is_never_taken_for_a_repository(corpus: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `datasets` takes it: its rows would not be those of the commit, nor its bytes in the manifest."""
    shutil.copytree(corpus / "poems", corpus / "a" / "b")
    monkeypatch.chdir(corpus)
    name = name.format(here=corpus)
    with pytest.raises(
        AndromedaError, match=r"datasets would read the folder .*a/b instead; run the command elsewhere"
    ):
        built(corpus, "out", SPEC.replace("./poems, ", f"{name}, revision: {COMMIT}, "))


def test_a_name_in_a_folder_that_is_not_utf8(corpus: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(corpus / "poems") + b"/\xe9.txt")).write_text("a")
    except OSError:
        pytest.skip("this file system takes no such names")
    with pytest.raises(AndromedaError, match=r"hub: \./poems: .*its name is not UTF-8; rename the file"):
        built(corpus, "out")


def test_without_the_package_it_is_told(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def refusing(name: str, *arguments: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(AndromedaError, match=r"needs a package; pip install 'andromeda-lm\[hub\]'"):
        built(corpus, "out", SPEC.replace(", bad: skip", ""))


def test_nothing_is_imported_before_it_is_needed() -> None:
    script = "import sys, andromeda.data.build; print('datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
