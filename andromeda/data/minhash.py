"""What is kept of a text to find its duplicates: a hash of all of its words, and a MinHash signature of its shingles.

Two texts are near-duplicates by the Jaccard similarity of their sets of shingles: the shingles in both by those in
either (Broder 1997). Of a signature's entries the same share agrees, give or take 0.03 or less.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from andromeda.data import shingles
from andromeda.data.fields import Document
from andromeda.data.shingles import Hashes
from andromeda.errors import AndromedaError

SHINGLE = 3  # words
ENTRIES = 256  # of a signature
SEED = 0
SHORTEST = 20  # words, below which a changed word is more than the tenth of a text, and one task becomes another
FOUND = 0.9  # of pairs at the threshold itself; of those above it more

TEXTS = 512  # at a time, since signatures come as lists of Python's integers

Signatures = NDArray[np.uint16]


@dataclass(frozen=True)
class Near:
    """
    Attributes:
        threshold: Jaccard similarity of 3-word shingles from which two texts are near-duplicates. If a share c of the
            words changed, it is s / (2 - s) with s = (1 - c)^3: 0.75 for 5%, 0.57 for 10%, 0.34 for 20%.

    Raises:
        AndromedaError: a threshold that this many entries cannot find, or above 1.
    """

    threshold: float = 0.45

    def __post_init__(self) -> None:
        if not 0.2 <= self.threshold <= 1:
            raise AndromedaError(f"near-duplicates: `threshold` {self.threshold} must lie between 0.2 and 1")

    @property
    def rows(self) -> int:
        """Entries of a band: as many as still find the share FOUND of pairs at the threshold."""
        rows = 1
        while rows < 32 and 1 - (1 - self.threshold ** (rows + 1)) ** (ENTRIES // (rows + 1)) >= FOUND:
            rows += 1
        return rows

    @property
    def bands(self) -> int:
        return ENTRIES // self.rows


@dataclass(frozen=True)
class Prints:
    """Of n texts. Without near-duplicates `bands` and `signatures` have no columns.

    Attributes:
        words: (n, 2) a hash of all words in their order; of the text itself if there are none.
        bands: (n, bands) a hash of each band's entries; 0 if the text is too short for near-duplicates.
        signatures: (n, ENTRIES) the low 16 bits of each entry.
    """

    words: Hashes
    bands: Hashes
    signatures: Signatures

    def __len__(self) -> int:
        return len(self.words)

    def of_words_only(self) -> Prints:
        """For texts that are alike on purpose, as tasks with other numbers are: only equal words make duplicates."""
        return replace(self, bands=np.zeros_like(self.bands))


def words_of(document: Document) -> str:
    """What of a document is compared. Of a conversation not the system's messages nor the tools, which many share."""
    if document.text is not None:
        return document.text
    said = [message for message in document.messages or () if message.get("role") != "system"]
    return "\n".join(part for message in said for part in strings(message))


def strings(value: object) -> Iterable[str]:
    """The strings and numbers within JSON, names of fields left out."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)
    elif value is not None:
        yield str(value)


def prints(texts: Sequence[str], near: Near | None) -> Prints:
    """Of each text by itself, so it does not matter how texts are divided among calls and workers."""
    found = [shingles.hashed(shingles.words(text)) for text in texts]
    whole = np.frombuffer(b"".join(map(_whole, texts, found)), "<u8").reshape(len(texts), 2)
    if near is None:
        return Prints(whole, np.zeros((len(texts), 0), np.uint64), np.zeros((len(texts), 0), np.uint16))
    entries = _signatures([shingles.grams(hashes, SHINGLE) for hashes in found])
    bands = _bands(entries, near)
    bands[[len(hashes) < SHORTEST for hashes in found]] = 0
    return Prints(whole, bands, entries.astype(np.uint16))


def _whole(text: str, hashes: Hashes) -> bytes:
    data = hashes.astype("<u8").tobytes() if len(hashes) else text.strip().encode(errors="surrogatepass")
    return hashlib.blake2b(data, digest_size=16, person=b"words" if len(hashes) else b"text").digest()


def _signatures(grams: Sequence[Hashes]) -> NDArray[np.uint32]:
    """(n, ENTRIES) the least of each of ENTRIES hash functions over a text's shingles."""
    try:
        from rensa import RMinHash  # type: ignore[import-untyped]
    except ImportError as error:
        raise AndromedaError("near-duplicates need a package; pip install 'andromeda-lm[data]'") from error
    entries = np.zeros((len(grams), ENTRIES), np.uint32)
    for start in range(0, len(grams), TEXTS):
        some = grams[start : start + TEXTS]
        borders = np.concatenate([[0], np.cumsum([len(hashes) for hashes in some])]).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(some), borders, ENTRIES, SEED)
        entries[start : start + TEXTS] = matrix.to_rows()
    return entries


def _bands(entries: NDArray[np.uint32], near: Near) -> Hashes:
    rows, bands = near.rows, near.bands
    parts = entries[:, : rows * bands].astype(np.uint64).reshape(len(entries), bands, rows)
    hashes = np.zeros((len(entries), bands), np.uint64)
    for row in range(rows):
        hashes = (hashes ^ parts[:, :, row]) * shingles.MIX
        hashes ^= hashes >> shingles.HALF
    return np.maximum(hashes, np.uint64(1))  # 0 is kept for texts that are too short
