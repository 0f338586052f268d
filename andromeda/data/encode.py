"""The second half of a build: the documents that stay -> their ids, in a store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from andromeda.atomic import atomic_directory
from andromeda.data.across import Across
from andromeda.data.augment import Augmenter
from andromeda.data.fields import Document
from andromeda.data.fingerprint import AnySource
from andromeda.data.part import WHOLE, Part
from andromeda.data.parts import Done, read_tokens
from andromeda.data.sift import Advance
from andromeda.data.sources import Unread
from andromeda.data.store import FACTS, Encoded, batched, write_store
from andromeda.data.texts import REMOVED, UNREAD, Texts, from_line, listed_removed, listed_unread
from andromeda.data.workers import Workers
from andromeda.errors import AndromedaError
from andromeda.tokenizer import Tokenizer

Work: TypeAlias = tuple[str, list[bytes]]  # a source's name, and some lines of its documents.jsonl

BATCH_BYTES = 1 << 20  # of lines that a worker takes at a time


@dataclass(frozen=True)
class Encode:
    """What a worker does with documents of a source.

    Attributes:
        bad: of each source, as `Source.bad` has it, for conversations that the chat template refuses.
        augmenters: of sources of whose texts some are changed.
    """

    tokenizer: Tokenizer
    bad: Mapping[str, Literal["stop", "skip"]]
    augmenters: Mapping[str, Augmenter]

    def __call__(self, work: Work) -> Done:
        """
        Raises:
            AndromedaError: a conversation is refused, and its source does not say that such are left out.
        """
        name, documents = work[0], [from_line(line) for line in work[1]]
        if name in self.augmenters:
            return self._augmented(self.augmenters[name], documents)
        texts = [part for document in documents for part in _parts(document)]
        ids = iter(self.tokenizer.encode_batch(texts))
        return [
            self._text(document, ids) if document.text is not None else self._chat(name, document)
            for document in documents
        ]

    def _text(self, document: Document, encoded: Iterator[list[int]]) -> Encoded:
        parts = [next(encoded) for _ in _parts(document)]
        learned = None
        if document.span is not None:
            learned = np.repeat([False, True, False], [len(part) for part in parts])
        ids = self._ids([token for part in parts for token in part])
        return Encoded(document.where, ids, learned, len((document.text or "").encode()))

    def _augmented(self, augmenter: Augmenter, documents: list[Document]) -> Done:
        texts = [document.text or "" for document in documents]
        done = augmenter.encode_batch(texts, [document.where for document in documents])
        return [
            Encoded(
                document.where, self._ids(item.ids), None if item.learned is None else np.array(item.learned, bool),
                len(text.encode()), item.technique,
            )
            for document, text, item in zip(documents, texts, done, strict=True)
        ]  # fmt: skip

    def _chat(self, name: str, document: Document) -> Encoded | Unread:
        try:
            ids, learned = self.tokenizer.encode_chat_with_mask(document.messages or (), document.tools)
        except AndromedaError as error:
            if self.bad[name] == "stop":
                raise AndromedaError(f"source {name}: {document.where}: {error}") from error
            return Unread(document.where, "no conversation", f"{document.where}: {error}")
        num_bytes = len(self.tokenizer.decode(ids).encode())
        return Encoded(document.where, self._ids(ids), np.array(learned, bool), num_bytes)

    def _ids(self, ids: list[int]) -> NDArray[np.unsignedinteger[Any]]:
        return np.array(ids, np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32)


def build_store(
    source: AnySource, texts: Texts, across: Across | None, folder: Path, tokenizer: Tokenizer,
    workers: Workers[Work, Done], parts: list[Path], facts: Mapping[str, Any], advance: Advance,
) -> None:  # fmt: skip
    """Writes a source's documents as ids, and lists of what is not among them, to `folder`, unless it is there.

    Args:
        across: duplicates; None: they stay.
        parts: where `encoded_part` of all parts lies, see `parts`; none: it is done here.
        facts: what source.json says besides.

    Raises:
        AndromedaError: a document cannot be encoded, or `folder` cannot be written.
    """
    if folder.is_dir():
        return
    unread, removed, augmented = Counter(texts.facts["unread"]), Counter(texts.facts["removed"]), Counter[str]()
    with atomic_directory(folder, replaceable=lambda _: False) as new:
        for name in (UNREAD, REMOVED):
            (new / name).write_bytes((texts.folder / name).read_bytes())
        with (new / REMOVED).open("a", encoding="utf-8", newline="\n") as log:
            for item in across.listed(source.name) if across else ():
                removed[item.reason] += 1
                log.writelines(listed_removed([item]))

        with (new / UNREAD).open("a", encoding="utf-8", newline="\n") as log:

            def encoded() -> Iterator[Encoded]:
                for done in read_tokens(parts) if parts else encoded_part(source, texts, across, WHOLE, workers):
                    refused = [item for item in done if isinstance(item, Unread)]
                    unread.update(item.reason for item in refused)
                    log.writelines(listed_unread(refused))
                    kept = [item for item in done if isinstance(item, Encoded)]
                    augmented.update(item.technique for item in kept if item.technique)
                    yield from kept
                    advance(f"{source.name}, tokens", len(kept), sum(item.num_bytes for item in kept))

            written = write_store(
                new, encoded(), eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size, masked=source.masked
            )
        counts = {
            "unread": _sorted(unread), "removed": _sorted(removed), "changes": texts.facts["changes"],
            "augmented": _sorted(augmented),
        }  # fmt: skip
        (new / FACTS).write_text(json.dumps({**written, **counts, **facts}, indent=1) + "\n", encoding="utf-8")


def encoded_part(
    source: AnySource, texts: Texts, across: Across | None, part: Part, workers: Workers[Work, Done]
) -> Iterator[Done]:
    """The documents of a part as ids, some at a time.

    Raises:
        AndromedaError: one cannot be encoded.
    """
    chosen = part.of(len(texts) - (0 if across is None else len(across.removed(source.name))))
    lines = islice(stay(source.name, texts, across), chosen.start, chosen.stop)
    batches = (((source.name, batch), sum(map(len, batch))) for batch in batched(lines, BATCH_BYTES, len))
    return workers.map(batches)


def stay(name: str, texts: Texts, across: Across | None) -> Iterator[bytes]:
    """Of a source, the lines of documents that are no duplicates."""
    removed = iter(() if across is None else across.removed(name))
    following = next(removed, None)
    for number, line in enumerate(texts.lines()):
        if number == following:
            following = next(removed, None)
        else:
            yield line


def _parts(document: Document) -> list[str]:
    """Texts that are encoded one by one: none of a conversation, of a text with a span what stands around it too.

    A model that is asked has the prompt alone, so no token may cross the border.
    """
    if document.text is None or document.span is None:
        return [] if document.text is None else [document.text]
    begin, end = document.span
    return [document.text[:begin], document.text[begin:end], document.text[end:]]


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
