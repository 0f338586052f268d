"""The ways that are compared compute the same."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from andromeda.benchmarks import preparation


def test_every_way_is_checked_before_it_is_timed() -> None:
    rows = preparation.measured(70, 3, 2, 32, copy=1e10)
    assert {"apart", "fused"} <= {row["way"] for row in rows}
    assert all(row["error"] < 0.02 and row["ms"] > 0 for row in rows)
