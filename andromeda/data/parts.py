"""Builds beyond one machine: each task does a part of every source, and the parts, joined, are what one machine makes.

A part is a run of a source's files (of about equally many bytes), samples, or kept documents, so joining is putting one
behind the other. They lie in .work of the build, which all machines see:

    parts/texts/NAME/00003-of-00016/     see `texts`
    parts/tokens/NAME/00003-of-00016/    documents.jsonl, ids.bin, learned.bin: what `Encode` gives

A task that died leaves nothing, and is run again. What runs the tasks: see `datatrove_steps`.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from andromeda.atomic import atomic_directory
from andromeda.data.part import Part
from andromeda.data.sources import Unread
from andromeda.data.store import Encoded, batched
from andromeda.data.texts import DOCUMENTS, FACTS, PRINTS, REMOVED, UNREAD, WHERE
from andromeda.errors import AndromedaError

Done: TypeAlias = list[Encoded | Unread]

IDS, LEARNED = "ids.bin", "learned.bin"
COPIED = 1 << 24  # bytes at a time
JOINED = 1 << 20  # bytes of tokens at a time
OVERHEAD = 1 << 12  # bytes that a document takes besides its tokens


def folders_of_parts(parts: Path, source: str) -> list[Path]:
    """All parts of a source in their order; none: it was not done in parts.

    Raises:
        AndromedaError: some are missing, or they are of several counts.
    """
    found = sorted(path for path in (parts / source).glob("?????-of-?????") if path.is_dir())
    if not found:
        return []
    counts = {path.name.rpartition("-")[2] for path in found}
    if len(counts) > 1:
        raise AndromedaError(f"{parts / source}: holds parts of several pipelines; delete it, and run one again")
    count = int(counts.pop())
    missing = sorted({Part(number, count).name for number in range(count)} - {path.name for path in found})
    if missing:
        raise AndromedaError(
            f"{parts / source}: part {missing[0]} is missing, {len(missing)} in all; run the pipeline to its end, with "
            "a new logging directory if it takes them for completed"
        )
    return found


# ---- texts ---------------------------------------------------------------------------------------


def join_texts(parts: list[Path], folder: Path) -> None:
    """Puts parts of a source behind each other, as `sift` would have written them; then they go.

    Raises:
        AndromedaError: `folder` cannot be written.
    """
    with atomic_directory(folder, replaceable=lambda _: False) as new:
        for name in (DOCUMENTS, WHERE, UNREAD, REMOVED, *(f"{name}.bin" for name in PRINTS)):
            with (new / name).open("wb") as whole:
                for part in parts:
                    with (part / name).open("rb") as file:
                        shutil.copyfileobj(file, whole, COPIED)
        (new / FACTS).write_text(json.dumps(_added(parts), indent=1) + "\n", encoding="utf-8")
    for part in parts:
        shutil.rmtree(part)


def _added(parts: list[Path]) -> dict[str, Any]:
    found = [json.loads((part / FACTS).read_bytes()) for part in parts]
    counts = {
        name: sum((Counter(facts[name]) for facts in found), Counter()) for name in ("unread", "removed", "changes")
    }
    return {
        **{name: sum(facts[name] for facts in found) for name in ("num_documents", "num_bytes")},
        **{name: dict(sorted(counted.items())) for name, counted in counts.items()},
    }


# ---- tokens --------------------------------------------------------------------------------------


def write_tokens(batches: Iterable[Done], folder: Path) -> None:
    """Writes what `Encode` gives.

    Raises:
        AndromedaError: `folder` cannot be written.
    """
    with atomic_directory(folder, replaceable=lambda _: False) as new, ExitStack() as stack:
        listed, ids, learned = (stack.enter_context((new / name).open("wb")) for name in (DOCUMENTS, IDS, LEARNED))
        for item in (item for batch in batches for item in batch):
            if isinstance(item, Unread):
                facts: dict[str, Any] = vars(item)
            else:
                facts = {
                    "where": item.where, "tokens": len(item.ids), "masked": item.learned is not None,
                    "num_bytes": item.num_bytes, "technique": item.technique,
                }  # fmt: skip
                ids.write(np.asarray(item.ids, "<u4").tobytes())
                learned.write(b"" if item.learned is None else item.learned.astype("u1").tobytes())
            listed.write(json.dumps(facts).encode() + b"\n")


def read_tokens(parts: list[Path]) -> Iterator[Done]:
    """The same again, part by part, some documents at a time: of long ones, which take megabytes, a few."""

    def size(item: Encoded | Unread) -> int:
        return OVERHEAD + (4 * len(item.ids) if isinstance(item, Encoded) else 0)

    for part in parts:
        with ExitStack() as stack:
            listed, ids, learned = (stack.enter_context((part / name).open("rb")) for name in (DOCUMENTS, IDS, LEARNED))

            def encoded(facts: dict[str, Any], ids: Any = ids, learned: Any = learned) -> Encoded | Unread:
                if "reason" in facts:
                    return Unread(**facts)
                count, masked = facts.pop("tokens"), facts.pop("masked")
                found = np.frombuffer(ids.read(4 * count), "<u4")
                return Encoded(ids=found, learned=np.frombuffer(learned.read(count), "?") if masked else None, **facts)

            yield from batched((encoded(json.loads(line)) for line in listed), JOINED, size)
