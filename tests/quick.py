"""Of many cases the quick suite asks some, which take every way through the code; `make test-slow` asks the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """The cases for `pytest.mark.parametrize`, all but the kept ones marked slow.

    Raises:
        ValueError: one that is to be kept is none of them.
    """
    cases = list(cases)
    unknown = [case for case in kept if case not in cases]
    if unknown:
        raise ValueError(f"{unknown} are none of the cases {cases}")
    return [case if case in kept else pytest.param(case, marks=pytest.mark.slow) for case in cases]
