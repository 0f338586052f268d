"""Rules at work: the shares that they name, the same for a document wherever it comes, and nothing at rate 0."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import fields
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.data.augment import Augmenter, Rules
from andromeda.data.augment.rules import TECHNIQUES
from andromeda.data.synthetic.draws import Draws
from andromeda.errors import AndromedaError
from andromeda.tokenizer import Tokenizer
from andromeda.tokenizer.training import SPECIAL_TOKENS

ALL = Rules(*[Fraction(1, 6)] * 5)
POEM = "Tiger, tiger,\nburning bright\n\nIn the forests\nof the night"
TOKENIZER = Tokenizer.train([POEM], 330, special_tokens=(*SPECIAL_TOKENS, *ALL.sentinels))
TEXTS = [f"{POEM} {number}" for number in range(600)]
NAMES = [f"poems.jsonl:{number}" for number in range(600)]


def augmenter(rules: Rules = ALL, seed: int = 0, source: str = "verse", most_tokens: int = 10_000) -> Augmenter:
    return Augmenter(rules, TOKENIZER, seed, source, most_tokens)


shares = st.lists(st.integers(0, 20), min_size=6, max_size=6).filter(any)


@settings(max_examples=20)
@given(shares, st.integers(0, 10**6))
def test_shares_are_met(parts: list[int], seed: int) -> None:
    rates = [Fraction(part, sum(parts)) for part in parts]
    rules, count = Rules(*rates[:5]), 2000
    found = Counter(rules.choice(Draws(f"{seed} {number}")) for number in range(count))
    for name, rate in zip([*TECHNIQUES, None], rates, strict=True):
        expected = float(rate) * count
        assert abs(found[name] - expected) <= 6 * (expected * (1 - float(rate))) ** 0.5


def test_the_fields_are_the_techniques() -> None:
    assert [field.name for field in fields(Rules)] == list(TECHNIQUES)
    assert {done.technique for done in augmenter().encode_batch(TEXTS, NAMES)} == {*TECHNIQUES, None}


def test_without_rules_nothing_changes() -> None:
    plain = Tokenizer.train([POEM], 300)
    done = Augmenter(Rules(), plain, 0, "verse", 1).encode_batch(TEXTS, NAMES)
    assert [item.ids for item in done] == plain.encode_batch(TEXTS)
    assert all(item.learned is None and item.technique is None for item in done)
    assert Rules().sentinels == () and not Rules().masks


def test_documents_that_are_not_chosen_are_as_they_were() -> None:
    kept = [
        (item.ids, text) for item, text in zip(augmenter().encode_batch(TEXTS, NAMES), TEXTS, strict=True)
        if item.technique is None
    ]  # fmt: skip
    assert 50 < len(kept) < 150
    assert [ids for ids, _ in kept] == TOKENIZER.encode_batch([text for _, text in kept])


@settings(max_examples=30)
@given(st.data())
def test_what_a_document_becomes_follows_from_its_name(data: st.DataObject) -> None:
    """Whatever stands beside it, in whatever process."""
    order = data.draw(st.permutations(range(40)))
    size = data.draw(st.integers(1, 40))
    whole = augmenter().encode_batch(TEXTS[:40], NAMES[:40])
    for first in range(0, 40, size):
        batch = order[first : first + size]
        worker = pickle.loads(pickle.dumps(augmenter()))  # noqa: S301  as a pool of processes does
        done = worker.encode_batch([TEXTS[n] for n in batch], [NAMES[n] for n in batch])
        assert done == [whole[n] for n in batch]


@pytest.mark.parametrize("other", [augmenter(seed=1), augmenter(source="code")])
def test_another_seed_or_source_draws_anew(other: Augmenter) -> None:
    ours, theirs = (it.encode_batch(TEXTS, NAMES) for it in (augmenter(), other))
    same = sum(a.technique == b.technique for a, b in zip(ours, theirs, strict=True))
    assert 60 < same < 140  # a sixth by chance
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) < 60


def test_what_would_be_cut_stays_whole() -> None:
    rules = Rules(fim_psm=Fraction(1, 3), span_corruption=Fraction(1, 3), permute_stanzas=Fraction(1, 3))
    lengths = [len(item.ids) for item in augmenter(rules).encode_batch(TEXTS, NAMES)]
    most = sorted(lengths)[300]
    done = augmenter(rules, most_tokens=most).encode_batch(TEXTS, NAMES)
    plain = TOKENIZER.encode_batch(TEXTS)
    assert max(len(item.ids) for item in done if item.technique not in ("permute_stanzas", None)) == most
    left = [(item.ids, ids) for item, ids in zip(done, plain, strict=True) if item.technique is None]
    assert len(left) > 50 and all(ids == expected for ids, expected in left)


def test_only_span_corruption_masks() -> None:
    for item in augmenter().encode_batch(TEXTS, NAMES):
        assert (item.learned is None) == (item.technique != "span_corruption")
        assert item.learned is None or len(item.learned) == len(item.ids)
    assert ALL.masks and not Rules(fim_psm=Fraction(1)).masks


def test_a_tokenizer_without_the_control_tokens() -> None:
    plain = Tokenizer.train([POEM], 300)
    with pytest.raises(AndromedaError, match=r"no token <\|fim_prefix\|>, which the rules of source verse need; take"):
        Augmenter(ALL, plain, 0, "verse", 100)
    Augmenter(Rules(permute_lines=Fraction(1)), plain, 0, "verse", 100)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"fim_psm": Fraction(-1, 2)}, r"augment: fim_psm is -1/2; it is a share"),
        ({"fim_psm": Fraction(1, 2), "fim_spm": Fraction(2, 3)}, r"the shares come to 1\.16667; a document"),
    ],
)
def test_shares_that_make_no_sense(rates: dict[str, Fraction], message: str) -> None:
    with pytest.raises(AndromedaError, match=message):
        Rules(**rates)
