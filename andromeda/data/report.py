"""What a build holds and what was left out of it, as tables: for the terminal, and as report.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from andromeda.atomic import replace_file
from andromeda.data.build import PICTURE, REPORT
from andromeda.data.picture import draw
from andromeda.data.store import Store
from andromeda.data.stream import Stream


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is a name, the others are figures, but for a licence or a reason."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def tables(stream: Stream) -> list[Table]:
    """Sources and their documents, stages, what was left out, cleaned and augmented; none without rows."""
    found = [_sources(stream), _documents(stream), _stages(stream), _left_out(stream)]
    found += [_counts(stream, "Cleaned", "changes", "times"), _counts(stream, "Augmented", "augmented", "documents")]
    return [table for table in found if table.rows]


def write_report(stream: Stream) -> bool:
    """Writes report.md and report.png into the build; False where matplotlib is not installed, and there is no picture.

    Raises:
        OSError: they cannot be written.
    """
    has_picture = draw(stream)
    manifest, lengths = stream.manifest, [stage.seq_len for stage in stream.mix.stages]
    documents, tokens = (
        sum(facts[what] for facts in manifest["sources"].values()) for what in ("num_documents", "num_tokens")
    )
    lines = [
        "# What was built",
        "",
        f"{len(stream):,} sequences of {_range(lengths)} tokens,",
        f"made of {documents:,} documents with {tokens:,} tokens.",
        f"Spec: `spec.yaml`, SHA-256 `{manifest['spec_sha256'][:16]}`.",
        *(["", f"![Tokens, lengths, and what was removed]({PICTURE})"] if has_picture else []),
        *(line for table in tables(stream) for line in ["", *_markdown(table)]),
        *_evaluations(manifest),
        "",
        "A list of what was left out, with the place of each document and what it repeats, stands in `removed.txt` and",
        "`unread.txt` of each source's directory.",
    ]
    replace_file(stream.folder / REPORT, "\n".join(lines) + "\n")
    return has_picture


def num_read(facts: dict[str, Any]) -> int:
    """Of a source, the documents before any was removed."""
    return int(facts["num_documents"] + sum(facts["removed"].values()))


# ---- tables --------------------------------------------------------------------------------------


def _sources(stream: Stream) -> Table:
    columns = "source", "documents", "tokens", "unread", "removed", "licence"
    rows = [
        (
            name, f"{facts['num_documents']:,}", f"{facts['num_tokens']:,}", f"{sum(facts['unread'].values()):,}",
            f"{sum(facts['removed'].values()):,}", str(facts["licence"]),
        )
        for name, facts in stream.manifest["sources"].items()
    ]  # fmt: skip
    return Table("Sources", columns, rows)


def _documents(stream: Stream) -> Table:
    columns = "source", "priority", "bytes a token", "median tokens", "longest"
    return Table("Documents", columns, [_lengths(name, store) for name, store in stream.stores.items()])


def _lengths(name: str, store: Store) -> tuple[str, ...]:
    facts, lengths = store.facts, store.lengths
    middle, longest = (int(np.median(lengths)), int(lengths.max())) if len(lengths) else (0, 0)
    density = facts["num_bytes"] / max(1, facts["num_tokens"])
    return name, facts["priority"], f"{density:.2f}", f"{middle:,}", f"{longest:,}"


def _stages(stream: Stream) -> Table:
    columns = "stage", "source", "tokens a sequence", "sequences", "share", "epochs", "padding"
    return Table("Stages", columns, list(_stage_rows(stream)))


def _stage_rows(stream: Stream) -> Iterator[tuple[str, ...]]:
    for stage, counts in zip(stream.mix.stages, stream.mix.counts, strict=True):
        for name, number in zip(stream.mix.sources, counts.tolist(), strict=True):
            if number:
                packing = stream.packings[name, stage.seq_len]
                share, epochs = number / counts.sum(), number / packing.num_sequences
                figures = f"{number:,}", f"{share:.1%}", f"{epochs:.3g}", f"{packing.padding_share:.2%}"
                yield stage.name, name, f"{stage.seq_len:,}", *figures


def _left_out(stream: Stream) -> Table:
    rows = [
        (name, reason, f"{number:,}", f"{number / max(1, num_read(facts) + sum(facts['unread'].values())):.2%}")
        for name, facts in stream.manifest["sources"].items()
        for reason, number in sorted({**facts["unread"], **facts["removed"]}.items(), key=lambda pair: -pair[1])
    ]
    return Table("Left out", ("source", "reason", "documents", "share"), rows)


def _counts(stream: Stream, title: str, fact: str, of: str) -> Table:
    rows = [
        (name, kind, f"{number:,}")
        for name, facts in stream.manifest["sources"].items()
        for kind, number in sorted(facts[fact].items(), key=lambda pair: -pair[1])
    ]
    return Table(title, ("source", "what", of), rows)


# ---- Markdown ------------------------------------------------------------------------------------


def _markdown(table: Table) -> Iterator[str]:
    texts = {"licence", "reason", "what", "priority", "source", "stage"}
    yield f"## {table.title}"
    yield ""
    yield _row(table.columns)
    yield _row(tuple("---" if column in texts else "---:" for column in table.columns))
    yield from map(_row, table.rows)


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def _evaluations(manifest: dict[str, Any]) -> list[str]:
    found = manifest["evaluations"]
    if found is None:
        return []
    return ["", f"Compared with {found['texts']:,} evaluation texts; {found['too_short']:,} were too short for that."]


def _range(lengths: list[int]) -> str:
    least, most = min(lengths), max(lengths)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
