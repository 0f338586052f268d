"""Documents -> sequences of seq_len tokens, with no cut that could be spared and little padding.

Best-fit decreasing bin packing, as in Ding et al., "Fewer Truncations Improve Language Modeling" (ICML 2024,
arXiv:2404.10830): longest first, each document goes to the sequence that it leaves the least room in. The lengths that
lie together depend only on how many documents there are of each length. So sequences with equally much room are moved
together, as a number of them, and which document lies in which of them is worked out for all at once.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from andromeda.errors import AndromedaError

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Packing:
    """S sequences made of P pieces of documents; sequence s is pieces offsets[s] up to offsets[s + 1], longest first.

    Attributes:
        seq_len: most tokens of a sequence.
        offsets: (S + 1,)
        documents: (P,) the document of each piece.
        starts: (P,) its first token, counted in the document.
        lengths: (P,) its tokens, 1 or more.

    Raises:
        ValueError: arrays whose sizes disagree; a piece or a sequence that is empty; a sequence longer than seq_len.
    """

    seq_len: int
    offsets: Ints
    documents: Ints
    starts: Ints
    lengths: Ints

    def __post_init__(self) -> None:
        pieces = (len(self.documents), len(self.starts), len(self.lengths))
        if len(self.offsets) == 0 or self.offsets[0] != 0 or {*pieces} != {int(self.offsets[-1])}:
            raise ValueError(f"packing: offsets must run from 0 to the number of pieces; got {pieces} pieces")
        if (np.diff(self.offsets) < 1).any() or (self.lengths < 1).any():
            raise ValueError("packing: no sequence and no piece may be empty")
        if (self.fill > self.seq_len).any():
            raise ValueError(f"packing: sequence {int(self.fill.argmax())} is longer than {self.seq_len} tokens")

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Of the documents: without padding."""
        return int(self.lengths.sum())

    @property
    def fill(self) -> Ints:
        """(S,) tokens of each sequence; the rest up to seq_len is padding."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])[self.offsets]
        return np.diff(ends)

    @property
    def padding_share(self) -> float:
        """Padding / (num_sequences * seq_len); 0 where there is no sequence."""
        room = self.num_sequences * self.seq_len
        return (room - self.num_tokens) / max(1, room)

    def pieces(self, sequence: int) -> tuple[Ints, Ints, Ints]:
        """Documents, starts and lengths, (p,) each, of the p pieces of a sequence."""
        part = slice(self.offsets[sequence], self.offsets[sequence + 1])
        return self.documents[part], self.starts[part], self.lengths[part]


def pack(lengths: NDArray[np.integer[Any]], seq_len: int) -> Packing:
    """Places each token of each document once.

    A document of at most seq_len tokens stays whole. A longer one is cut into pieces of seq_len, each a sequence of its
    own, and the rest, which is packed like a document. `offsets` and `lengths` of the result do not depend on the order
    of the documents. Of equally long pieces, that of the earlier document is placed first; of sequences with equally
    much room, that which came to have it first is filled first.

    Python's work is one step for each pair of a length and a room that meet, at most one a piece; numpy's is sorting
    pieces. Memory grows with the pieces, and not with the tokens.

    Args:
        lengths: (N,) tokens of each document, with any end-of-text token; a document of none has no piece.
        seq_len: tokens of a sequence.

    Raises:
        AndromedaError: seq_len is below 1.
        ValueError: `lengths` is not one row of integers of 0 or more.
    """
    if seq_len < 1:
        raise AndromedaError(f"data: seq_len is {seq_len}; a sequence needs at least one token")
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (lengths < 0).any():
        raise ValueError("pack: lengths must be one row of integers of 0 or more")
    documents, starts, sizes = _cut(lengths.astype(np.int64), seq_len)
    sequences = _sequences(_moves(sizes, seq_len), seq_len)
    order = np.argsort(sequences, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(sequences))]).astype(np.int64)
    return Packing(seq_len, offsets, documents[order], starts[order], sizes[order])


def _cut(lengths: Ints, seq_len: int) -> tuple[Ints, Ints, Ints]:
    """(N,) -> documents, starts and sizes of all pieces, (P,) each: longest first, then by document, then by start."""
    full, rest = np.divmod(lengths, seq_len)
    long = np.repeat(np.arange(len(lengths)), full)
    number = np.arange(len(long)) - np.repeat(np.cumsum(full) - full, full)
    short = np.flatnonzero(rest)
    short = short[np.argsort(-rest[short], kind="stable")]
    documents = np.concatenate([long, short])
    starts = np.concatenate([number, full[short]]) * seq_len
    return documents, starts, np.concatenate([np.full(len(long), seq_len), rest[short]])


def _moves(sizes: Ints, seq_len: int) -> Ints:
    """(P,) falling -> (M, 4) moves in their order, each: `bins` sequences with `room` receive `each` pieces of `size`.

    A row is room, size, bins, each. A sequence with seq_len of room is a new one.
    """
    distinct, counts = np.unique(sizes, return_counts=True)
    moves = array("q")
    rooms: list[int] = []  # rising; those that some sequence has
    bins_with: dict[int, int] = {}
    for size, left in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            place = bisect_left(rooms, size)
            new = place == len(rooms)
            room = seq_len if new else rooms[place]
            each = min(left, room // size)  # after the first of them, this sequence has the least room that suffices
            bins = left // each if new else min(left // each, bins_with[room])
            moves.extend((room, size, bins, each))
            left -= bins * each
            if not new:
                bins_with[room] -= bins
                if not bins_with[room]:
                    del rooms[place], bins_with[room]
            remaining = room - each * size
            if remaining and remaining not in bins_with:
                insort(rooms, remaining)
            if remaining:
                bins_with[remaining] = bins_with.get(remaining, 0) + bins
    return np.array(moves, np.int64).reshape(-1, 4)


def _sequences(moves: Ints, seq_len: int) -> Ints:
    """(M, 4) moves -> (P,) the sequence of each piece, for the pieces in the order of `_moves`.

    A visit is one sequence's part in a move. Sequences leave a room in the order in which they came to it, so the j-th
    visit that begins with a room follows the j-th that ends with it.
    """
    room, size, each = (np.repeat(moves[:, column], moves[:, 2]) for column in (0, 1, 3))  # (V,) by visit
    after = room - each * size
    came = np.argsort(after, kind="stable")
    left = np.argsort(room, kind="stable")
    left = left[: np.searchsorted(room[left], seq_len)]  # without those that begin a sequence
    rank = np.arange(len(left)) - np.searchsorted(room[left], room[left])
    opened = np.arange(len(room))  # a visit before it, and in the end the one that began its sequence
    opened[left] = came[np.searchsorted(after[came], room[left]) + rank]
    while not np.array_equal(opened, further := opened[opened]):
        opened = further
    number = np.cumsum(room == seq_len) - 1
    return np.repeat(number[opened], each)
