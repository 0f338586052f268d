"""`andromeda data build` in batches so small that a small corpus keeps two workers busy; for test_full_build.py."""

from __future__ import annotations

import sys

from andromeda.cli import main
from andromeda.data import encode, sift, workers


def small_batches() -> None:
    workers.HERE = 0
    sift.BATCH_BYTES = encode.BATCH_BYTES = 2000


if __name__ == "__main__":
    small_batches()
    sys.exit(main(["data", "build", *sys.argv[1:]]))
