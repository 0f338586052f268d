"""`andromeda data VERB`: from text to what training reads, and what a build holds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from andromeda.commands.output import count, plain_console, plain_table, plural, say
from andromeda.errors import AndromedaError

if TYPE_CHECKING:
    from andromeda.data.sift import Advance
    from andromeda.data.stream import Sequence, Stream


def build(spec: str, out: str, *, corpus: str = ".", workers: int | None = None) -> None:
    """Builds tokens, packed sequences and their order from text, or goes on where it was stopped.

    The same spec and text give the same bytes.

    Args:
        spec: YAML file, such as recipes/data/small.yaml.
        out: a new directory.
        corpus: the folder that the spec's files are in.
        workers: processes; as many as there are cores where none is named. What is built does not depend on it.
    """
    from andromeda.data.build import PICTURE, REPORT
    from andromeda.data.build import build as build_data
    from andromeda.data.report import write_report
    from andromeda.data.spec import read_spec
    from andromeda.data.stream import Stream

    plan = read_spec(spec)
    if not Path(corpus).is_dir():
        raise AndromedaError(f"--corpus {corpus}: no such folder; name the one that the spec's files are in")
    if workers is not None and workers < 1:
        raise AndromedaError(f"--workers {workers}: must be 1 or more")
    with _progress() as advance:
        manifest = build_data(plan, Path(corpus), Path(out), advance, workers)
    tokens = sum(facts["num_tokens"] for facts in manifest["sources"].values())
    sequences = plural(manifest["num_sequences"], "sequence")
    say(f"{out}: {count(tokens)} tokens of {plural(len(manifest['sources']), 'source')}, {sequences} in training")
    for name, facts in manifest["sources"].items():
        for what, counts in (("could not be used", facts["unread"]), ("removed", facts["removed"])):
            if counts:
                number = plural(sum(counts.values()), "document")
                say(f"{name}: {number} {what} ({_most(counts)}), listed in sources/{name}")
    try:
        has_picture = write_report(Stream(out))
    except OSError as error:
        problem = error.strerror or error
        raise AndromedaError(
            f"{out}: is built, but its report cannot be written: {problem}; run it again for one"
        ) from error
    say(f"{out}: report in {REPORT}" + (f" and {PICTURE}" if has_picture else "; for a picture, install matplotlib"))


def _most(counts: Mapping[str, int], shown: int = 3) -> str:
    """The commonest reasons."""
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    others = sum(number for _, number in ordered[shown:])
    parts = [f"{reason} {number:,}" for reason, number in ordered[:shown]]
    return ", ".join([*parts, f"other reasons {others:,}"] if others else parts)


def verify(out: str) -> None:
    """Compares every file of a build with its manifest.

    Args:
        out: the directory of the build.
    """
    from andromeda.data.build import read_manifest
    from andromeda.data.build import verify as verify_data

    manifest = read_manifest(Path(out))
    problems = verify_data(Path(out))
    if problems:
        raise AndromedaError(f"{out}: {'; '.join(problems)}; build it again in a new directory")
    say(f"{out}: {plural(len(manifest['files']), 'file')} as built")


def stats(out: str) -> None:
    """What a build holds: documents and tokens by source, sequences and padding by stage, what was left out and why.

    Args:
        out: the directory of the build.
    """
    from andromeda.data.report import tables
    from andromeda.data.stream import Stream

    console = plain_console()
    for number, table in enumerate(tables(Stream(out))):
        shown = plain_table(*table.columns)
        for row in table.rows:
            shown.add_row(*row)
        if number:
            console.print()
        console.print(shown)


def show(out: str, *, sequence: int = 0) -> None:
    """Prints a training sequence: the very tokens that training reads, as text, with sources and borders.

    Args:
        out: the directory of the build.
        sequence: its number in the stream.
    """
    from andromeda.data.stream import Stream

    stream = Stream(out)
    if not 0 <= sequence < len(stream):
        raise AndromedaError(f"--sequence {sequence}: {out} holds 0 to {len(stream) - 1:,}")
    _print(stream, sequence, stream.sequence(sequence))


def _print(stream: Stream, number: int, shown: Sequence) -> None:
    from andromeda.model import IGNORED

    say(
        f"sequence {number:,}: stage {shown.stage}, source {shown.source}, epoch {shown.epoch}, "
        f"{plural(len(shown.ids), 'token')}"
    )
    for piece in shown.pieces:
        part = slice(piece.first, piece.end)
        learned = int((shown.targets[part] != IGNORED).sum())
        begun = f" from its token {piece.start:,}" if piece.start else ""
        say(
            f"--- tokens {piece.first:,} to {piece.end - 1:,}: {stream.where(piece)}{begun}, "
            f"{learned:,} of {piece.end - piece.first:,} targets learned"
        )
        say(stream.tokenizer.decode(shown.ids[part].tolist(), skip_special=False))
    padding = len(shown.ids) - (shown.pieces[-1].end if shown.pieces else 0)
    if padding:
        say(f"--- {plural(padding, 'token')} of padding")


@contextmanager
def _progress() -> Iterator[Advance]:
    """A line for each part of the work: documents and bytes a second."""
    from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn

    documents, num_bytes, tasks = Counter[str](), Counter[str](), dict[str, TaskID]()
    bar = Progress(
        TextColumn("{task.description}", markup=False), TimeElapsedColumn(), console=plain_console(stderr=True)
    )
    ended = time.monotonic()  # the part before
    began = ended

    def advance(part: str, more_documents: int, more_bytes: int) -> None:
        nonlocal began, ended
        bar.start()  # not before there is something to say
        if part not in tasks:
            began = ended
            for task in tasks.values():
                bar.stop_task(task)
            tasks[part] = bar.add_task(part, total=None)
        ended = time.monotonic()
        documents[part] += more_documents
        num_bytes[part] += more_bytes
        seconds = max(1e-3, ended - began)
        rates = f"{documents[part] / seconds:,.0f} documents/s, {num_bytes[part] / seconds / 1e6:.1f} MB/s"
        bar.update(tasks[part], description=f"{part}: {plural(documents[part], 'document')}, {rates}")

    try:
        yield advance
    finally:
        if tasks:
            bar.stop()


SUBJECTS: dict[str, Callable[..., None]] = {"build": build, "verify": verify, "stats": stats, "show": show}
