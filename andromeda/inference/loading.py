"""A model and its tokenizer, ready to write."""

from __future__ import annotations

from pathlib import Path

import torch

from andromeda.checkpoint import load_checkpoint, load_config, resolve, run_checkpoints
from andromeda.errors import AndromedaError
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer


def load_model(directory: str | Path) -> tuple[Andromeda, Tokenizer]:
    """Opens a model directory, or the newest checkpoint of a training run, on a GPU where there is one.

    Raises:
        AndromedaError: no such directory, a file that is missing or corrupt, or a tokenizer of another model. An older
            checkpoint of the run that is whole is named.
    """
    folder = resolve(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return _load(folder, device)
    except AndromedaError as error:
        older = next(filter(_whole, run_checkpoints(Path(directory))), None)
        if older is None:
            raise
        raise AndromedaError(f"{error}; an older checkpoint is whole: {older}") from error


def _whole(folder: Path) -> bool:
    try:
        _load(folder, "cpu")
    except AndromedaError:
        return False
    return True


def _load(folder: Path, device: str) -> tuple[Andromeda, Tokenizer]:
    num_tokens = load_config(folder).num_tokens
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > num_tokens:  # before the weights are read
        raise AndromedaError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but the model only num_tokens={num_tokens}; "
            "put the model's own tokenizer.json there"
        )
    return load_checkpoint(folder, device=device).eval(), tokenizer
