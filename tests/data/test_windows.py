"""Sequences: each token once an epoch, everything from one integer, and documents apart."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from andromeda.data.windows import TokenWindows, document_numbers, validation_batches
from andromeda.errors import AndromedaError
from andromeda.model import IGNORED

END = 0


def ring(length: int, seq_len: int, seed: int = 0) -> TokenWindows:
    """A corpus in which each token is its own place."""
    return TokenWindows(np.arange(length, dtype=np.uint32), seq_len, seed=seed, end_of_text=END)


@given(length=st.integers(1, 90), seq_len=st.integers(1, 30), seed=st.integers(0, 5), epoch=st.integers(0, 20))
def test_each_token_is_a_target_once_an_epoch(length: int, seq_len: int, seed: int, epoch: int) -> None:
    windows = ring(length, seq_len, seed)
    batch = windows.batch(epoch * len(windows), len(windows))
    predicted = batch.targets != IGNORED
    assert sorted(batch.targets[predicted].tolist()) == list(range(length))
    assert torch.equal(batch.targets[predicted], (batch.ids[predicted] + 1) % length)  # each behind the one before it
    assert torch.equal(batch.ids[:, 1:], (batch.ids[:, :-1] + 1) % length)


@given(length=st.integers(2, 90), seq_len=st.integers(1, 30), first=st.integers(0, 500), count=st.integers(1, 9))
def test_a_sequence_follows_from_its_number_alone(length: int, seq_len: int, first: int, count: int) -> None:
    whole = ring(length, seq_len).batch(0, first + count)
    resumed = ring(length, seq_len).batch(first, count)
    for all_of_it, part in zip(whole[:2], resumed[:2], strict=True):
        assert torch.equal(all_of_it[first:], part)


def test_order_and_borders_change_with_the_epoch_and_the_seed() -> None:
    starts = {
        (seed, epoch): tuple(ring(1000, 10, seed).batch(epoch * 100, 100).ids[:, 0].tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len({tuple(start % 10 for start in sorted(order)) for order in starts.values()}) > 3  # the cuts
    assert len(set(starts.values())) == 9
    for order in starts.values():
        neighbours = sum((b - a) % 1000 == 10 for a, b in pairwise(order))
        assert neighbours < 10  # 1 in 100 by chance


def test_documents_are_numbered_from_the_end_of_text_that_begins_them() -> None:
    ids = torch.tensor([[5, 6, END, 7, END, END, 8], [END, 1, 2, 3, 4, 5, 6]])
    assert document_numbers(ids, END).tolist() == [[0, 0, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 1, 1]]
    packed = TokenWindows(np.array([END, 5, 6, END, 7], np.uint16), 4, seed=0, end_of_text=END)
    batch = packed.batch(0, 2)
    assert batch.documents is not None
    assert torch.equal(batch.documents, (batch.ids == END).cumsum(1))
    free = TokenWindows(packed.tokens, 4, seed=0, end_of_text=END, packed_documents=False)
    assert free.batch(0, 2).documents is None


def test_validation_windows_by_hand() -> None:
    tokens = np.array([END, 1, 2, 3, END, 4, 5, 6], np.uint16)
    first, second = validation_batches(tokens, 3, 2, end_of_text=END)
    assert first.ids.tolist() == [[END, 1, 2], [END, END, 4]]
    assert first.targets.tolist() == [[1, 2, 3], [END, 4, 5]]
    assert first.documents is not None
    assert first.documents.tolist() == [[1, 1, 1], [1, 2, 2]]
    assert second.ids[:, :1].tolist() == [[END]]
    assert second.targets.tolist() == [[6, IGNORED, IGNORED]]


@given(length=st.integers(2, 80), seq_len=st.integers(1, 12), batch_size=st.integers(1, 4))
def test_validation_predicts_each_token_but_the_first_once_in_order(length: int, seq_len: int, batch_size: int) -> None:
    tokens = np.arange(length, dtype=np.uint16)
    batches = list(validation_batches(tokens, seq_len, batch_size, end_of_text=END, packed_documents=False))
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    assert targets[targets != IGNORED].tolist() == list(range(1, length))
    for batch in batches:
        assert batch.ids.shape[0] <= batch_size and batch.ids.shape[1] == seq_len
        assert (batch.ids[:, 0] == END).all()
        assert batch.documents is None
        inside = batch.targets[:, 1:] != IGNORED
        assert torch.equal(batch.ids[:, 1:][inside], batch.targets[:, :-1][inside])


def test_no_tokens() -> None:
    with pytest.raises(AndromedaError, match="without tokens"):
        ring(0, 4)
