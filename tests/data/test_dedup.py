"""Planted duplicates are found, nothing else is, and neither order nor workers matter."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.data import dedup, shingles
from andromeda.data.dedup import Duplicates, Index
from andromeda.data.fields import Document
from andromeda.data.minhash import SHORTEST, Near, prints, words_of
from andromeda.errors import AndromedaError

pytest.importorskip("rensa")

NEAR = Near()
VOCABULARY = [
    f"{a}{b}{c}" for a in ("ba", "lo", "mi", "stra", "fu") for b in "ntrksw" for c in ("e", "ing", "or", "", "y", "al")
]


def stanzas(random: random.Random, number: int) -> str:
    """Stanzas of four lines of four to seven words, frequent words more often, as in English."""

    def line() -> str:
        words = [VOCABULARY[int(len(VOCABULARY) * random.random() ** 2)] for _ in range(random.randint(4, 7))]
        return " ".join(words).capitalize() + random.choice([",", ".", ";", ""])

    return "\n\n".join("\n".join(line() for _ in range(4)) for _ in range(number))


def changed(share: float) -> Callable[[str, random.Random], str]:
    def change(text: str, random: random.Random) -> str:
        parts = re.split(r"(\s+)", text)
        words = range(0, len(parts), 2)
        for place in random.sample(words, round(share * len(words))):
            parts[place] = random.choice(VOCABULARY)
        return "".join(parts)

    return change


def reordered(text: str, random: random.Random) -> str:
    parts = text.split("\n\n")
    return "\n\n".join(random.sample(parts, len(parts)))


PLANTS: dict[str, Callable[[str, random.Random], str]] = {
    "copy": lambda text, random: text,
    "case": lambda text, random: text.upper(),
    "punctuation": lambda text, random: re.sub("[,.;]", "", text).replace(" ", "  ").replace("\n\n", " -- "),
    "5% changed": changed(0.05),
    "10% changed": changed(0.1),
    "stanzas reordered": reordered,
}


def duplicates(
    folder: Path, texts: Sequence[str], near: Near | None = NEAR, order: Sequence[int] | None = None
) -> Duplicates:
    """Of texts whose numbers are their places; `order` in which they arrive, three at a time."""
    order = range(len(texts)) if order is None else order
    with Index(folder, near) as index:
        for start in range(0, len(order), 3):
            some = order[start : start + 3]
            index.add(np.array(some), prints([texts[i] for i in some], near))
        return index.duplicates()


def pairs(found: Duplicates) -> dict[int, int]:
    return dict(zip(found.removed.tolist(), found.of.tolist(), strict=True))


# ---- planted duplicates --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLANTS)
def test_recall_and_precision_on_planted_duplicates(tmp_path: Path, kind: str) -> None:
    draw = random.Random(kind)
    originals = [stanzas(draw, draw.randint(2, 8)) for _ in range(400)]
    planted = [PLANTS[kind](text, draw) for text in originals[:200]]
    found = duplicates(tmp_path / "index", [*originals, *planted])
    right = sum(pairs(found).get(400 + place) == place for place in range(200))
    assert right / 200 >= 0.95, "recall"
    assert right / max(1, len(found.removed)) >= 0.99, "precision"
    if kind in ("copy", "case", "punctuation"):
        assert found.exact.all() and (found.similarity == 1).all() and right == 200
    else:
        assert (found.similarity >= NEAR.threshold).all()


def test_recall_just_below_and_above_the_threshold(tmp_path: Path) -> None:
    draw = random.Random(0)
    originals = [stanzas(draw, 12) for _ in range(60)]
    for share, low, high in ((0.12, 0.85, 1.0), (0.25, 0.0, 0.02)):
        found = duplicates(tmp_path / str(share), [*originals, *(changed(share)(text, draw) for text in originals)])
        assert low <= len(found.removed) / 60 <= high


def test_similarity_is_that_of_the_sets_of_shingles(tmp_path: Path) -> None:
    draw = random.Random(1)
    text = stanzas(draw, 30)
    other = changed(0.1)(text, draw)

    def grams(text: str) -> set[tuple[str, ...]]:
        words = shingles.words(text)
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    exact = len(grams(text) & grams(other)) / len(grams(text) | grams(other))
    assert duplicates(tmp_path / "index", [text, other]).similarity[0] == pytest.approx(exact, abs=0.1)


def test_without_near_only_equal_words(tmp_path: Path) -> None:
    draw = random.Random(2)
    text = stanzas(draw, 5)
    found = duplicates(tmp_path / "index", [text, changed(0.05)(text, draw), text.upper()], near=None)
    assert pairs(found) == {2: 0}


def test_sources_whose_texts_are_alike_on_purpose(tmp_path: Path) -> None:
    draw = random.Random(5)
    text = stanzas(draw, 5)
    with Index(tmp_path / "index", NEAR) as index:
        index.add(np.arange(2), prints([text, changed(0.05)(text, draw)], NEAR).of_words_only())
        index.add(np.arange(2, 4), prints([changed(0.05)(text, draw), text], NEAR).of_words_only())
        assert pairs(index.duplicates()) == {3: 0}


# ---- short texts, empty texts, formulas ----------------------------------------------------------


def test_short_texts_are_duplicates_only_if_their_words_are_equal(tmp_path: Path) -> None:
    texts = ["", "a", "A!", "a b", "roses are red", "Roses are red.", "roses are blue", "", "?", "!", "b a"]
    assert pairs(duplicates(tmp_path / "a", texts)) == {2: 1, 5: 4, 7: 0}
    words = [f"w{i}" for i in range(SHORTEST)]
    short = [" ".join(words[:-1]), " ".join([*words[:-2], "x"])]
    assert pairs(duplicates(tmp_path / "b", short)) == {}
    assert pairs(duplicates(tmp_path / "c", [" ".join(words), " ".join([*words[:-1], "x"])])) == {1: 0}


def test_tasks_that_differ_by_a_sign_are_different(tmp_path: Path) -> None:
    texts = [f"What is {a}?" for a in ("12 - 5", "12 + 5", "12 * 5", "12 / 5", "1.25", "125", "-125", "12:5", "12 = 5")]
    assert len(duplicates(tmp_path / "index", texts).removed) == 0


def test_no_documents(tmp_path: Path) -> None:
    assert len(duplicates(tmp_path / "index", []).removed) == 0
    assert len(prints([], NEAR)) == len(prints([], None)) == 0


# ---- who stays -----------------------------------------------------------------------------------


def test_what_is_removed_is_alike_what_it_duplicates(tmp_path: Path) -> None:
    draw = random.Random(3)
    chain = [stanzas(draw, 6)]
    for _ in range(6):
        chain.append(changed(0.08)(chain[-1], draw))
    chain.insert(3, chain[2].upper())
    found = duplicates(tmp_path / "index", chain)
    kept = ~np.isin(np.arange(len(chain)), found.removed)
    assert kept[0] and 1 < kept.sum() < len(chain), "the ends of the chain have little in common"
    assert kept[found.of].all() and not kept[found.removed].any()
    assert (found.of < found.removed).all() and (found.similarity >= NEAR.threshold).all()


def test_the_lowest_number_stays(tmp_path: Path) -> None:
    draw = random.Random(4)
    text = stanzas(draw, 4)
    versions = [changed(0.05)(text, draw), text, text.lower()]
    with Index(tmp_path / "index", NEAR) as index:
        index.add(np.array([7 << 40, 5, 3 << 40]), prints(versions, NEAR))
        found = index.duplicates()
    assert pairs(found) == {7 << 40: 5, 3 << 40: 5}
    assert found.exact.tolist() == [True, False]


def test_numbers_are_given_once(tmp_path: Path) -> None:
    with (
        Index(tmp_path / "index", NEAR) as index,
        pytest.raises(AndromedaError, match="two documents have the number 1"),
    ):
        index.add(np.array([0, 1, 1]), prints(["a", "b", "c"], NEAR))
        index.duplicates()


# ---- determinism ---------------------------------------------------------------------------------


def family(seed: int) -> list[str]:
    draw = random.Random(seed)
    texts = [stanzas(draw, draw.randint(1, 4)) for _ in range(5)]
    for _ in range(12):
        texts.append(draw.choice(list(PLANTS.values()))(draw.choice(texts), draw))
    return texts


def same(one: Duplicates, two: Duplicates) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(two, name)) for name in ("removed", "of", "similarity", "exact")
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(17)), st.sampled_from([1, 4, 1 << 24]))
def test_order_of_arrival_and_parts_do_not_matter(
    tmp_path_factory: pytest.TempPathFactory, seed: int, order: list[int], part: int
) -> None:
    texts = family(seed)
    folder = tmp_path_factory.mktemp("index")
    expected = duplicates(folder, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "SORTED", part)
        patch.setattr(dedup, "BLOCK", 3)
        assert same(duplicates(folder, texts, order=order), expected)
    assert all(pairs(expected)[place] < place for place in expected.removed.tolist())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab ."), max_size=12), max_size=12))
def test_words_equal_if_and_only_if_merged(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    found = pairs(duplicates(tmp_path_factory.mktemp("index"), texts))
    keys = [tuple(shingles.words(text)) or text.strip() for text in texts]
    assert found == {place: keys.index(key) for place, key in enumerate(keys) if keys.index(key) < place}


def test_prints_do_not_depend_on_how_texts_are_divided() -> None:
    texts = [text for seed in range(40) for text in family(seed)]
    whole = prints(texts, NEAR)
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda text: prints([text], NEAR), texts))
    for name in ("words", "bands", "signatures"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in parts]))


def test_prints_are_the_same_on_every_machine() -> None:
    """If a release of rensa changes this, an index is still right, but a corpus built anew may be another."""
    text = (
        "Tyger Tyger, burning bright, in the forests of the night; what immortal hand or eye could frame thy fearful "
    )
    tiger = prints([text + "symmetry? In what distant deeps or skies burnt the fire of thine eyes?"], NEAR)
    assert tiger.words.tolist() == [[16421574620281339383, 8555999435040871595]]
    assert (int(tiger.bands[0, 0]), int(tiger.signatures[0, -1])) == (15764755399269643144, 65492)


# ---- what is compared ----------------------------------------------------------------------------


def test_what_is_compared_of_a_conversation() -> None:
    said = (
        {"role": "system", "content": "Here are forty tools."},
        {"role": "user", "content": "Weather in Oslo?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo", "n": 2}}],
        },
    )
    text = words_of(Document("here", messages=said, tools=({"name": "weather"},)))
    assert text.split("\n") == ["user", "Weather in Oslo?", "assistant", "weather", "Oslo", "2"]
    assert words_of(Document("here", text="Oslo")) == "Oslo"


def test_near_checks_itself() -> None:
    for threshold in (0.1, 1.1):
        with pytest.raises(AndromedaError, match=f"`threshold` {threshold} must lie between"):
            Near(threshold)
    for threshold in (0.2, 0.45, 0.7, 0.9, 1.0):
        near = Near(threshold)
        assert near.rows * near.bands <= 256
        assert 1 - (1 - threshold**near.rows) ** near.bands >= 0.9


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AndromedaError, match=r"file: the index of duplicates cannot be written"):
        Index(tmp_path / "file", NEAR)
