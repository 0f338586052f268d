"""From a model directory to what answers."""

from __future__ import annotations

from dataclasses import replace

from andromeda.inference.engine.loading import load_engine
from andromeda.inference.engine.service import Service as EngineService
from andromeda.serving.limits import Limits
from andromeda.serving.service import LocalService


def open_service(directory: str, limits: Limits) -> LocalService:
    """Opens a model directory, or the newest checkpoint of a run, behind an engine of its own.

    Raises:
        AndromedaError: a model that cannot be opened, or no memory for its cache.
    """
    engine, tokenizer = load_engine(directory)
    backend = EngineService(engine)
    context = min(limits.max_context_tokens, backend.max_tokens)
    return LocalService(backend, tokenizer, replace(limits, max_context_tokens=context))
