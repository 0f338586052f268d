"""Bounds of numbers: what is taken is kept to at the bounds and beside them, however a number is written."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import event, given, reject, settings
from hypothesis import strategies as st

from andromeda.errors import AndromedaError
from andromeda.inference.grammar import Grammar, Grammars
from andromeda.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["0.123456789 - 1"], 270)
GRAMMARS = Grammars(TOKENIZER)
NUMBERS = st.one_of(
    st.integers(-20, 20).map(Decimal),
    st.builds(lambda digits, places: Decimal(digits).scaleb(-places), st.integers(-3000, 3000), st.integers(1, 4)),
)


def takes(grammar: Grammar, text: str) -> bool:
    """Whether it could be a whole answer."""
    ids = [*TOKENIZER.encode(text), TOKENIZER.eos_id]
    return grammar.constraint().advance(ids) == len(ids)


def near(bound: Decimal) -> set[str]:
    """Numbers at a bound and beside it."""
    written = {f"{bound:.{places}f}" for places in range(6)}
    return written | {f"{bound + sign * Decimal(10) ** -places:f}" for places in range(6) for sign in (1, -1)}


@pytest.mark.parametrize("maximum", [1, 2.5, 10])
def test_a_share_of_more_than_nothing(maximum: float) -> None:
    grammar = GRAMMARS.json_schema({"type": "number", "exclusiveMinimum": 0, "maximum": maximum})
    assert takes(grammar, "0.5")
    assert not takes(grammar, "0")


@settings(max_examples=100)
@given(
    NUMBERS, NUMBERS,
    st.sampled_from(["minimum", "exclusiveMinimum"]), st.sampled_from(["maximum", "exclusiveMaximum"]),
)  # fmt: skip
def test_no_number_beyond_a_bound_is_taken(low: Decimal, high: Decimal, below: str, above: str) -> None:
    if low >= high:
        low, high = high, low
    try:
        grammar = GRAMMARS.json_schema({"type": "number", below: float(low), above: float(high)})
    except AndromedaError:
        event("refused")
        reject()
    for text in near(low) | near(high):
        number = Decimal(text)
        inside = (number >= low if below == "minimum" else number > low) and (
            number <= high if above == "maximum" else number < high
        )
        assert inside or not takes(grammar, text), text
