"""How fast decoding is, beside how fast it could be: each token reads all weights and what the cache holds."""

from __future__ import annotations

from functools import cache
from time import perf_counter

import torch

from andromeda.model import Andromeda

PROBE_BYTES = 64 * 2**20  # larger than the caches of most processors


def bytes_per_token(model: Andromeda, context: int) -> int:
    """Bytes read to decode one token behind `context` others: the weights, and their keys and values.

    Windows are left out of account: the global heads read every key.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if not model.config.tie_embeddings:  # a look-up, of which nothing but one row is read
        weights -= sum(parameter.nbytes for parameter in model.embedding.parameters())
    return weights + context * model.config.kv_bytes_per_token(model.output_weight.element_size())


@cache
def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a plain copy: the best of a few, after one to warm up."""
    source = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * PROBE_BYTES / min(_seconds_to_copy(source, target) for _ in range(4))


def _seconds_to_copy(source: torch.Tensor, target: torch.Tensor) -> float:
    started = perf_counter()
    target.copy_(source)
    if source.is_cuda:
        torch.cuda.synchronize(source.device)
    return perf_counter() - started
