"""Training without what takes longer than so small a one; for tests and the processes that they start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from andromeda.commands import session
from andromeda.training import metrics


@contextmanager
def quick_training() -> Iterator[None]:
    """No summary, no long measurement; and so small a model is slower on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    size = {"cpu": 64, "cuda": 64}
    try:
        with (
            patch.object(session, "summarise", lambda *_: True), patch.object(metrics, "PEAK_SECONDS", 0.0),
            patch.object(metrics, "PEAK_SIZE", size),
        ):  # fmt: skip
            yield
    finally:
        torch.set_num_threads(threads)
