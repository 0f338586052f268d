"""Specs: what they mean, and what is said about those that make no sense."""

from __future__ import annotations

import pytest

from andromeda.data.clean import Rules
from andromeda.data.decontaminate import Decontaminate
from andromeda.data.generated import Generated
from andromeda.data.minhash import Near
from andromeda.data.quality import Gopher, Repetition
from andromeda.data.sources import Source
from andromeda.data.spec import Spec, parse_spec
from andromeda.data.synthetic import make_task
from andromeda.errors import AndromedaError

SPEC = """
tokenizer: {vocab_size: 300}
clean: {redact: [emails]}
dedup: {threshold: 0.6}
decontaminate: {files: test/*.jsonl, words: 8}
sources:
  verse: {files: [verse/*.jsonl], licence: public domain, text: text}
  sums: {files: [sums.jsonl], licence: MIT, user: "What is {question}?", assistant: answer, bad: skip, clean: off, dedup: exact}
  recall: {synthetic: {task: recall, pairs: 3}, documents: 40, priority: low}
stages:
  short: {seq_len: 16, proportions: {verse: 3, sums: 1}, num_sequences: 61}
  long: {seq_len: 40, epochs: {sums: 2, verse: 1, recall: 1}}
seed: 5
"""  # noqa: E501 - a source is a line


def spec(text: str = SPEC) -> Spec:
    return parse_spec(text, "spec.yaml")


def test_a_source_has_what_it_says_and_else_what_the_spec_says() -> None:
    plan = spec()
    verse, sums, recall = plan.sources
    assert isinstance(verse, Source) and isinstance(sums, Source)
    assert (verse.clean, verse.dedup, verse.priority) == (Rules(redact=("emails",)), "near", "medium")
    assert (sums.clean, sums.dedup) == (None, "exact")
    assert recall == Generated("recall", make_task("recall", pairs=3), 40, seed=5, dedup="exact", priority="low")
    assert plan.near == Near(0.6)
    assert plan.decontaminate == Decontaminate(("test/*.jsonl",), 8)


def test_a_task_that_cannot_be_drawn_is_named_with_its_source() -> None:
    short = changed(("{task: recall, pairs: 3}", "{task: needles, length: 10}")).sources[2]
    assert isinstance(short, Generated)
    with pytest.raises(AndromedaError, match=r"^source recall: synthetic task needles: length=10 is too short"):
        short.document(0)


def changed(*changes: tuple[str, str]) -> Spec:
    text = SPEC
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return spec(text)


def rules(text: str) -> Rules | None:
    return changed(("clean: {redact: [emails]}", f"clean: {text}")).sources[0].clean


def test_rules_are_off_or_defaults_or_what_is_written() -> None:
    assert rules("off") is None
    assert rules("true") == rules("{}") == Rules()
    assert rules("{gopher: {min_words: 20}, repetition: true, min_english: 0}") == Rules(
        gopher=Gopher(min_words=20), repetition=Repetition(), min_english=0.0
    )
    assert rules("{repetition: {max_top: [0.1, 0.1, 1]}, c4: off, max_characters: null}") == Rules(
        repetition=Repetition(max_top=(0.1, 0.1, 1.0))
    )


@pytest.mark.parametrize(
    ("text", "near", "verse", "recall"),
    [
        ("off", None, "off", "off"),
        ("exact", None, "exact", "exact"),
        ("near", Near(), "near", "exact"),
        ("{}", Near(), "near", "exact"),
    ],
)
def test_what_dedup_means(text: str, near: Near | None, verse: str, recall: str) -> None:
    plan = changed(("dedup: {threshold: 0.6}", f"dedup: {text}"))
    assert plan.near == near
    assert [source.dedup for source in plan.sources] == [verse, "exact", recall]


def test_all_is_off_where_nothing_is_said_and_one_source_may_ask_for_it() -> None:
    gone = [("clean: {redact: [emails]}\n", ""), ("dedup: {threshold: 0.6}\n", "")]
    plan = changed(*gone, ("decontaminate: {files: test/*.jsonl, words: 8}\n", ""))
    assert (plan.near, plan.decontaminate, plan.sources[0].clean, plan.sources[0].dedup) == (None, None, None, "off")
    plan = changed(*gone, ("text: text", "dedup: near"))
    assert (plan.near, plan.sources[0].dedup, plan.sources[2].dedup) == (Near(), "near", "off")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seed: 5", "sede: 5"), "the spec: no key 'sede'; did you mean 'seed'"),
        (("seed: 5", "seed: five"), "seed: must be a whole number; got 'five'"),
        (("licence: MIT", "lisence: MIT"), "sources.sums: no key 'lisence'; did you mean 'licence'"),
        (("licence: MIT, ", ""), "sources.sums: has no `licence`"),
        (("bad: skip", "bad: maybe"), "sources.sums.bad: must be stop or skip"),
        (("text: text", "text: 3"), "sources.verse.text: must be text; got 3"),
        (("files: [sums.jsonl]", "files: 3"), "sources.sums.files: must be a list of patterns"),
        (("files: [sums.jsonl]", "files: [../x]"), "sources.sums: source sums: ../x must lie in the corpus folder"),
        (("verse: {files", "../verse: {files"), "names a directory"),
        (("assistant: answer, ", ""), "sources.sums: fields: a record becomes a document by"),
        (("{vocab_size: 300}", "{vocab_size: 300, path: x}"), "tokenizer: give either `path` or `vocab_size`"),
        (("{sums: 2, verse: 1,", "{sum: 2,"), "stages.long: 'sum' is no source; did you mean 'sums'"),
        (("{sums: 2, verse: 1,", "{sums: many,"), "stages.long.epochs.sums: 'many' is not a number above zero"),
        (("seq_len: 40, ", ""), "stages.long: has no `seq_len`"),
        (("num_sequences: 61", "num_sequences: 61, epochs: {verse: 1}"), "has both epochs and proportions"),
        (("tokenizer:", "tokenizer: ["), "is not YAML"),
        ((SPEC, "- a"), "the spec: must hold keys"),
        (("redact: [emails]", "redact: [phones]"), "clean: `redact` knows no 'phones'"),
        (("redact: [emails]", "redact: emails"), "clean.redact: must be a list; got 'emails'"),
        (("redact: [emails]", "goper: {}"), "clean: no key 'goper'; did you mean 'gopher'"),
        (("redact: [emails]", "gopher: {words: 5}"), "clean.gopher: no key 'words'; did you mean"),
        (("redact: [emails]", "gopher: {max_symbols: 2}"), "clean.gopher: `max_symbols` is a share"),
        (("redact: [emails]", "gopher: 5"), "clean.gopher: must hold keys; there are min_words"),
        (("clean: off", "clean: {min_english: x}"), "sources.sums.clean.min_english: must be a number; got 'x'"),
        (("clean: off", "clean: 5"), "sources.sums.clean: must hold keys"),
        (("dedup: {threshold: 0.6}", "dedup: nearly"), "dedup: must be off, exact or near; got 'nearly'"),
        (("dedup: {threshold: 0.6}", "dedup: true"), "dedup: must be off, exact or near; got True"),
        (("threshold: 0.6", "threshhold: 0.6"), "dedup: no key 'threshhold'; did you mean 'threshold'"),
        (("threshold: 0.6", "threshold: 0.1"), "dedup: near-duplicates: `threshold` 0.1 must lie"),
        (("dedup: exact", "dedup: {threshold: 0.5}"), "sources.sums.dedup: must be off, exact or near"),
        (("words: 8", "words: 1"), "decontamination: n-grams of 1 words"),
        (("files: test/*.jsonl, ", ""), "decontaminate: has no `files`"),
        (("files: test/*.jsonl", "files: /test"), "source decontaminate: /test must lie in the corpus folder"),
        (("words: 8", "length: 8"), "decontaminate: no key 'length'"),
        (("priority: low", "priority: lowest"), "sources.recall.priority: must be high, medium or low; got 'lowest'"),
        (("task: recall", "task: recal"), "sources.recall: synthetic task 'recal' is unknown; use"),
        (("task: recall, ", ""), "sources.recall.synthetic: has no `task`"),
        (("pairs: 3", "pair: 3"), "sources.recall: synthetic task recall: has no parameter 'pair'"),
        (("pairs: 3", "pairs: 0"), "sources.recall: synthetic task recall: pairs=0"),
        (("documents: 40", "documents: 0"), "sources.recall: `documents` is 0; ask for one or more"),
        (("documents: 40", "documents: all"), "sources.recall.documents: must be a whole number"),
        (("documents: 40, ", ""), "sources.recall: has no `documents`"),
        (("documents: 40", "documents: 40, clean: true"), "sources.recall: no key 'clean'"),
        (("documents: 40", "documents: 40, dedup: near"), "sources.recall: `dedup: near` would take tasks"),
        (("  recall: {", "  other: 5\n  recall: {"), "sources.other: must hold keys; there are files"),
        (("  recall: {", "  verse: {"), "is not YAML: 'verse' stands twice in .* line 9, column 3"),
        (("  recall: {", "  '1': {}\n  1: {"), "is not YAML: '1' stands twice"),
        (("licence: MIT", "licence: 2024-13-45"), "is not YAML: month must be in 1..12"),
        (("seed: 5", "seed: " + "[" * 3000), "is not YAML: maximum recursion depth"),
        (("pairs: 3", "name: x"), "sources.recall: synthetic task recall: has no parameter 'name'"),
    ],
)  # fmt: skip
def test_specs_that_make_no_sense(change: tuple[str, str], message: str) -> None:
    assert change[0] in SPEC
    with pytest.raises(AndromedaError, match=rf"^spec\.yaml: .*({message})") as raised:
        spec(SPEC.replace(*change))
    assert "\n" not in str(raised.value)
