"""What output under a grammar costs: compiling a schema, and each token's mask, beside xgrammar if it is installed.

Both go through the same texts token by token, each mask filled anew; llguidance as `andromeda.inference.grammar` has
it, its checks of a schema among the compiling. Every grammar is compiled by itself, none is kept. xgrammar 0.2 requires
transformers and triton; `pip install --no-deps xgrammar apache-tvm-ffi` into a directory of its own is enough.

    python benchmarks/grammar.py DIRECTORY ...      # tokenizers; a minute
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from andromeda.benchmarks.measure import headline, machine, version
from andromeda.inference.grammar import Grammars
from andromeda.tokenizer import Tokenizer

Step = tuple[Callable[[NDArray[np.int32]], Any], Callable[[int], Any]]  # fills a mask; moves on by a token

LINE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 80},
        "count": {"type": "integer", "minimum": 1, "maximum": 1000},
        "price": {"type": "number", "minimum": 0},
        "unit": {"enum": ["piece", "kg", "litre", None]},
    },
    "required": ["name", "count", "price"],
    "additionalProperties": False,
}
INVOICE = {
    "type": "object",
    "properties": {
        "number": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4,8}$"},
        "date": {"type": "string", "format": "date"},
        "lines": {"type": "array", "items": LINE, "minItems": 1, "maxItems": 50},
        "paid": {"type": "boolean"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["number", "date", "lines", "paid", "note"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer"},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
LINES = [{"name": f"Rose, {colour}", "count": 12, "price": 3.5, "unit": "piece"} for colour in ("red", "white", "weiß")]
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "a tool's parameters": (WEATHER, {"city": "Clermont-Ferrand", "unit": "celsius", "days": 3}),
    "an invoice": (
        INVOICE,
        {"number": "AB-12345", "date": "2026-02-28", "lines": LINES, "paid": False, "note": "The sea, the sea! " * 8},
    ),
    "any object": ({"type": "object"}, {"a": [1, 2.5, {"b": None, "c": "The sea, the sea! " * 8}], "d": LINES}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizers", nargs="+", type=Path, help="directories with a tokenizer.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peers = {"llguidance": ours} | ({"xgrammar": xgrammar} if find_spec("xgrammar") else {})
    print(headline(machine()), ", ".join(f"{name} {version(name)}" for name in peers), sep="; ")
    print("\n| ids | schema | library | compile, ms | a mask, µs: median | 99% | worst |")
    print("|---:|---|---|---:|---:|---:|---:|")
    for directory in arguments.tokenizers:
        tokenizer = Tokenizer.load(directory)
        makers = {name: make(tokenizer) for name, make in peers.items()}
        for case, (schema, value) in CASES.items():
            ids = tokenizer.encode(json.dumps(value, ensure_ascii=False))
            for name, compiled in makers.items():
                compile_ms, masks = measured(compiled, schema, ids, tokenizer.vocab_size)
                figures = (median(masks), quantiles(masks, n=100)[98], max(masks))
                print(
                    f"| {tokenizer.vocab_size:,} | {case} | {name} | {compile_ms:.1f} | "
                    + " | ".join(map("{:.0f}".format, figures))
                    + " |"
                )
                sys.stdout.flush()


def measured(
    compiled: Callable[[Any], Callable[[], Step]], schema: Any, ids: list[int], vocab_size: int
) -> tuple[float, list[float]]:
    """Milliseconds to compile, the median of five; microseconds of every mask of ten times through the text."""
    compiling, masks = [], []
    row = np.empty(-(-vocab_size // 32), dtype=np.int32)
    for _ in range(5):
        started = perf_counter()
        new_text = compiled(schema)
        compiling.append(1e3 * (perf_counter() - started))
    for _ in range(10):
        fill, advance = new_text()
        for token in ids:
            started = perf_counter()
            fill(row)
            masks.append(1e6 * (perf_counter() - started))
            if not advance(token):
                raise SystemExit(f"a token of the text was refused: {schema}")
    return median(compiling), masks


def ours(tokenizer: Tokenizer) -> Callable[[Any], Callable[[], Step]]:
    grammars = Grammars(tokenizer, kept=0)

    def compiled(schema: Any) -> Callable[[], Step]:
        grammar = grammars.json_schema(schema)

        def new_text() -> Step:
            constraint = grammar.constraint()
            return constraint.fill_mask, lambda token: constraint.advance([token])

        return new_text

    return compiled


def xgrammar(tokenizer: Tokenizer) -> Callable[[Any], Callable[[], Step]]:
    import xgrammar as library

    vocabulary = [tokenizer.id_to_token(token) for token in range(tokenizer.vocab_size)]
    info = library.TokenizerInfo(
        vocabulary,
        library.VocabType.BYTE_LEVEL,
        vocab_size=tokenizer.vocab_size,
        stop_token_ids=list(tokenizer.stop_ids),
    )
    compiler = library.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compiled(schema: Any) -> Callable[[], Step]:
        grammar = compiler.compile_json_schema(json.dumps(schema), any_whitespace=False, separators=(", ", ": "))

        def new_text() -> Step:
            matcher = library.GrammarMatcher(grammar)
            return lambda row: matcher.fill_next_token_bitmask(torch.from_numpy(row)[None]), matcher.accept_token

        return new_text

    return compiled


if __name__ == "__main__":
    main()
