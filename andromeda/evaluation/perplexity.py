"""Bits per byte of a text by context length, over the very same tokens at every length.

The text is cut into windows of L tokens, and each is read as [end of text] + its tokens: every token is predicted, the
first from nothing and the last from L - 1 tokens before it. A longer window helps as far as the model makes use of what
is far away; one that it was not trained for shows how it extrapolates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from andromeda.errors import AndromedaError
from andromeda.model import Andromeda, check_range
from andromeda.tokenizer import Tokenizer

TOKENS_AT_ONCE = 8192  # short windows are read together, up to so many tokens
FIRST_POSITIONS = 64  # tokens in the first band of positions; each band ends at twice the one before


@dataclass(frozen=True)
class LengthScore:
    """How well the scored tokens are predicted in windows of `length` tokens."""

    length: int
    tokens: int
    bytes: int
    nats: float  # the sum over all tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens


@dataclass(frozen=True)
class PositionScore:
    """Tokens first..last - 1 of the longest windows: the same tokens, predicted in windows of each length."""

    first: int
    last: int
    tokens: int
    bytes: int
    bits_per_byte: Mapping[int, float]  # by window length


@dataclass(frozen=True)
class Perplexity:
    """Scores by window length, shortest first, and by position in the longest windows."""

    lengths: list[LengthScore]
    positions: list[PositionScore]


def score_lengths(
    model: Andromeda,
    ids: Tensor,
    byte_counts: Tensor,
    lengths: Sequence[int],
    *,
    end_of_text: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Perplexity:
    """Scores a text at each window length.

    Scored is as much of the text as fills whole windows of the longest length, so all lengths score the same tokens; a
    length that does not divide the longest one ends with one shorter window.

    Args:
        ids: (N,) the text's tokens, on the CPU. byte_counts: (N,) the UTF-8 bytes of each (`count_bytes`).
        lengths: tokens a window.
        end_of_text: the token before the first of each window.
        progress: called with the number of tokens just read; in all those of `scored_tokens` at each length.

    Raises:
        AndromedaError: fewer tokens than the longest length, a length below 1, a token id that the model does not
            have, or a loss that is no number.
    """
    lengths = sorted(set(lengths))
    scored = scored_tokens(len(ids), lengths)
    ids, byte_counts = ids[:scored], byte_counts[:scored]
    # On the CPU: on other devices the model itself does not look.
    check_range(model.config, min(int(ids.min()), end_of_text), max(int(ids.max()), end_of_text))
    losses: dict[int, Tensor] = {}  # (scored,) by length
    for length in reversed(lengths):  # what does not fit the machine or the model fails first
        losses[length] = window_losses(model, ids, length, end_of_text=end_of_text, progress=progress)
        if not losses[length].isfinite().all():
            raise AndromedaError(
                f"evaluation: at {length} tokens the loss is no number; are the model's weights whole?"
            )
    total = int(byte_counts.sum())
    scores = [LengthScore(length, scored, total, losses[length].double().sum().item()) for length in lengths]
    return Perplexity(scores, _by_position(losses, byte_counts, longest=lengths[-1]))


def scored_tokens(tokens: int, lengths: Sequence[int]) -> int:
    """How many of a text's tokens are scored: those that fill whole windows of the longest length.

    Raises:
        AndromedaError: there are fewer than that, or a length is below 1.
    """
    if not lengths or min(lengths) < 1:
        raise AndromedaError(f"evaluation: lengths {list(lengths)} must be at least one, and each at least 1 token")
    if tokens < max(lengths):
        raise AndromedaError(
            f"evaluation: the text has {tokens:,} token{'' if tokens == 1 else 's'}, "
            f"fewer than the length {max(lengths):,}; "
            "choose shorter lengths or a longer text"
        )
    return tokens // max(lengths) * max(lengths)


def count_bytes(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """UTF-8 bytes that each of a text's tokens stands for; all together those of the text.

    In a byte-level vocabulary a token is spelt with one character a byte, so a character of the text that is cut in
    two is counted in parts. In others the token that completes a character counts it.

    Raises:
        AndromedaError: the tokenizer does not keep the text as it is, so that its bytes cannot be counted.
    """
    expected = len(text.encode())
    spelt = {token: len(tokenizer.id_to_token(token)) for token in set(ids)}
    counts = [spelt[token] for token in ids]
    if sum(counts) != expected:
        decoder = tokenizer.stream_decoder()
        counts = [len(decoder.step(token).encode()) for token in ids]
    if sum(counts) != expected:
        raise AndromedaError(
            f"evaluation: the tokenizer changes this text ({expected:,} bytes become {sum(counts):,}), so its bits per "
            "byte are not defined; give it a text in the form that it keeps"
        )
    return counts


def window_losses(
    model: Andromeda,
    ids: Tensor,
    length: int,
    *,
    end_of_text: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Tensor:
    """Cross-entropy in nats of each of the ids (N,), read in windows of `length` tokens: (N,) float32 on the CPU."""
    device, was_training = model.output_weight.device, model.training
    losses = []
    model.eval()
    try:
        with torch.inference_mode():
            for targets in _windows(ids, length):
                start = targets.new_full((len(targets), 1), end_of_text)
                inputs = torch.cat([start, targets[:, :-1]], dim=1)
                losses.append(model.token_losses(inputs.to(device), targets.to(device)).flatten().cpu())
                progress(targets.numel())
    finally:
        model.train(was_training)
    return torch.cat(losses)


def _windows(ids: Tensor, length: int) -> Iterator[Tensor]:
    """Batches of (windows, length) in the order of the text, and the last, shorter window by itself."""
    step = max(1, TOKENS_AT_ONCE // length) * length
    for piece in ids.split(step):
        whole = len(piece) // length * length
        if whole:
            yield piece[:whole].view(-1, length)
        if whole < len(piece):
            yield piece[None, whole:]


def _by_position(losses: Mapping[int, Tensor], byte_counts: Tensor, longest: int) -> list[PositionScore]:
    edges = [0]
    while edges[-1] < longest:
        edges.append(min(longest, max(FIRST_POSITIONS, 2 * edges[-1])))
    scores = []
    for first, last in pairwise(edges):
        sizes = byte_counts.view(-1, longest)[:, first:last]
        total = int(sizes.sum())
        bits_per_byte = {
            length: nats.view(-1, longest)[:, first:last].double().sum().item() / math.log(2) / total
            for length, nats in losses.items()
        }
        scores.append(PositionScore(first, last, sizes.numel(), total, bits_per_byte))
    return scores
