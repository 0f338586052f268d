"""The first half of a build: records -> documents -> cleaned ones, none of an evaluation text, with prints to compare.

Each source's come to lie in a folder, see `texts`. What cleaning takes is several times what writing and reading them
again does, so they are kept there until the second half (see `encode`) knows which are duplicates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from andromeda.atomic import atomic_directory
from andromeda.data.clean import Dropped, clean
from andromeda.data.decontaminate import Evaluations
from andromeda.data.fields import Document
from andromeda.data.fingerprint import AnySource, check_unchanged
from andromeda.data.generated import Generated
from andromeda.data.minhash import Near, prints, words_of
from andromeda.data.part import WHOLE, Part
from andromeda.data.sources import OVERHEAD, Raw, Unread
from andromeda.data.store import batched
from andromeda.data.texts import Batch, Removed, TextsWriter, to_line
from andromeda.data.workers import Workers
from andromeda.errors import AndromedaError

Item: TypeAlias = Raw | int | Unread  # of a file, a sample's number, or what could not be read
Work: TypeAlias = tuple[str, list[Item]]  # a source's name, and some of its items
Advance: TypeAlias = Callable[[str, int, int], None]  # what is done, documents and bytes more than before

BATCH_BYTES = 1 << 20  # of items that a worker takes at a time


@dataclass(frozen=True)
class _Kept:
    line: bytes
    where: str
    text: str  # that it is compared by
    changes: Mapping[str, int]


@dataclass(frozen=True)
class Sift:
    """What a worker does with items of a source.

    Attributes:
        evaluations: texts of which no document may hold a part; None: none.
        near: of sources whose near-duplicates are removed; None: in none of the sources.
    """

    sources: Mapping[str, AnySource]
    evaluations: Evaluations | None
    near: Near | None

    def __call__(self, work: Work) -> Batch:
        """
        Raises:
            AndromedaError: one of them cannot be used, and its source does not say that such are left out.
        """
        source = self.sources[work[0]]
        done = [self._sifted(source, item) for item in work[1]]
        kept = [item for item in done if isinstance(item, _Kept)]
        texts = [item.text for item in kept]
        compared = None if source.dedup == "off" else prints(texts, self.near)
        return Batch(
            [item.line for item in kept],
            [item.where for item in kept],
            compared.of_words_only() if compared and source.dedup == "exact" else compared,
            [item for item in done if isinstance(item, Unread)],
            [item for item in done if isinstance(item, Removed)],
            sum((Counter(item.changes) for item in kept), Counter()),
            sum(len(text.encode(errors="surrogatepass")) for text in texts),
        )

    def _sifted(self, source: AnySource, item: Item) -> _Kept | Unread | Removed:
        if isinstance(item, Unread):
            return item
        document = source.document(item)  # type: ignore[arg-type]  # each kind of source has items of its own
        if isinstance(document, Unread):
            return document
        if document.text is not None and (not document.text or document.text.isspace()):
            return Unread(document.where, "empty", f"{document.where}: no text")
        changes: Mapping[str, int] = {}
        if source.clean is not None:
            cleaned = clean(document, source.clean)
            if isinstance(cleaned, Dropped):
                return Removed(cleaned.where, cleaned.reason, cleaned.figures)
            document, changes = cleaned.document, cleaned.changes
        return self._compared(source, document, changes)

    def _compared(self, source: AnySource, document: Document, changes: Mapping[str, int]) -> _Kept | Unread | Removed:
        text = words_of(document)
        if self.evaluations is not None and (shared := self.evaluations.shared(text)):
            return Removed(document.where, "evaluation text", f"{shared.evaluation}: {shared.words}")
        try:
            return _Kept(to_line(document), document.where, text, changes)
        except AndromedaError as error:
            if isinstance(source, Generated):
                raise
            return source.left_out(document.where, error, "no plain JSON")


def sift(
    source: AnySource, corpus: Path, folder: Path, workers: Workers[Work, Batch], advance: Advance,
    *, part: Part = WHOLE, key: str | None = None,
) -> None:  # fmt: skip
    """Writes what is kept of a source, and what is not, to `folder`, unless it is there.

    Args:
        part: of the source, for one of several tasks.
        key: the fingerprint that the source has had; None: who joins the parts looks whether files have changed.

    Raises:
        AndromedaError: the source cannot be read or has changed, or `folder` cannot be written.
    """
    if folder.is_dir():
        return
    with atomic_directory(folder, replaceable=lambda _: False) as new, TextsWriter(new) as writer:
        for batch in workers.map(_batches(source, corpus, part)):
            writer.add(batch)
            advance(f"{source.name}, read", len(batch.lines), batch.num_bytes)
        if key is not None:
            check_unchanged(source, corpus, key)


def _batches(source: AnySource, corpus: Path, part: Part) -> Iterator[tuple[Work, int]]:
    for batch in batched(_items(source, corpus, part), BATCH_BYTES, lambda sized: sized[1]):
        yield (source.name, [item for item, _ in batch]), sum(size for _, size in batch)


def _items(source: AnySource, corpus: Path, part: Part) -> Iterator[tuple[Item, int]]:
    if isinstance(source, Generated):
        yield from ((number, source.size) for number in part.of(source.documents))
        return
    found: Iterator[Raw | Unread]
    if source.hub is None:
        found = (item for path in part.of_files(source.paths(corpus)) for item in source.records(corpus, path))
    else:
        found = source.rows(corpus) if part.number == 0 else iter(())  # rows come one after the other
    yield from ((item, item.size if isinstance(item, Raw) else OVERHEAD) for item in found)
