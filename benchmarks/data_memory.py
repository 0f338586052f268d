"""Peak memory of a build of data, all its processes together, by stage and by size of the corpus.

The corpus is made from a seed, see andromeda/benchmarks/corpus.py: a tenth of it are copies, and some documents have
megabytes, the longest more than a build reads. All rules of cleaning are on, near-duplicates are removed, and the
vocabulary is trained with the build.

    python benchmarks/data_memory.py --megabytes 125,250,500,1000,2000 --json memory.json    # 2 GB: about 20 minutes
    python benchmarks/data_memory.py --check                                                 # tiny
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from andromeda.benchmarks import corpus

MIB = 1 << 20
INTERVAL = 0.25  # seconds
SPEC = """
tokenizer: {{vocab_size: {vocabulary}}}
clean: {{gopher: {{}}, repetition: {{}}, min_english: 0.02, redact: [keys, emails, addresses]}}
dedup: near
sources: {{text: {{files: [part-*.jsonl], licence: made up, bad: skip}}}}
stages: {{short: {{seq_len: 2048, epochs: {{text: 1}}}}, long: {{seq_len: 8192, epochs: {{text: 1}}}}}}
"""
STAGES = {  # what a build does until a directory of it appears
    "read and clean": ".work/texts/text",
    "compare": ".work/duplicates",
    "train the vocabulary": "tokenizer",
    "tokenise": "sources/text",
    "pack": "manifest.json",
}


@dataclass(frozen=True)
class Peak:
    """Of one build; memory in MiB, by stage.

    Attributes:
        shared: proportional set size, which counts what processes share once; files that are mapped count too.
        resident: the sum of resident set sizes, which counts such for each process.
    """

    megabytes: float
    documents: int
    seconds: float
    shared: dict[str, float]
    resident: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", default="125,250,500,1000,2000", help="sizes of the corpus")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help="where corpora and builds are made; five times the corpus must fit")
    parser.add_argument("--corpus", type=Path, help="part-*.jsonl to take instead, as `corpus.write` made it")
    parser.add_argument("--json", type=Path, help="file to write to, after each size")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    peaks: list[Peak] = []
    for size in [1.0] if options.check else [float(part) for part in options.megabytes.split(",")]:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            made = options.corpus or Path(folder) / "corpus"
            if not options.corpus:
                corpus.write(made, int(size * 1e6), seed=1)
            peaks.append(measured(made, Path(folder), 600 if options.check else 32768, options.workers))
        print(line(peaks[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(peak) for peak in peaks], indent=1) + "\n")
    print("\n| MB | documents | s | peak, MiB | " + " | ".join(STAGES) + " |\n|" + "---:|" * (4 + len(STAGES)))
    for peak in peaks:
        print(row(peak))


def measured(made: Path, folder: Path, vocabulary: int, workers: int) -> Peak:
    """Builds by the command that a user gives."""
    spec, out = folder / "spec.yaml", folder / "build"
    spec.write_text(SPEC.format(vocabulary=vocabulary))
    shared, resident = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
    command = [sys.executable, "-m", "andromeda", "data", "build", spec, out, "--corpus", made]
    began = time.perf_counter()
    process = psutil.Popen([*map(str, command), "--workers", str(workers)], stdout=subprocess.DEVNULL)
    names, reached = list(STAGES), 0
    while process.poll() is None:
        done = [number for number, path in enumerate(STAGES.values(), start=1) if (out / path).exists()]
        reached = max([reached, *done])  # of .work nothing is left in the end
        stage = names[min(reached, len(names) - 1)]
        pss, rss = used(process)
        shared[stage], resident[stage] = max(shared[stage], pss), max(resident[stage], rss)
        time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(f"the build failed with status {process.returncode}")
    seconds = time.perf_counter() - began
    facts = json.loads((out / "manifest.json").read_bytes())["sources"]["text"]
    documents = facts["num_documents"] + sum(facts["removed"].values()) + sum(facts["unread"].values())
    shutil.rmtree(out)
    num_bytes = sum(path.stat().st_size for path in made.iterdir())
    return Peak(num_bytes / 1e6, documents, seconds, shared, resident)


def used(process: psutil.Process) -> tuple[float, float]:
    """MiB of a process and all below it: proportional and resident set sizes."""
    pss = rss = 0
    with suppress(psutil.NoSuchProcess):
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                memory = one.memory_full_info()
                pss, rss = pss + memory.pss, rss + memory.rss
    return pss / MIB, rss / MIB


def line(peak: Peak) -> str:
    stage = max(peak.shared, key=lambda name: peak.shared[name])
    return f"{peak.megabytes:,.0f} MB in {peak.seconds:,.0f} s: {peak.shared[stage]:,.0f} MiB at most ({stage})"


def row(peak: Peak) -> str:
    figures = [peak.megabytes, peak.documents, peak.seconds, max(peak.shared.values()), *peak.shared.values()]
    return "| " + " | ".join(f"{figure:,.0f}" for figure in figures) + " |"


if __name__ == "__main__":
    main()
