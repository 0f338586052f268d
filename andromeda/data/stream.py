"""The stream of sequences that a build holds: number n is computed from n, so that a reader's state is one integer.

Each batch takes the next numbers, whoever reads them: the order does not depend on how many processes there are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from andromeda.data.build import MANIFEST, PACK_ARRAYS, SPEC, read_manifest, verify
from andromeda.data.mix import Mix, Stage
from andromeda.data.pack import Packing
from andromeda.data.spec import read_spec
from andromeda.data.store import Store
from andromeda.data.windows import Batch
from andromeda.errors import AndromedaError
from andromeda.model import IGNORED
from andromeda.tokenizer import Tokenizer

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Part of a document in a sequence.

    Attributes:
        source, document: the source, and which of its documents.
        first, end: its places in the sequence.
        start: the document's tokens before it.
    """

    source: str
    document: int
    first: int
    end: int
    start: int


@dataclass(frozen=True, eq=False)
class Sequence:
    """T tokens, as training sees them.

    Attributes:
        stage, source, epoch: where in the stream it stands.
        ids: (T,) padded with end-of-text tokens.
        targets: (T,) the token after each; IGNORED where none is to be predicted.
        documents: (T,) equal within a piece; padding is a document of its own.
    """

    stage: str
    source: str
    epoch: int
    ids: Ints
    targets: Ints
    documents: Ints
    pieces: list[Piece]


class Stream:
    """A build, opened for reading.

    Attributes:
        manifest: manifest.json.
        key: its SHA-256, which stands for the whole build.
        mix: which sequence of which source each number is.

    Args:
        folder: of the build.
        check: look at every byte of it first.

    Raises:
        AndromedaError: it is not whole, or, with `check`, something in it was changed; the file is named.
    """

    def __init__(self, folder: str | Path, *, check: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.key = hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()
        if check and (problems := verify(self.folder)):
            raise AndromedaError(f"{self.folder}: {problems[0]}; build it again")
        self.spec = read_spec(self.folder / SPEC)
        self.stores = {name: Store(self.folder / "sources" / name) for name in self.manifest["sources"]}
        lengths = dict.fromkeys((name, stage.seq_len) for stage in self.spec.stages for name in stage.sources)
        self.packings = {key: self._packing(*key) for key in lengths}
        sizes = {key: packing.num_sequences for key, packing in self.packings.items()}
        self.mix = Mix(self.spec.stages, sizes, self.spec.seed)
        if len(self.mix) != self.manifest["num_sequences"]:
            raise AndromedaError(f"{self.folder}: its spec and its manifest disagree; build it again")

    def __len__(self) -> int:
        return len(self.mix)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "tokenizer")

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of a document's token, in the mix of sources that the stream is."""
        tokens = num_bytes = 0.0
        for stage, counts in zip(self.mix.stages, self.mix.counts, strict=True):
            for source in stage.sources:
                packing, facts = self.packings[source, stage.seq_len], self.stores[source].facts
                read = int(counts[self.mix.sources.index(source)]) * packing.num_tokens / packing.num_sequences
                tokens += read
                num_bytes += read * facts["num_bytes"] / facts["num_tokens"]
        return num_bytes / tokens

    def sequence(self, number: int) -> Sequence:
        """
        Raises:
            IndexError: there is no such sequence.
        """
        stage, source, epoch, sequence = (int(value[0]) for value in self.mix.draws(number, 1))
        return self._assembled(self.mix.stages[stage], self.mix.sources[source], epoch, sequence)

    def where(self, piece: Piece) -> str:
        """The file and line of a piece's document."""
        return self.stores[piece.source].where(piece.document)

    def batch(self, first: int, count: int) -> Batch:
        """Sequences first..first + count - 1, all of one stage.

        Raises:
            IndexError: some lie outside the stream.
            AndromedaError: they belong to stages of several lengths.
        """
        draws = self.mix.draws(first, count)
        lengths = {self.mix.stages[stage].seq_len for stage in draws.stage.tolist()}
        if len(lengths) != 1:
            raise AndromedaError(f"{self.folder}: sequences {first} to {first + count - 1} are of several lengths")
        drawn = [
            self._assembled(self.mix.stages[stage], self.mix.sources[source], epoch, sequence)
            for stage, source, epoch, sequence in zip(*(values.tolist() for values in draws), strict=True)
        ]

        def stacked(name: str) -> Tensor:
            return torch.from_numpy(np.stack([getattr(sequence, name) for sequence in drawn]))

        return Batch(stacked("ids"), stacked("targets"), stacked("documents"))

    def _assembled(self, stage: Stage, source: str, epoch: int, number: int) -> Sequence:
        seq_len, store, packing = stage.seq_len, self.stores[source], self.packings[source, stage.seq_len]
        ids = np.full(seq_len, self.tokenizer.eos_id, np.int64)
        targets, documents = np.full(seq_len, IGNORED, np.int64), np.zeros(seq_len, np.int64)
        pieces: list[Piece] = []
        first = 0
        for document, start, length in zip(*(part.tolist() for part in packing.pieces(number)), strict=True):
            end = first + length
            ids[first:end], following, learned = store.piece(document, start, length)
            targets[first:end] = np.where(learned, following, IGNORED)
            documents[first:end] = len(pieces)
            pieces.append(Piece(source, document, first, end, start))
            first = end
        documents[first:] = len(pieces)
        return Sequence(stage.name, source, epoch, ids, targets, documents, pieces)

    def _packing(self, source: str, seq_len: int) -> Packing:
        folder = self.folder / "packs" / f"{source}-{seq_len}"
        try:
            arrays = (np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in PACK_ARRAYS)
            return Packing(seq_len, *arrays)
        except (OSError, ValueError, EOFError) as error:
            raise AndromedaError(f"{folder}: is missing or damaged ({error}); build the data again") from error
