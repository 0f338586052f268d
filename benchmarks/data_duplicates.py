"""Are near-duplicates found, and nothing else? By copies planted among real texts, by kind of change and by length.

For each kind of change a corpus is made of all texts and behind them one changed copy of each, and compared as a build
compares, at its default threshold. A copy is found if it is removed. Beside recall there are two precisions:

    planted    of what is removed, the share that is a planted copy and points at its own original
    by text    the same, where what repeats another text by itself (Jaccard similarity of all its words, three in a
               row, at the threshold or above) is no error either; real corpora hold such

One word is changed at least, so a text of fewer than ten words has no copy with at most a tenth of them changed: each
kind is planted of those texts alone that are long enough for it.

Decoys, copies with 30% of their words changed, are no duplicates, and must stay.

    python benchmarks/data_duplicates.py --json duplicates.json        # the poems and volumes of examples/verse
    python benchmarks/data_duplicates.py --corpus poetry-00.jsonl.xz gsm8k.jsonl.xz --field text question
    python benchmarks/data_duplicates.py --check                       # a few
"""

from __future__ import annotations

import argparse
import json
import lzma
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from andromeda.benchmarks.corpus import DECOY, KINDS, SHARE, plant
from andromeda.data import shingles
from andromeda.data.dedup import Duplicates, Index
from andromeda.data.minhash import SHINGLE, SHORTEST, Near, prints

VERSE = Path(__file__).parents[1] / "examples" / "verse" / "train.jsonl"
LENGTHS = (0, 10, 20, 50, 100, 200, 500, 2_000, 10_000)  # words, as texts are compared by; each up to the next
NEAR = f"{SHORTEST} and more"  # below, only equal words make duplicates
BATCH = 512


@dataclass(frozen=True)
class Score:
    """Of one kind of copies, or of those of some length; None: nothing was removed."""

    kind: str
    lengths: str
    copies: int
    found: int
    removed: int
    planted: float | None = None
    by_text: float | None = None

    @property
    def recall(self) -> float:
        return self.found / max(1, self.copies)


def main() -> None:
    options = arguments()
    texts = read(options.corpus, options.field, options.limit) if options.corpus else verse()
    texts = texts[:: len(texts) // 60] if options.check else texts
    print(f"{len(texts):,} texts, {sum(len(text.encode()) for text in texts) / 1e6:.1f} MB", flush=True)
    scores: list[Score] = []
    for kind in (*KINDS, DECOY):
        scores += scored(texts, kind)
        print(f"{kind}: {scores[-1].found:,} of {scores[-1].copies:,} removed", flush=True)
    print_table(scores)
    if options.json:
        options.json.write_text(json.dumps([asdict(score) for score in scores], indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, nargs="*", help=".jsonl or .jsonl.xz")
    parser.add_argument("--field", nargs="*", default=["text"], help="of each file; the last one for the rest")
    parser.add_argument("--limit", type=int, default=3000, help="texts of each file")
    parser.add_argument("--json", type=Path, help="file to write to")
    parser.add_argument("--check", action="store_true")
    return parser.parse_args()


# ---- texts ---------------------------------------------------------------------------------------


def verse() -> list[str]:
    """The volumes, and each of their poems, which two blank lines end: no volume is like one of its poems."""
    with VERSE.open(encoding="utf-8") as file:
        volumes = [str(json.loads(row)["text"]) for row in file]
    poems = [poem.strip() for volume in volumes for poem in volume.split("\n\n\n")]
    return unlike([*volumes, *(poem for poem in poems if poem)])


def read(files: Sequence[Path], fields: Sequence[str], limit: int) -> list[str]:
    """As many texts of each file, from all over it."""
    texts: list[str] = []
    for number, path in enumerate(files):
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            found = [str(json.loads(row)[fields[min(number, len(fields) - 1)]]) for row in file]
        texts += found[:: -(-len(found) // limit)]
    return unlike(texts)


def unlike(texts: Sequence[str]) -> list[str]:
    """Without those that have no words, or those of an earlier one, so that each copy has one original."""
    found = {tuple(shingles.words(text)): text for text in reversed(texts)}
    found.pop((), None)
    return list(found.values())[::-1]


# ---- scores --------------------------------------------------------------------------------------


def scored(texts: Sequence[str], kind: str) -> Iterator[Score]:
    """By length, and last of all lengths."""
    planted = plant(texts, kind, seed=0)
    originals = [place for place, text in enumerate(texts) if long_enough(text, kind)]
    together, N = [*texts, *(planted[place] for place in originals)], len(texts)
    found = compared(together)
    lengths = np.array([len(shingles.words(texts[place])) for place in originals], int)
    gone = np.isin(np.arange(N, len(together)), found.removed)
    for least, most in zip(LENGTHS, [*LENGTHS[1:], np.inf], strict=True):
        inside = (lengths >= least) & (lengths < most)
        if inside.any():
            name = f"{least:,} and more" if most == np.inf else f"{least:,} to {int(most) - 1:,}"
            yield Score(kind, name, int(inside.sum()), int(gone[inside].sum()), int(gone[inside].sum()))
    compared_near = lengths >= SHORTEST
    yield Score(kind, NEAR, int(compared_near.sum()), *[int(gone[compared_near].sum())] * 2)
    right = (np.array([-1] * N + originals)[found.removed] == found.of) & (kind != DECOY)
    alike = right.copy()
    for place in np.flatnonzero(~right):
        pair = (together[number] for number in (found.removed[place], found.of[place]))
        alike[place] = similarity(*pair) >= Near().threshold
    removed = len(found.removed)
    precisions = (float(right.mean()), float(alike.mean())) if removed else (None, None)
    yield Score(kind, "all", len(originals), int(gone.sum()), removed, *precisions)


def long_enough(text: str, kind: str) -> bool:
    """One changed word is no larger share of the text's than `kind` says."""
    share = SHARE.fullmatch(kind)
    return share is None or len(text.split()) * int(share[1]) >= 100


def compared(texts: Sequence[str]) -> Duplicates:
    near = Near()
    with tempfile.TemporaryDirectory() as folder, Index(Path(folder), near) as index:
        for start in range(0, len(texts), BATCH):
            some = texts[start : start + BATCH]
            index.add(np.arange(start, start + len(some)), prints(some, near))
        return index.duplicates()


def similarity(one: str, other: str) -> float:
    """The true Jaccard similarity, which signatures estimate; 1 if the words are equal."""
    words = [shingles.words(text) for text in (one, other)]
    if words[0] == words[1]:
        return 1.0
    first, second = (set(shingles.grams(shingles.hashed(found), SHINGLE).tolist()) for found in words)
    return len(first & second) / max(1, len(first | second))


def print_table(scores: Sequence[Score]) -> None:
    names = list(dict.fromkeys(score.lengths for score in scores))
    print("\nShare of copies removed, by words of the text:\n")
    print("| | copies | " + " | ".join(names) + " | precision: planted | by text |\n|---|" + "---:|" * (len(names) + 3))
    counts = [next(f"{score.copies:,}" for score in scores if score.lengths == name) for name in names]
    print("| texts | | " + " | ".join(counts) + " | | |")
    for kind in dict.fromkeys(score.kind for score in scores):
        own = {score.lengths: score for score in scores if score.kind == kind}
        shares = [f"{own[name].recall:.3f}" if name in own and own[name].copies else "-" for name in names]
        precisions = ["-" if value is None else f"{value:.4f}" for value in (own["all"].planted, own["all"].by_text)]
        most = "at most " if kind in KINDS and SHARE.fullmatch(kind) else ""
        print(f"| {most}{kind} | {own['all'].copies:,} | " + " | ".join([*shares, *precisions]) + " |")


if __name__ == "__main__":
    main()
