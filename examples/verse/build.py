"""Builds the verse that the demonstration trains on from a folder of `poetry-*.jsonl.xz` files.

    python examples/verse/build.py POETRY_FOLDER [OUTPUT_FOLDER]

A line of those files is one poem: `text`, `title`, `volume`, `volume_id`, `n` (its place in the volume), `source`.
Whole volumes are chosen by hand below. Of each, the poems are kept whose manner a small model can learn: rhymed, in
lines of ordinary length and everyday words, free of editors' notes and misprints. The same input gives the same bytes.
"""

from __future__ import annotations

import json
import lzma
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

TRAIN = {
    "William Shakespeare": "pg1041",
    "William Wordsworth": "pg8824 pg8912 pg12145 pg32459 pg47651",
    "George Gordon Byron": "pg15368 pg21811",
    "Percy Bysshe Shelley": "pg4798 pg4799 pg4800",
    "John Keats": "pg23684",
    "William Cullen Bryant": "pg16341",
    "Elizabeth Barrett Browning": "pg31015 pg33363 pg37452",
    "Henry Wadsworth Longfellow": "pg1365",
    "John Greenleaf Whittier": "pg9574 pg9578 pg9581 pg9583 pg9585",
    "Edgar Allan Poe": "pg2151 pg10031",
    "Alfred Tennyson": "pg8601",
    "Charles Kingsley": "pg11064",
    "Jean Ingelow": "pg13224",
    "George MacDonald": "pg10578",
    "Adelaide Anne Procter": "pg2304",
    "Christina Rossetti": "pg19188",
    "Emily Dickinson": "pg2678",
    "Susan Coolidge": "pg4560 pg49518",
    "Algernon Charles Swinburne": "pg3697 pg18726 pg27401",
    "Thomas Hardy": "pg2863 pg2997 pg3167 pg3255 pg4758",
    "Alice Meynell": "pg1186 pg30669",
    "Robert Louis Stevenson": "pg25617 pg30659",
    "Ella Wheeler Wilcox": "pg3228 pg5170 pg6667 pg26333 pg51614",
    "Henry van Dyke": "pg16229",
    "A. E. Housman": "pg5720",
    "W. B. Yeats": "pg38877",
    "Walter de la Mare": "pg3753 pg22569 pg32091",
    "Edward Thomas": "pg22423 pg22732",
    "Alfred Noyes": "pg21029 pg30501 pg30599",
    "W. H. Davies": "pg9323",
    "Sarojini Naidu": "pg680",
    "Sara Teasdale": "pg400 pg596",
    "Rupert Brooke": "pg262 pg33902",
    "Edna St. Vincent Millay": "pg109",
}
VALIDATION = {  # poets of whom train holds nothing
    "Ernest Dowson": "pg8497",
    "Archibald Lampman": "pg12664 pg22833",
    "Radclyffe Hall": "pg49277",
    "James Elroy Flecker": "pg3039",
    "Arthur Symons": "pg29531",
}

LINES = range(6, 161)  # lines in a poem
LINE_CHARACTERS = range(16, 51)  # their mean length
MAX_LINE_CHARACTERS = 70
MIN_RHYMED = 0.3  # share of lines that end like one of the four before or after; blank verse has about 0.1
MIN_STOPPED = 0.4  # share of lines that end in punctuation; tables of contents have none
COMMON_POEMS = 25  # a word is common when it stands in so many of the folder's poems
MAX_RARE = 0.03  # share of words that are not common: dialect, foreign names, misprints
OVERLAP_WORDS = 8  # poems that share a run of so many words count as one
SEPARATOR = "\n\n\n"  # between poems; stanzas are one blank line apart

NUMERAL = re.compile(r"[\"(]?([IVXLC]+|\d+)[.)]*\"?")
UNWANTED = re.compile(r"[^A-Za-zàâäçèéêëîïôöùûüæœ \n.,;:!?'\"()—-]")
GENERIC = re.compile(r"\(|FOOTNOTES|SONNET$|A FRAGMENT$|(FIRST |SECOND )?PART\b")
CAPITALS = re.compile(r"\b[A-Z][A-Z']*[A-Z]\b")  # a word in capitals, as printers begin a poem
ENDINGS = ".,;:!?'\")—-"


class Poem(NamedTuple):
    title: str  # in capitals; may be empty
    text: str

    def __str__(self) -> str:
        return f"{self.title}\n\n{self.text}" if self.title else self.text


def main(arguments: list[str]) -> None:
    if len(arguments) not in (1, 2):
        sys.exit("usage: python examples/verse/build.py POETRY_FOLDER [OUTPUT_FOLDER]")
    source, output = Path(arguments[0]), Path(arguments[-1]) if len(arguments) == 2 else Path(__file__).parent
    documents = [document for path in sorted(source.glob("poetry-*.jsonl.xz")) for document in read(path)]
    if not documents:
        sys.exit(f"no poems in {source}: give a folder that holds poetry-*.jsonl.xz")

    poems_with = Counter(word for document in documents for word in set(words(document["text"])))
    common = {word for word, poems in poems_with.items() if poems >= COMMON_POEMS}
    held_out = list(volumes(documents, VALIDATION, common, seen=set()))
    seen = {run for volume in held_out for run in word_runs(volume["text"])}
    train = list(volumes(documents, TRAIN, common, seen))

    lines = (json.dumps(volume, ensure_ascii=False) + "\n" for volume in train)
    (output / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    held_out_text = SEPARATOR.join(volume["text"] for volume in held_out) + "\n"
    (output / "validation.txt").write_text(held_out_text, encoding="utf-8")
    print(table(train), table(held_out), sep="\n\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def volumes(
    documents: Iterable[dict[str, Any]], chosen: dict[str, str], common: set[str], seen: set[str]
) -> Iterator[dict[str, str]]:
    """Each chosen volume as one document: its good poems in their order, less those with a word run in `seen`."""
    by_volume: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        by_volume.setdefault(document["volume_id"], []).append(document)
    for author, ids in chosen.items():
        for volume_id in ids.split():
            parts = sorted(by_volume[volume_id], key=lambda part: int(part["n"]))
            kept = []
            for poem in (poem for part in parts for poem in poems(part) if is_good(poem, common)):
                runs = set(word_runs(poem.text))
                if not runs & seen:
                    kept.append(str(poem))
                    seen |= runs
            first = parts[0]
            yield {
                "title": first["volume"], "author": author, "source": first["source"], "text": SEPARATOR.join(kept),
            }  # fmt: skip


def poems(document: dict[str, Any]) -> Iterator[Poem]:
    """The poems under one heading: numerals part them, unless what they number are single stanzas."""
    parts = [found for lines in numbered_parts(document["text"]) if (found := stanzas(lines))]
    if sum(len(part) == 1 for part in parts) > len(parts) / 2:
        parts = [[stanza for part in parts for stanza in part]]
    for i, part in enumerate(parts):
        yield Poem(heading(document["title"]) if i == 0 else "", "\n\n".join(part))


def numbered_parts(text: str) -> list[list[str]]:
    """Lines of verse, parted where one is a mere numeral; lines that were folded for width are joined again."""
    parts: list[list[str]] = [[]]
    for line in map(tidy, text.split("\n")):
        if NUMERAL.fullmatch(line):
            parts.append([])
        elif line[:1].islower() and parts[-1] and parts[-1][-1]:
            parts[-1][-1] += " " + line
        else:
            parts[-1].append(line)
    return parts


def tidy(line: str) -> str:
    """One line with its spaces and dashes in one form, without a leading numeral or words in capitals."""
    line = re.sub(r" ?(?:—|--+) ?| - |-$|^- ", "—", " ".join(line.split()))
    line = re.sub(r"(?<=[a-z][,.;:!?])(?=[A-Za-z])", " ", line)
    line = re.sub(r"^[IVXLC]+\. (?=[A-Z])", "", line)
    return line if line == line.upper() else CAPITALS.sub(lambda word: word.group().capitalize(), line)


def stanzas(lines: list[str]) -> list[str]:
    """Blocks of verse; notes and headings before and after them are left out."""
    blocks = [block.strip("\n") for block in re.split(r"\n\n+", "\n".join(lines)) if block.strip("\n")]
    while blocks and is_note(blocks[0]):
        blocks.pop(0)
    while blocks and is_note(blocks[-1]):
        blocks.pop()
    return blocks


def is_note(block: str) -> bool:
    return bool(UNWANTED.search(block) or re.fullmatch(r"\(.*\)", block)) or block == block.upper()


def heading(title: str) -> str:
    """The most particular part of a heading such as 'LOVE. / I. / MINE'; empty where there is none."""
    parts = [part.strip(" .:;,").removeprefix("VERSE: ") for part in title.split(" / ")]
    good = [
        part for part in parts
        if part == part.upper() and 2 < len(part) <= 40 and part.count('"') % 2 == 0
        and not (NUMERAL.fullmatch(part) or UNWANTED.search(part) or GENERIC.match(part))
    ]  # fmt: skip
    return good[-1] if good else ""


def is_good(poem: Poem, common: set[str]) -> bool:
    lines = [line for line in poem.text.split("\n") if line]
    spoken = words(poem.text)
    return (
        len(lines) in LINES
        and not UNWANTED.search(poem.text)
        and sum(map(len, lines)) // len(lines) in LINE_CHARACTERS
        and max(map(len, lines)) <= MAX_LINE_CHARACTERS
        and not any(line == line.upper() and len(line) > 3 for line in lines)
        and sum(line[-1] in ENDINGS for line in lines) >= MIN_STOPPED * len(lines)
        and sum(word not in common for word in spoken) <= MAX_RARE * len(spoken)
        and rhymed_lines(lines) >= MIN_RHYMED * len(lines)
    )


def rhymed_lines(lines: list[str]) -> int:
    keys = [ending(line) for line in lines]
    return sum(key in keys[max(0, i - 4) : i] + keys[i + 1 : i + 5] for i, key in enumerate(keys))


def ending(line: str) -> str:
    """The last word from its last sounded vowel on, as spelled: 'stone' -> 'on'."""
    word = (words(line) or [""])[-1].replace("'", "")
    word = re.sub(r"(?<=[^aeiouy])e$", "", word) if len(word) > 3 else word
    found = re.search(r"[aeiouy]+[^aeiouy]*$", word)
    return found.group() if found else word


def words(text: str) -> list[str]:
    return re.findall(r"[a-zà-ÿœ']+", text.lower())


def word_runs(text: str) -> Iterator[str]:
    found = words(text)
    return (" ".join(found[i : i + OVERLAP_WORDS]) for i in range(len(found) - OVERLAP_WORDS + 1))


def table(chosen: list[dict[str, str]]) -> str:
    """Markdown: volumes, poems and bytes of each author."""
    rows = ["| author | volumes | poems | bytes |", "|---|---:|---:|---:|"]
    for author in dict.fromkeys(volume["author"] for volume in chosen):
        texts = [volume["text"] for volume in chosen if volume["author"] == author]
        poems = sum(text.count(SEPARATOR) + 1 for text in texts)
        rows.append(f"| {author} | {len(texts)} | {poems} | {sum(len(text.encode()) for text in texts):,} |")
    total_poems = sum(volume["text"].count(SEPARATOR) + 1 for volume in chosen)
    total_bytes = sum(len(volume["text"].encode()) for volume in chosen)
    return "\n".join([*rows, f"| **total** | {len(chosen)} | {total_poems} | {total_bytes:,} |"])


if __name__ == "__main__":
    main(sys.argv[1:])
