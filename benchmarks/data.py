"""Throughput of a build of data, in MB of text for each second of a core, beside the same steps in peers.

Two comparisons, each of whole commands, the contenders one after the other, several times:

    all       read, repair, Gopher's rules, addresses out, near-duplicates out, tokenise, write: ours, datatrove
    tokens    read, tokenise, write: ours, datatrove, nanoGPT's way of preparing data (see data_peers.py)

Ours besides that packs sequences and sums every file for its manifest; the report that the command line adds, with a
picture, is left out. A core's seconds are the user and system time of all processes of a command, which a busy machine
changes less than the clock on the wall.

    python benchmarks/data.py --json data.json                         # on a corpus made from a seed
    python benchmarks/data.py --corpus poems.jsonl.xz --peers PYTHON --json data.json
    python benchmarks/data.py --corpus code.jsonl.xz --no-gopher --peers PYTHON --json data.json
    python benchmarks/data.py --check                                  # tiny, ours alone

The peers may live in an environment of their own, whose interpreter --peers names; what it needs, data_peers.py says.
"""

from __future__ import annotations

import argparse
import json
import lzma
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from andromeda.benchmarks import corpus
from andromeda.data.build import build
from andromeda.data.spec import read_spec
from andromeda.tokenizer import Tokenizer

PEERS = Path(__file__).with_name("data_peers.py")
RULES = """
clean: {%sredact: [emails, addresses]}
dedup: near
"""
SPEC = """
tokenizer: {{path: {tokenizer}}}{rules}
sources: {{text: {{files: ["*.jsonl"], licence: of the corpus}}}}
stages: {{only: {{seq_len: 2048, epochs: {{text: 1}}}}}}
"""
NUM_FILES = 4  # datatrove's workers take files
MODULES = {"datatrove": "datatrove, spacy, ftfy, orjson", "prepare": "datasets, tokenizers"}


@dataclass(frozen=True)
class Contender:
    name: str
    steps: str
    workers: int
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """Of one command; `cpu` and `wall` in seconds, and what it wrote."""

    cpu: float
    wall: float
    documents: int
    tokens: int


CONTENDERS = [
    *(Contender("ours", "all", workers) for workers in (1, 2)),
    *(Contender("datatrove", "all", workers) for workers in (1, 2)),
    *(Contender("ours", "tokens", workers) for workers in (1, 2)),
    *(Contender("datatrove", "tokens", workers, ("--steps", "tokens")) for workers in (1, 2)),
    *(Contender("prepare", "tokens", workers) for workers in (1, 2)),
    *(Contender("prepare", "tokens", workers, ("--batched",)) for workers in (1, 2)),
]


def main() -> None:
    options = arguments()
    if options.build:
        spec, made, out = options.build
        build(read_spec(spec), made, out, lambda *_: None, options.workers)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        sizes = {"all": options.all_megabytes, "tokens": options.megabytes}
        sizes = dict.fromkeys(sizes, 0.5) if options.check else sizes
        num_bytes = {
            steps: prepared(folder / steps, options.corpus, int(size * 1e6)) for steps, size in sizes.items() if size
        }
        tokenizer = trained(folder, 600 if options.check else options.vocabulary)
        chosen = [contender for contender in CONTENDERS if contender.steps in num_bytes]
        if options.check:
            chosen = [contender for contender in chosen if contender.name == "ours" and contender.workers == 1]
        present = installed(options.peers, {contender.name for contender in chosen})
        rows = raced([one for one in chosen if one.name in present], folder, tokenizer, options, num_bytes)
    print_table(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, nargs="*", default=[], help=".jsonl or .jsonl.xz with a `text`")
    parser.add_argument("--megabytes", type=float, default=24, help="of text that is only tokenised; 0: leave it out")
    parser.add_argument("--all-megabytes", type=float, default=8, help="of text that goes through all steps")
    parser.add_argument("--no-gopher", action="store_true", help="leave Gopher's rules out, which keep no code")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default=sys.executable, help="an interpreter that has the peers")
    parser.add_argument("--folder", help="where corpora and builds are made")
    parser.add_argument("--json", type=Path, help="file to write to")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--build", type=Path, nargs=3, help=argparse.SUPPRESS)  # spec, corpus, out: our own process
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- what is raced -------------------------------------------------------------------------------


def prepared(folder: Path, files: list[Path], limit: int) -> int:
    """Writes about so many bytes of text to files that all contenders read; returns how many."""
    if not files:
        return corpus.write(folder, limit, seed=1, num_files=NUM_FILES)[1]
    folder.mkdir()
    texts, total = of_files(files), 0
    for part in range(NUM_FILES):
        with (folder / f"part-{part}.jsonl").open("w", encoding="utf-8") as file:
            while total < limit * (part + 1) // NUM_FILES and (text := next(texts, None)) is not None:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                total += len(text.encode())
    return total


def of_files(files: list[Path]) -> Iterator[str]:
    for path in files:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            yield from (json.loads(row)["text"] for row in file)


def trained(folder: Path, vocabulary: int) -> Path:
    """The tokenizer that all contenders use."""
    files = sorted(folder.glob("*/*.jsonl"))
    Tokenizer.train(of_files(files), vocabulary).save(folder / "tokenizer")
    return folder / "tokenizer"


def installed(python: str, names: set[str]) -> set[str]:
    present = names & {"ours"}
    for name in sorted(names - present):
        found = subprocess.run([python, "-c", f"import {MODULES[name]}"], capture_output=True, check=False)
        if found.returncode:
            print(f"{name}: not installed in {python}")
        else:
            present.add(name)
    return present


# ---- the race ------------------------------------------------------------------------------------


def raced(
    contenders: list[Contender], folder: Path, tokenizer: Path, options: argparse.Namespace, num_bytes: dict[str, int]
) -> list[dict[str, object]]:
    """One after the other, and all again."""
    runs: dict[Contender, list[Run]] = {contender: [] for contender in contenders}
    rows: list[dict[str, object]] = []
    for repeat in range(1 if options.check else options.repeats):
        for contender in contenders:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                run = ran(contender, folder / contender.steps, Path(out), tokenizer, options)
            runs[contender].append(run)
            rows = [row(one, found, num_bytes[one.steps] / 1e6) for one, found in runs.items() if found]
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{repeat + 1}: {label(contender)}: {run.cpu:.1f} s of cores, {run.wall:.1f} s", flush=True)
    return rows


def ran(contender: Contender, made: Path, out: Path, tokenizer: Path, options: argparse.Namespace) -> Run:
    ours, every = contender.name == "ours", contender.steps == "all"
    workers = ["--workers", str(contender.workers)]
    if ours:
        spec = out / "spec.yaml"
        rules = RULES % ("" if options.no_gopher else "gopher: {}, repetition: {}, ") if every else ""
        spec.write_text(SPEC.format(tokenizer=tokenizer, rules=rules))
        command = [sys.executable, __file__, "--build", spec, made, out / "build", *workers]
    else:
        file = tokenizer / "tokenizer.json"
        flags = ["--steps", "no-gopher"] if every and options.no_gopher else contender.flags
        command = [options.peers, PEERS, contender.name, made, out, "--tokenizer", file, *workers, *flags]
    before, began = cpu(), time.perf_counter()
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    wall, used = time.perf_counter() - began, cpu() - before
    if done.returncode:
        raise SystemExit(f"{label(contender)} failed:\n{done.stderr[-2000:]}")
    if not ours:
        found = json.loads(done.stdout.splitlines()[-1])
        return Run(used, wall, found["documents"], found["tokens"])
    facts = json.loads((out / "build" / "manifest.json").read_bytes())["sources"]["text"]
    return Run(used, wall, facts["num_documents"], facts["num_tokens"])


def cpu() -> float:
    """Seconds of all processes that have ended and were waited for, and of theirs."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


# ---- what came out -------------------------------------------------------------------------------


def label(contender: Contender) -> str:
    batched = ", batched" if "--batched" in contender.flags else ""
    return f"{contender.name}{batched}, {contender.steps}, {contender.workers} workers"


def row(contender: Contender, runs: list[Run], megabytes: float) -> dict[str, object]:
    core, wall = (median(getattr(run, clock) for run in runs) for clock in ("cpu", "wall"))
    return {
        "contender": label(contender), "megabytes": megabytes, "mb_per_core_second": megabytes / core,
        "mb_per_second": megabytes / wall, "runs": [asdict(run) for run in runs],
    }  # fmt: skip


def print_table(rows: list[dict[str, object]]) -> None:
    print("\n| | MB | MB/s a core | MB/s | documents | tokens |\n|---|---:|---:|---:|---:|---:|")
    for found in rows:
        last = found["runs"][-1]  # type: ignore[index]
        print(
            f"| {found['contender']} | {found['megabytes']:.1f} | {found['mb_per_core_second']:.2f} | "
            f"{found['mb_per_second']:.2f} | {last['documents']:,} | {last['tokens']:,} |"
        )


if __name__ == "__main__":
    main()
