"""What a prompt would take if its sequence were split over many GPUs: a simulation from pieces measured on one.

`2b`, to the logits of the last token, as `Context` splits it: rank r of R has chunks r and 2R - 1 - r of 2R, each block
gathers all keys and values and exchanges the tokens at the chunks' borders. Measured (results/prefill.json, one H200):
each part of a layer at 8,192 (bf16), 32,768, 102,400 and 200,000 tokens, the whole prompt, the rates of products and of
a copy.

Assumed, and not measured:
* a part that works on tokens takes the time of its tokens, between measured lengths on the line through them, below the
  shortest in proportion, and at least the time to read its weights, and STARTING;
* attention's programs (64 queries of one head) take a time in proportion to the tiles of 64 keys that they see, and are
  dealt out to two places on each of 132 multiprocessors, the longest first; a rank's second call waits for its first;
* keys and values are gathered at NVLINK bytes a second a GPU in a node of eight; between nodes each byte enters a node
  once, through eight network cards of NETWORK bytes a second; an exchange costs LATENCY on top, and nothing hides it;
* what a whole prompt takes on one GPU beyond its layers' parts is shared out like the parts.

    python benchmarks/context_scaling.py                # the table
    python benchmarks/context_scaling.py --out DIR      # and context_scaling.json and .png
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from andromeda.config import AndromedaConfig, preset
from andromeda.positions import initial_windows

RESULTS = Path(__file__).parent / "results"
PRESET, LENGTHS, RANKS = "2b", (32768, 102400), (1, 2, 4, 8, 16, 32, 64)
PRECISIONS = ("bf16", "fp8")
TILE = 64  # queries, and keys, of attention's forward pass
PLACES = 2 * 132  # programs that an H200 runs at once
STARTING = 3e-6  # seconds between kernels of a CUDA graph
NODE = 8  # GPUs
NVLINK = 330e9  # bytes a second a GPU, of 450e9 in one direction
NETWORK = 40e9  # bytes a second a card, of 400 Gbit/s
LATENCY = {"node": 20e-6, "nodes": 60e-6}  # seconds an exchange
PARTS = ("product in", "prepare", "attention", "activation", "product out", "add, norm, shift")


@dataclass(frozen=True)
class Measured:
    """On one GPU: seconds of each part of a layer by length, and of the whole prompt."""

    parts: dict[int, dict[str, float]]
    whole: dict[int, float]
    copy_rate: float


@dataclass(frozen=True)
class Split:
    """A prompt over so many ranks, in seconds."""

    precision: str
    tokens: int
    ranks: int
    products: float
    attention: float
    pointwise: float
    exchanges: float
    other: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.pointwise + self.exchanges + self.other


def measured(precision: str) -> Measured:
    """Of results/prefill.json, the newest first.

    Left out are lengths whose parts, which Python starts one by one, took longer than the whole prompt did as a graph.
    """
    parts: dict[int, dict[str, float]] = {}
    whole: dict[int, float] = {}
    copy = math.nan
    for call in json.loads((RESULTS / "prefill.json").read_text(encoding="utf-8")):
        rows = {
            row["length"]: row["ms"] / 1e3
            for row in call["rows"]
            if (row["name"], row["preset"], row["precision"]) == ("andromeda", PRESET, precision)
        }
        whole = {**rows, **whole}
        for layer in call["layers"]:
            words = layer["row"].replace(",", "").split()
            if words[1] == PRESET and words[3] == precision:
                parts.setdefault(int(words[2]), {part["name"]: part["ms"] / 1e3 for part in layer["parts"]})
        copy = call["ceilings"]["copy"] if call["ceilings"] else copy
    depth = preset(PRESET).depth
    return Measured({n: of for n, of in parts.items() if depth * layer_seconds(of) < 1.05 * whole[n]}, whole, copy)


def layer_seconds(parts: dict[str, float]) -> float:
    """Of its parts, of which one may have been measured as a part of another."""
    return sum(parts.get(name, 0.0) for name in PARTS)


def seconds_of(parts: dict[int, dict[str, float]], name: str, tokens: float) -> float:
    """Of a part at a length: on the line through the measured ones around it, below all in proportion."""
    lengths = sorted(parts)
    if tokens <= lengths[0]:
        return parts[lengths[0]].get(name, 0.0) * tokens / lengths[0]
    b = next(length for length in lengths if length >= tokens)
    a = lengths[lengths.index(b) - 1]
    there, beyond = (parts[n].get(name, 0.0) for n in (a, b))
    return there + (beyond - there) * (tokens - a) / (b - a)


def tiles_of(first: int, queries: int, window: float) -> list[int]:
    """Key tiles that each program sees, of queries first..first + queries - 1 of one head."""
    found = []
    for q0 in range(first, first + queries, TILE):
        last = min(q0 + TILE, first + queries) - 1
        begin = 0 if math.isinf(window) else max(0, q0 - int(window) + 1)
        found.append(last // TILE - begin // TILE + 1)
    return found


def makespan(programs: Sequence[int], places: int = PLACES) -> int:
    """Tiles until the last place is done, dealing the longest programs out first."""
    if len(programs) <= places:
        return max(programs)
    busy = [0] * places
    for tiles in sorted(programs, reverse=True):
        heapq.heappush(busy, heapq.heappop(busy) + tiles)
    return max(busy)


def attention_tiles(tokens: int, ranks: int, windows: Sequence[float]) -> int:
    """Of the slowest rank, its two calls one after the other (one call where there is one rank)."""

    def call(first: int, queries: int) -> int:
        return makespan([tiles for window in windows for tiles in tiles_of(first, queries, window)])

    if ranks == 1:
        return call(0, tokens)
    chunk = -(-tokens // (2 * ranks))
    return max(call(r * chunk, chunk) + call((2 * ranks - 1 - r) * chunk, chunk) for r in range(ranks))


def exchange_seconds(config: AndromedaConfig, tokens: int, ranks: int) -> float:
    """Of a block: keys and values, and borders."""
    if ranks == 1:
        return 0.0
    size = tokens * 2 * config.kv_heads * config.dim_head * 2
    within = min(ranks, NODE)
    inside = size * (within - 1) / within / NVLINK
    if ranks <= NODE:
        return inside + 2 * LATENCY["node"]
    nodes = ranks / NODE
    return max(inside, size * (nodes - 1) / nodes / (NODE * NETWORK)) + 2 * LATENCY["nodes"]


def split(config: AndromedaConfig, known: Measured, precision: str, tokens: int, ranks: int) -> Split:
    """A prompt over so many ranks."""
    windows, mine = initial_windows(config), tokens / ranks
    tile = known.parts[tokens]["attention"] / attention_tiles(tokens, 1, windows)
    byte_rate = known.copy_rate / (1 if precision == "fp8" else 2)  # weights a second
    wide = config.ff_mult * config.dim
    inwards = config.dim * ((config.heads + 2 * config.kv_heads) * config.dim_head + wide) / byte_rate
    outwards = config.dim * (config.heads * config.dim_head + wide) / byte_rate

    def part(name: str, least: float = 0.0) -> float:
        """None at all where it was measured as a part of another."""
        seconds = seconds_of(known.parts, name, mine)
        return max(seconds, least, STARTING) if seconds else 0.0

    layer = {
        "products": part("product in", inwards) + part("product out", outwards),
        "attention": tile * attention_tiles(tokens, ranks, windows) + (ranks > 1) * STARTING,
        "pointwise": part("prepare") + part("activation") + part("add, norm, shift"),
        "exchanges": exchange_seconds(config, tokens, ranks),
    }
    seconds = {name: config.depth * value for name, value in layer.items()}
    alone = config.depth * layer_seconds(known.parts[tokens])
    own = sum(seconds[name] for name in ("products", "attention", "pointwise"))
    other = (known.whole[tokens] - alone) * own / alone
    return Split(precision, tokens, ranks, other=other, **seconds)


def simulate() -> list[Split]:
    config = preset(PRESET)
    return [
        split(config, measured(precision), precision, tokens, ranks)
        for precision in PRECISIONS
        for tokens in LENGTHS
        for ranks in RANKS
    ]


def table(found: Sequence[Split]) -> str:
    lines = [
        "| precision | tokens | GPUs | ms | products | attention | pointwise | exchanges | gain | efficiency |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        one = next(x for x in found if (x.precision, x.tokens, x.ranks) == (row.precision, row.tokens, 1)).total
        parts = " | ".join(f"{1e3 * x:.1f}" for x in (row.products, row.attention, row.pointwise, row.exchanges))
        gain = one / row.total
        head = f"| {row.precision} | {row.tokens:,} | {row.ranks} | {1e3 * row.total:.1f} | {parts}"
        lines.append(f"{head} | {gain:.1f} | {gain / row.ranks:.0%} |")
    return "\n".join(lines)


def plot(found: Sequence[Split], path: Path) -> None:
    """Milliseconds by number of GPUs, a line a length and precision, beside what perfect sharing would give."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, tokens in enumerate(LENGTHS):
        for precision, style in zip(PRECISIONS, ("o-", "s--"), strict=True):
            rows = [row for row in found if (row.precision, row.tokens) == (precision, tokens)]
            values = [1e3 * row.total for row in rows]
            axes.plot([row.ranks for row in rows], values, style, color=f"C{color}", label=f"{tokens:,}, {precision}")
            if precision == "bf16":
                ideal = [values[0] / row.ranks for row in rows]
                axes.plot([row.ranks for row in rows], ideal, ":", color=f"C{color}", linewidth=0.9)
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="ms to the last token's logits", xticks=RANKS)
    axes.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
    axes.minorticks_off()
    ticks = (10, 30, 100, 300, 1000, 3000)
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.grid(alpha=0.25)
    axes.legend(title="tokens, precision (dotted: bf16 shared perfectly)", fontsize=8, title_fontsize=8)
    axes.set_title(f"{PRESET} over several GPUs, simulated from pieces measured on one H200", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for context_scaling.json and context_scaling.png")
    out: Path | None = parser.parse_args().out
    found = simulate()
    print(table(found))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        assumed: dict[str, Any] = {
            "nvlink": NVLINK, "network": NETWORK, "latency": LATENCY, "starting": STARTING, "places": PLACES,
        }  # fmt: skip
        rows = [{**asdict(row), "total": row.total} for row in found]
        text = json.dumps({"assumed": assumed, "rows": rows}, indent=1)
        (out / "context_scaling.json").write_text(text + "\n", encoding="utf-8")
        plot(found, out / "context_scaling.png")


if __name__ == "__main__":
    main()
