"""What tests of kernels share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote holds NaN, so an output left out shows."""

    def poisoned(allocate):
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(-(2**31))

        return allocated

    with torch.device("meta"):
        torch.empty(0)  # torch lists its constructors at the first use, and not these in their place
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    assert torch.empty(1).isnan()
