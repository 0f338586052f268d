"""Token ids -> sequences: in shuffled order for training, from first to last for validation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from andromeda.data.permutation import hashed, shuffled
from andromeda.data.text import Tokens
from andromeda.errors import AndromedaError
from andromeda.model import IGNORED


class Batch(NamedTuple):
    """B sequences of T tokens, on the CPU."""

    ids: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, the token after each; IGNORED where none is to be predicted
    documents: Tensor | None  # (B, T) int64, equal within a document; None: all tokens see each other


class TokenWindows:
    """Sequence number n of endless training, computed from n alone: resuming takes one integer.

    The corpus is a ring. In each epoch it is cut into windows of seq_len targets, from another place on, and they are
    taken in another order; each token is a target exactly once. Where seq_len does not divide the corpus, the epoch has
    one window whose surplus targets are IGNORED.

    Args:
        tokens: (N,) ids, each document behind an end-of-text token.
        seq_len: tokens a sequence.
        seed: of the order.
        end_of_text: the id that begins a document.
        packed_documents: number the documents of a sequence, so that they do not see each other.

    Raises:
        AndromedaError: no tokens.
    """

    def __init__(
        self, tokens: Tokens, seq_len: int, *, seed: int, end_of_text: int, packed_documents: bool = True
    ) -> None:
        if len(tokens) == 0:
            raise AndromedaError("data: a corpus without tokens cannot be trained on")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.end_of_text, self.packed_documents = end_of_text, packed_documents

    def __len__(self) -> int:
        """Sequences an epoch."""
        return -(-len(self.tokens) // self.seq_len)

    def sequence(self, number: int) -> tuple[NDArray[np.int64], int]:
        """(seq_len + 1,) ids, and how many of its targets, from the first on, are to be predicted."""
        epoch, index = divmod(number, len(self))
        window = shuffled(index, len(self), f"order {self.seed} {epoch}")
        begin = window * self.seq_len
        start = begin + hashed(f"offset {self.seed} {epoch}") % len(self.tokens)
        places = np.arange(start, start + self.seq_len + 1)
        ids = np.take(self.tokens, places, mode="wrap").astype(np.int64)
        return ids, min(self.seq_len, len(self.tokens) - begin)

    def batch(self, first: int, count: int) -> Batch:
        """Sequences first..first + count - 1."""
        sequences = [self.sequence(number) for number in range(first, first + count)]
        tokens = torch.from_numpy(np.stack([ids for ids, _ in sequences]))
        ids, targets = tokens[:, :-1].clone(), tokens[:, 1:].clone()
        for row, (_, predicted) in enumerate(sequences):
            targets[row, predicted:] = IGNORED
        return Batch(ids, targets, document_numbers(ids, self.end_of_text) if self.packed_documents else None)


def validation_batches(
    tokens: Tokens, seq_len: int, batch_size: int, *, end_of_text: int, packed_documents: bool = True
) -> Iterator[Batch]:
    """Every token but the first, predicted once, in windows of seq_len tokens that begin with an end-of-text token.

    Together they predict the corpus' bytes and the ends of its documents, but for the last one's.
    """
    targets = tokens[1:]
    for first in range(0, len(targets), seq_len * batch_size):
        piece = np.asarray(targets[first : first + seq_len * batch_size], np.int64)
        rows = -(-len(piece) // seq_len)
        padded = np.full(rows * seq_len, IGNORED)
        padded[: len(piece)] = piece
        goals = torch.from_numpy(padded).view(rows, seq_len)
        ids = torch.cat([torch.full((rows, 1), end_of_text), goals[:, :-1]], dim=1)
        ids[ids == IGNORED] = end_of_text
        yield Batch(ids, goals, document_numbers(ids, end_of_text) if packed_documents else None)


def document_numbers(ids: Tensor, end_of_text: int) -> Tensor:
    """(B, T) ids -> (B, T) numbers that grow by one at every end-of-text token, which begins a document."""
    return (ids == end_of_text).cumsum(1)
