"""Builds small enough for a test."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report's picture takes longer than such a build; it is left out as where matplotlib is not installed."""
    monkeypatch.setattr("andromeda.data.report.draw", lambda _: False)
