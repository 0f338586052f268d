"""Draws: fair, of any size, and for ever the same."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from andromeda.data.synthetic.draws import Draws


def test_draws_are_the_same_for_ever() -> None:
    draws = Draws("Andromeda")
    assert [draws.below(1000) for _ in range(6)] == [459, 291, 844, 680, 380, 78]
    assert draws.below(10**40) == 2128415986788834321880905700941584608208
    assert "".join(draws.shuffled("abcdef")) == "afedbc"


@given(key=st.text(max_size=5), limit=st.integers(1, 10**60))
def test_below_stays_below(key: str, limit: int) -> None:
    draws = Draws(key)
    assert all(0 <= draws.below(limit) < limit for _ in range(20))


@given(key=st.text(max_size=5), size=st.integers(0, 30), data=st.data())
def test_a_sample_is_of_different_places(key: str, size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, size))
    found = Draws(key).sample(range(size), count)
    assert len(set(found)) == len(found) == count
    assert set(found) <= set(range(size))
    assert sorted(Draws(key).shuffled(range(size))) == list(range(size))


def test_all_numbers_are_about_as_frequent() -> None:
    for limit in (2, 7, 10**30):
        draws = Draws(f"fair {limit}")
        counts = Counter(draws.below(limit) * 7 // limit if limit > 7 else draws.below(limit) for _ in range(7000))
        expected = 7000 / len(counts)
        assert len(counts) == min(limit, 7)
        assert sum((n - expected) ** 2 / expected for n in counts.values()) < 22.5  # chi-squared, 6 df, p = 0.001


def test_digits_have_exactly_so_many() -> None:
    draws = Draws("digits")
    assert {draws.digits(1) for _ in range(500)} == set(range(10))
    assert {len(str(draws.digits(5))) for _ in range(500)} == {5}
    assert len(str(draws.digits(300))) == 300


def test_keys_and_places_do_not_repeat_one_another() -> None:
    numbers = [Draws(str(key)).below(2**64) for key in range(1000)]
    draws = Draws("0")
    numbers += [draws.below(2**64) for _ in range(1000)][1:]
    assert len(set(numbers)) == len(numbers)
