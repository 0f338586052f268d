"""An engine from a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from andromeda.inference.engine.engine import Engine
from andromeda.inference.loading import load_model
from andromeda.tokenizer import Tokenizer


def load_engine(directory: str | Path, **options: Any) -> tuple[Engine, Tokenizer]:
    """Opens a model directory, or the newest checkpoint of a training run, on a GPU where there is one.

    Args:
        options: of `Engine`.

    Raises:
        AndromedaError: as of `load_model` and of `Engine`.
    """
    model, tokenizer = load_model(directory)
    return Engine(model, vocab_size=tokenizer.vocab_size, **options), tokenizer
