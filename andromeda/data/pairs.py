"""Pairs of answers to a prompt, one preferred to the other, in TRL's form: `prompt`, `chosen` and `rejected`.

All three are texts, or all are lists of messages, with `tools` where functions are offered. Of messages `prompt` may be
missing: what both answers begin with is then the prompt. Source: https://huggingface.co/docs/trl/dataset_formats

A pair is kept as two documents of a `Store`, prompt and answer each, of which the answer alone is learned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from andromeda.atomic import atomic_directory
from andromeda.data import files
from andromeda.data.fields import conversation, listed_names, offered
from andromeda.data.json_object import Record
from andromeda.data.pack import pack
from andromeda.data.permutation import shuffled
from andromeda.data.sources import raw_records
from andromeda.data.store import FACTS, Encoded, Store, write_store
from andromeda.data.windows import Batch
from andromeda.errors import AndromedaError
from andromeda.model import IGNORED
from andromeda.tokenizer import Tokenizer

KINDS = (".jsonl", ".parquet")
KEYS = {"prompt", "chosen", "rejected"}
FORMAT_VERSION = 1
PADDING = -1  # the document number of what fills up a sequence

Messages = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers, all of one kind.

    Attributes:
        where: its file, and line or row.
        tools: functions on offer, in the form of OpenAI's API.
    """

    where: str
    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: Messages | None = None


# ---- reading -------------------------------------------------------------------------------------


def check_pairs(paths: Sequence[str | Path], whole: bool = False) -> None:
    """Before any work: the files are there, and the first pair, or all of them, can be read.

    Raises:
        AndromedaError: what `read_pairs` raises so far, or there is no pair.
    """
    if sum(1 for _ in islice(read_pairs(paths), None if whole else 1)) == 0:
        raise AndromedaError(f"{', '.join(map(str, paths))}: no pair; name files that hold some")


def split_files(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files of text, and files of pairs: .parquet, or .jsonl that begins with a record of one.

    Raises:
        AndromedaError: a file whose first record cannot be read.
    """
    texts: list[str] = []
    pairs: list[str] = []
    for name in paths:
        (pairs if _holds_pairs(Path(name)) else texts).append(name)
    return texts, pairs


def _holds_pairs(path: Path) -> bool:
    kind = files.kind(path)
    if kind != ".jsonl" or not path.is_file():
        return kind == ".parquet"
    first = next(raw_records(path, str(path), None), None)
    return first is not None and not KEYS.isdisjoint(first.record())


def read_pairs(paths: Sequence[str | Path]) -> Iterator[Pair]:
    """
    Raises:
        AndromedaError: a file that is missing, of another kind or damaged, or a record that is no pair.
    """
    for path in map(Path, paths):
        if files.kind(path) not in KINDS:
            raise AndromedaError(f"{path}: unknown kind of file; pairs lie in {' or '.join(KINDS)}, compressed or not")
        if not path.is_file():
            raise AndromedaError(f"{path}: no such file (looked for in {Path.cwd()}); name files of pairs")
    for path in map(Path, paths):
        for raw in raw_records(path, str(path), None):
            yield _pair(raw.record(), raw.where)


def _pair(record: Record, where: str) -> Pair:
    for name in ("chosen", "rejected"):
        if record.get(name) is None:
            raise AndromedaError(f"{where}: has no `{name}` (there are: {listed_names(record)}), so it is no pair")
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    if chosen == rejected:
        raise AndromedaError(f"{where}: `chosen` and `rejected` are the same, so nothing is preferred; drop it")
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        for name in ("prompt", "chosen", "rejected"):
            files.check_unicode(record[name], where, f"`{name}`")
        return Pair(where, prompt, chosen, rejected)
    if any(isinstance(value, str) for value in (prompt, chosen, rejected)):
        raise AndromedaError(
            f"{where}: `prompt`, `chosen` and `rejected` must all be texts, or all lists of messages (of which "
            "`prompt` may be missing)"
        )
    return _conversations(record, where)


def _conversations(record: Record, where: str) -> Pair:
    tools = None if record.get("tools") is None else offered(record["tools"], where) or None
    chosen, rejected = (conversation(record[name], where) for name in ("chosen", "rejected"))
    if record.get("prompt") is not None:
        return Pair(where, conversation(record["prompt"], where), chosen, rejected, tools)
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    if not 0 < shared < min(len(chosen), len(rejected)):
        raise AndromedaError(f"{where}: has no `prompt`, and its answers do not begin with one and then differ")
    return Pair(where, chosen[:shared], chosen[shared:], rejected[shared:], tools)


# ---- token ids -----------------------------------------------------------------------------------


def load_pairs(paths: Sequence[str | Path], tokenizer: Tokenizer, directory: Path) -> Store:
    """The pairs' tokens, kept in `directory` and used again while neither files nor tokenizer change.

    Of pair p the documents are 2p, with the chosen answer, and 2p + 1, with the rejected one.

    Raises:
        AndromedaError: what `read_pairs` raises; no pair; a chat template that is missing, or that refuses one; the
            directory cannot be written.
    """
    key = _fingerprint(paths, tokenizer)
    try:
        store = Store(directory)
        if store.facts.get("key") == key:
            return store
    except AndromedaError:  # there is none yet, or it is damaged
        pass
    with atomic_directory(directory, replaceable=lambda folder: (folder / FACTS).exists()) as folder:
        encoded = (answer for pair in read_pairs(paths) for answer in encode_pair(pair, tokenizer))
        written = write_store(folder, encoded, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size, masked=True)
        if written["num_documents"] == 0:
            raise AndromedaError(f"{', '.join(map(str, paths))}: no pair; name files that hold some")
        (folder / FACTS).write_text(json.dumps({**written, "key": key}) + "\n", encoding="utf-8")
    return Store(directory)


def encode_pair(pair: Pair, tokenizer: Tokenizer) -> tuple[Encoded, Encoded]:
    """Prompt and answer, chosen and rejected. Of a text the answer goes on behind the prompt, and its end is learned.

    Raises:
        AndromedaError: there is no chat template, or it writes a prompt otherwise where an answer follows.
    """
    chosen, rejected = (_encoded(pair, answer, tokenizer) for answer in (pair.chosen, pair.rejected))
    return chosen, rejected


def _encoded(pair: Pair, answer: str | Messages, tokenizer: Tokenizer) -> Encoded:
    if isinstance(pair.prompt, str):
        assert isinstance(answer, str)
        before, behind = tokenizer.encode_batch([pair.prompt, answer])
        learned = np.arange(len(before) + len(behind)) >= len(before)
        return Encoded(pair.where, [*before, *behind], learned, len((pair.prompt + answer).encode()))
    assert not isinstance(answer, str)
    try:
        ids, mask = tokenizer.encode_chat_with_mask([*pair.prompt, *answer], pair.tools)
        prompt = tokenizer.encode_chat(pair.prompt, pair.tools, add_generation_prompt=False)
    except AndromedaError as error:
        raise AndromedaError(f"{pair.where}: {error}") from error
    if ids[: len(prompt)] != prompt:
        raise AndromedaError(
            f"{pair.where}: the chat template writes the prompt otherwise where an answer follows; use another"
        )
    learned = np.array(mask, bool)
    learned[: len(prompt)] = False  # of what the assistant said before
    if not learned.any():
        raise AndromedaError(f"{pair.where}: in an answer the assistant says nothing; drop the pair")
    return Encoded(pair.where, ids, learned, len(tokenizer.decode(ids).encode()))


def _fingerprint(paths: Sequence[str | Path], tokenizer: Tokenizer) -> str:
    digest = hashlib.blake2b(f"{FORMAT_VERSION} {tokenizer.sha256}".encode(), digest_size=16)
    for path in map(Path, paths):
        with path.open("rb") as file:
            digest.update(f" {files.kind(path)} {hashlib.file_digest(file, 'blake2b').hexdigest()}".encode())
    return digest.hexdigest()


# ---- sequences -----------------------------------------------------------------------------------


class PairSequences:
    """Double sequence number n of endless training on whole pairs, computed from n alone.

    The first half holds the chosen answers of as many pairs as fit (best fit, `pack`), the second half the rejected
    answers of the same, in the same order. In a batch's `documents` those of pair p are 2p and 2p + 1; padding is
    PADDING. Each epoch takes all double sequences in another order.

    Args:
        store: of `load_pairs`.
        seq_len: tokens of a half.
        seed: of the order.

    Attributes:
        fitting: pairs that are there. too_long: those that are left out.

    Raises:
        AndromedaError: no pair fits.
    """

    def __init__(self, store: Store, seq_len: int, *, seed: int, end_of_text: int) -> None:
        self.store, self.seq_len, self.seed, self.end_of_text = store, seq_len, seed, end_of_text
        lengths = store.lengths.reshape(-1, 2).max(1)
        self.fitting, self.too_long = (np.flatnonzero(fits) for fits in (lengths <= seq_len, lengths > seq_len))
        if len(self.fitting) == 0:
            raise AndromedaError(
                f"{store.where(0)}: an answer of this pair has {lengths[0]:,} tokens, with its prompt, and none "
                f"fits into seq_len={seq_len}; raise seq_len"
            )
        self._packing = pack(lengths[self.fitting], seq_len)

    def __len__(self) -> int:
        """Double sequences an epoch."""
        return self._packing.num_sequences

    @property
    def num_pairs(self) -> int:
        """Of all files; those that are left out too."""
        return len(self.store) // 2

    def batch(self, first: int, count: int) -> Batch:
        """Double sequences first..first + count - 1 of training, (count, 2 * seq_len)."""
        numbers = [divmod(number, len(self)) for number in range(first, first + count)]
        return self._stacked([shuffled(place, len(self), f"pairs {self.seed} {epoch}") for epoch, place in numbers])

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Each once."""
        for first in range(0, len(self), batch_size):
            yield self._stacked(range(first, min(first + batch_size, len(self))))

    def _stacked(self, places: Sequence[int]) -> Batch:
        shape = (len(places), 2 * self.seq_len)
        ids, targets, documents = (np.full(shape, x) for x in (self.end_of_text, IGNORED, PADDING))
        for row, place in enumerate(places):
            pairs = self.fitting[self._packing.pieces(place)[0]]
            for half in range(2):
                begin = half * self.seq_len
                for document in (2 * pairs + half).tolist():
                    end = begin + int(self.store.lengths[document])
                    ids[row, begin:end], following, learned = self.store.piece(document, 0, end - begin)
                    targets[row, begin:end] = np.where(learned, following, IGNORED)
                    documents[row, begin:end] = document
                    begin = end
        return Batch(*(torch.from_numpy(x) for x in (ids, targets, documents)))
