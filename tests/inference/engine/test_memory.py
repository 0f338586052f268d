"""What the CPU has free, and what of it may be taken."""

from __future__ import annotations

import psutil
import pytest

from andromeda.inference.engine import memory


def test_half_of_what_is_free_is_left(monkeypatch):
    monkeypatch.setattr(memory, "_free_bytes", lambda: 1001)
    assert memory.has_room(500) and not memory.has_room(501)


def test_what_is_free_is_what_programs_could_be_given():
    assert memory._free_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
