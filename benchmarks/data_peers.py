"""The peers of benchmarks/data.py, each in a process of its own: this file imports nothing of Andromeda.

    python benchmarks/data_peers.py datatrove CORPUS OUT --tokenizer tokenizer.json --workers 2 [--steps STEPS]
    python benchmarks/data_peers.py prepare CORPUS OUT --tokenizer tokenizer.json --workers 2 [--batched]

CORPUS is a folder of JSON lines with a `text`. The last line of the output is JSON: documents and tokens written.

No extra of Andromeda brings the peers, which need much that it does not. In an environment of their own:

    pip install 'datatrove==0.10.1' 'xxhash<4' datasets tokenizers orjson spacy nltk ftfy regex tldextract
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

EOS = "<|endoftext|>"
EMPTY_LINES = 1_024  # parts in which the memory map is filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["datatrove", "prepare"])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--steps", choices=["all", "no-gopher", "tokens"], default="all", help="of datatrove's pipeline"
    )
    parser.add_argument("--batched", action="store_true", help="a thousand texts at a time, not one by one")
    options = parser.parse_args()
    if options.peer == "datatrove":
        found = datatrove(options.corpus, options.out, options.tokenizer, options.workers, options.steps)
    else:
        found = prepare(options.corpus, options.out, options.tokenizer, options.workers, options.batched)
    print(json.dumps(found))


def datatrove(corpus: Path, out: Path, tokenizer: str, workers: int, steps: str) -> dict[str, int]:
    """Its own steps in its own order: cleaned texts and signatures are written, then buckets, clusters, tokens."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its workers are the processes
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    tasks = len(list(corpus.iterdir()))

    def run(stage: str, blocks: list[Any], tasks: int) -> None:
        LocalPipelineExecutor(
            pipeline=blocks, tasks=tasks, workers=workers, logging_dir=str(out / "logs" / stage), start_method="fork"
        ).run()

    def folder(name: str) -> str:
        return str(out / name)

    written = DocumentTokenizer(folder("tokens"), tokenizer, eos_token=EOS, shuffle_documents=False)
    if steps == "tokens":
        run("tokens", [JsonlReader(str(corpus)), written], tasks)
        return counted(out / "tokens")
    config = MinhashConfig(hash_config=HashConfig(precision=64))
    repair = FTFYFormatter(unescape_html=False, remove_terminal_escapes=False, normalization="NFC")
    rules = [] if steps == "no-gopher" else [GopherRepetitionFilter(), GopherQualityFilter(max_doc_words=None)]
    cleaned = JsonlWriter(folder("clean"), compression=None)
    clean = [JsonlReader(str(corpus)), repair, *rules, PIIFormatter(), cleaned]
    run("clean", [*clean, MinhashDedupSignature(folder("signatures"), config)], tasks)
    run("buckets", [MinhashDedupBuckets(folder("signatures"), folder("buckets"), config=config)], config.num_buckets)
    run("clusters", [MinhashDedupCluster(folder("buckets"), folder("removed"), config=config)], 1)
    run("tokens", [JsonlReader(folder("clean")), MinhashDedupFilter(folder("removed")), written], tasks)
    return counted(out / "tokens")


def counted(folder: Path) -> dict[str, int]:
    """uint16 tokens, and an index with 8 bytes a document."""
    return {
        "documents": sum(path.stat().st_size // 8 for path in folder.glob("*.index")),
        "tokens": sum(path.stat().st_size // 2 for path in folder.glob("*.ds")),
    }


def prepare(corpus: Path, out: Path, tokenizer: str, workers: int, batched: bool) -> dict[str, int]:
    """nanoGPT's method: `datasets` encodes each text with an end-of-text token behind; ids go to one uint16 file.

    After the description of data/openwebtext/prepare.py in https://github.com/karpathy/nanoGPT.
    """
    os.environ["HF_HOME"] = str(out / "cache")
    if batched and workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import numpy as np
    from datasets import load_dataset  # type: ignore[import-untyped, import-not-found, unused-ignore]
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(tokenizer)
    end = encoder.token_to_id(EOS)

    def one(row: dict[str, str]) -> dict[str, Any]:
        ids = [*encoder.encode(row["text"], add_special_tokens=False).ids, end]
        return {"ids": ids, "len": len(ids)}

    def many(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        found = [[*item.ids, end] for item in encoder.encode_batch_fast(rows["text"], add_special_tokens=False)]
        return {"ids": found, "len": [len(ids) for ids in found]}

    files = [str(path) for path in sorted(corpus.iterdir())]
    rows = load_dataset("json", data_files=files, split="train", cache_dir=str(out / "cache"), num_proc=workers)
    rows = rows.map(many if batched else one, batched=batched, remove_columns=rows.column_names, num_proc=workers)
    total = int(np.sum(rows["len"], dtype=np.uint64))
    tokens = np.memmap(out / "train.bin", np.uint16, "w+", shape=(total,))
    parts, place = min(EMPTY_LINES, len(rows)), 0
    for part in range(parts):
        shard = rows.shard(num_shards=parts, index=part, contiguous=True).with_format("numpy")
        ids = np.concatenate(shard["ids"][:])
        tokens[place : place + len(ids)] = ids
        place += len(ids)
    tokens.flush()
    return {"documents": len(rows), "tokens": place}


if __name__ == "__main__":
    main()
