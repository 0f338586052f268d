"""Inputs of examples, one behind the other in rows that the model reads, and what a head reads of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from andromeda.tokenizer import Tokenizer
from andromeda.training.nebula.recipe import Pooling

ALIGNED = 16  # tokens that a row is a multiple of, where there is room: products in 8 bits want it


class Packed(NamedTuple):
    """E inputs in R rows of T tokens. An input is a document: it sees itself alone.

    Attributes:
        first, last: (E,) places of each input's first and last token, in the rows one behind the other.
    """

    ids: Tensor  # (R, T) int64
    documents: Tensor  # (R, T) int64
    first: Tensor
    last: Tensor

    def to(self, device: torch.device) -> Packed:
        return Packed(*(x.to(device, non_blocking=True) for x in self))


def encode_inputs(tokenizer: Tokenizer, texts: Sequence[str], most: int) -> tuple[list[Tensor], int]:
    """Each as an end-of-text token, which begins a document, and its own; and how many lost their beginning.

    Args:
        most: tokens of one; of a longer one the last are kept.
    """
    encoded = tokenizer.encode_batch(list(texts))
    inputs = [torch.tensor([tokenizer.eos_id, *ids[max(0, len(ids) + 1 - most) :]]) for ids in encoded]
    return inputs, sum(len(ids) + 1 > most for ids in encoded)


def pack(inputs: Sequence[Tensor], most: int) -> Packed:
    """In their order, as many in a row as it has room for.

    Args:
        inputs: at least one; ids of at most `most` tokens each.
    """
    rows: list[list[Tensor]] = [[]]
    for ids in inputs:
        if sum(map(len, rows[-1])) + len(ids) > most:
            rows.append([])
        rows[-1].append(ids)
    longest = max(sum(map(len, row)) for row in rows)
    length = min(most, -(-longest // ALIGNED) * ALIGNED)
    packed = torch.zeros(len(rows), length, dtype=torch.int64)
    documents = torch.full_like(packed, -1)  # of what fills a row up
    first: list[int] = []
    last: list[int] = []
    for number, row in enumerate(rows):
        begin = 0
        for ids in row:
            end = begin + len(ids)
            packed[number, begin:end] = ids
            documents[number, begin:end] = len(first)
            first.append(number * length + begin)
            last.append(number * length + end - 1)
            begin = end
    return Packed(packed, documents, torch.tensor(first), torch.tensor(last))


def pool(hidden: Tensor, packed: Packed, pooling: Pooling) -> Tensor:
    """(R, T, dim) -> (E, dim) in float32: what a head reads of each input."""
    tokens = hidden.flatten(0, 1).float()
    if pooling == "last":
        return tokens[packed.last]
    places = torch.arange(len(tokens), device=tokens.device)
    within = (packed.first[:, None] <= places) & (places <= packed.last[:, None])  # (E, R * T)
    return within.float() @ tokens / within.sum(1, keepdim=True)
