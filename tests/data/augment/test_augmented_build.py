"""Builds whose spec asks for changed documents: they are there, counted, and learned as said; the rest is as it was."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from andromeda.data import workers
from andromeda.data.augment import Rules, fill_in_the_middle, span_corruption
from andromeda.data.augment.rules import TECHNIQUES
from andromeda.data.build import build, verify
from andromeda.data.report import tables
from andromeda.data.spec import parse_spec
from andromeda.data.stream import Stream
from andromeda.errors import AndromedaError
from andromeda.model import IGNORED
from andromeda.tokenizer import Tokenizer

VERSE = (Path(__file__).parents[3] / "examples" / "verse" / "validation.txt").read_text(encoding="utf-8")
POEMS = [poem.strip() for poem in VERSE.split("\n\n\n") if 200 < len(poem) < 900][:120]
SPEC = """
tokenizer: {vocab_size: 500}
sources:
  verse: {files: [verse.jsonl], licence: public domain, augment: RULES}
  sums: {files: [sums.jsonl], licence: MIT, user: question, assistant: answer}
stages:
  short: {seq_len: 64, epochs: {verse: 1}}
  long: {seq_len: 600, epochs: {verse: 1, sums: 1}}
seed: 7
"""
RULES = "{fim_psm: 0.2, fim_spm: 0.2, span_corruption: 0.2, permute_lines: 0.1, permute_stanzas: 0.1}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    sums = [{"question": f"What is {a} + 1?", "answer": str(a + 1)} for a in range(20)]
    for name, records in (("verse", [{"text": poem} for poem in POEMS]), ("sums", sums)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def built(corpus: Path, out: Path, rules: str = RULES, text: str = SPEC, **options: Any) -> dict[str, Any]:
    return build(parse_spec(text.replace("RULES", rules), "spec.yaml"), corpus, out, lambda *_: None, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_the_spec_asks_for_is_there_and_counted(corpus: Path, tmp_path: Path) -> None:
    manifest = built(corpus, tmp_path / "out")
    stream = Stream(tmp_path / "out", check=True)
    store, tokenizer = stream.stores["verse"], stream.tokenizer
    opening = {tokenizer.token_to_id(token): token for token in (*fill_in_the_middle.SENTINELS, "<|span_0|>")}
    found: Counter[str] = Counter()
    for number, poem in enumerate(POEMS):
        ids, _, learned = store.piece(number, 1, int(store.lengths[number]) - 1)
        marks = [opening[token] for token in ids.tolist() if token in opening]
        text = tokenizer.decode(ids.tolist())
        if marks and marks[0] == "<|fim_prefix|>":
            found["fim_spm" if ids[1] == tokenizer.token_to_id("<|fim_suffix|>") else "fim_psm"] += 1
            assert Counter(text) == Counter(poem) and learned.all() and len(marks) == 3
        elif marks:
            found["span_corruption"] += 1
            assert marks == ["<|span_0|>"] * 2 and 0.05 * len(ids) < learned.sum() < 0.4 * len(ids)
        elif text != poem:
            found["permute"] += 1
            assert Counter(text.split("\n")) == Counter(poem.split("\n")) and learned.all()
        else:
            assert learned.all()
    counted = manifest["sources"]["verse"]["augmented"]
    assert counted.keys() == set(TECHNIQUES)
    assert {name: counted[name] for name in ("fim_psm", "fim_spm", "span_corruption")} == {
        name: found[name] for name in ("fim_psm", "fim_spm", "span_corruption")
    }
    assert found["permute"] <= counted["permute_lines"] + counted["permute_stanzas"] < found["permute"] + 10
    assert 60 < sum(counted.values()) < 120  # four in five
    assert manifest["sources"]["sums"]["augmented"] == {}
    rows = {table.title: table.rows for table in tables(stream)}["Augmented"]
    assert sorted(rows) == [("verse", name, str(count)) for name, count in sorted(counted.items())]


def test_training_learns_the_spans_alone(corpus: Path, tmp_path: Path) -> None:
    built(corpus, tmp_path / "out", "{span_corruption: 1}")
    stream, seen = Stream(tmp_path / "out"), 0
    marks = {stream.tokenizer.token_to_id(token) for token in span_corruption.SENTINELS}
    first = stream.tokenizer.token_to_id("<|span_0|>")
    for number in range(int(stream.mix.starts[1]), len(stream)):
        shown = stream.sequence(number)
        for piece in shown.pieces if shown.source == "verse" else []:
            ids, targets = (part[piece.first : piece.end].tolist() for part in (shown.ids, shown.targets))
            asked = ids.index(first, ids.index(first) + 1)
            assert set(targets[:asked]) == {IGNORED} and IGNORED not in targets[asked:]
            assert set(targets[asked:]) & marks or ids.count(first) == 2
            seen += 1
    assert seen == len(POEMS)


def test_the_same_bytes_by_any_number_of_workers(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(corpus, tmp_path / "one", num_workers=1)
    monkeypatch.setattr(workers, "HERE", 0)
    monkeypatch.setattr("andromeda.data.encode.BATCH_BYTES", 2000)
    built(corpus, tmp_path / "two", num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_no_rules_and_rules_of_0_change_nothing(corpus: Path, tmp_path: Path) -> None:
    plain = SPEC.replace(", augment: RULES", "")
    built(corpus, tmp_path / "without", text=plain)
    built(corpus, tmp_path / "zero", "{fim_psm: 0, permute_lines: 0.0}")
    other = {"manifest.json", "spec.yaml", "build.key"}
    without, zero = (contents(tmp_path / name) for name in ("without", "zero"))
    assert without.keys() == zero.keys()
    assert all(without[name] == zero[name] for name in without if name not in other)


def test_a_poem_that_no_stage_holds_whole_is_not_cut_into_parts(corpus: Path, tmp_path: Path) -> None:
    """Its middle would come to lie in another sequence than its marks."""
    short = SPEC.replace("seq_len: 600", "seq_len: 200")
    built(corpus, tmp_path / "out", "{fim_psm: 1}", short)
    store = Stream(tmp_path / "out").stores["verse"]
    mark = Stream(tmp_path / "out").tokenizer.token_to_id("<|fim_prefix|>")
    changed = [store.piece(number, 1, 1)[0][0] == mark for number in range(len(store))]
    assert any(changed) and not all(changed)
    assert all(store.lengths[number] <= 200 for number in range(len(store)) if changed[number])
    assert all(store.lengths[number] > 200 - 10 for number in range(len(store)) if not changed[number])


def test_a_tokenizer_without_the_tokens_is_refused_before_any_work(corpus: Path, tmp_path: Path) -> None:
    Tokenizer.train(POEMS, 300).save(tmp_path / "tokenizer")
    text = SPEC.replace("{vocab_size: 500}", f"{{path: {tmp_path / 'tokenizer'}}}")
    with pytest.raises(AndromedaError, match=r"no token <\|fim_prefix\|>, which the rules of source verse need"):
        built(corpus, tmp_path / "out", text=text)
    assert not (tmp_path / "out").exists()
    built(corpus, tmp_path / "out", "{permute_lines: 1}", text)
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("{fim: 0.5}", "sources.verse.augment: no key 'fim'; did you mean 'fim_spm'"),
        ("{fim_psm: -1}", "sources.verse.augment.fim_psm: -1 is not a number above zero"),
        ("{fim_psm: half}", "sources.verse.augment.fim_psm: 'half' is not a number"),
        ("{fim_psm: 0.7, permute_lines: 0.5}", r"sources.verse: augment: the shares come to 1\.2; a document"),
        ("0.5", "sources.verse.augment: must hold keys"),
        ("{}, user: text, assistant: text", None),
        ("{fim_psm: 1}, user: text, assistant: text", "sources.verse: .*`augment` is for texts"),
    ],
)
def test_specs_that_make_no_sense(rules: str, message: str | None) -> None:
    text = SPEC.replace("RULES", rules)
    if message is None:
        assert parse_spec(text, "spec.yaml").augments == {}
        return
    with pytest.raises(AndromedaError, match=message) as raised:
        parse_spec(text, "spec.yaml")
    assert "\n" not in str(raised.value)


def test_a_rate_is_what_its_digits_say() -> None:
    plan = parse_spec(SPEC.replace("RULES", RULES), "spec.yaml")
    assert [str(rate) for rate in plan.augments["verse"].rates.values()] == ["1/5", "1/5", "1/5", "1/10", "1/10"]
    assert plan.augments["verse"] != Rules()
