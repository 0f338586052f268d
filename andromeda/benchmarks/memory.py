"""Peak memory and time of one forward pass over a long text, ours beside x-transformers with the same flags.

Each pass runs in a process of its own and gives the logits of all tokens. On a GPU, in bfloat16: what torch allocates
at most, and the median time. On a CPU, in float32: the peak resident size of the process, and the time of one pass.
The floor is what no pass does without: the weights and the logits, on a CPU with the process before it has a model.
x-transformers builds a bias of ALiBi heads x T x T; on a CPU it is limited to 16 GiB of address space.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from andromeda.benchmarks import measure, peers
from andromeda.benchmarks.measure import CUDA, DEVICE, DTYPE, GIB, Report, Save
from andromeda.config import AndromedaConfig, preset
from andromeda.training.metrics import peak_resident_bytes

LENGTHS = (8192, 32768, 102400)
PRESET = "700m" if CUDA else "nano"
LIMIT = 16 * GIB  # of address space, for the peer on a CPU
OURS = "andromeda"


@dataclass(frozen=True)
class Row:
    """One pass; `problem` in place of figures."""

    name: str
    preset: str
    tokens: int
    bytes: int | None = None
    floor_bytes: int | None = None
    ms: float | None = None
    problem: str | None = None


def run(name: str, lengths: Sequence[int], save: Save) -> Report:
    """Both models at all lengths of a preset."""
    report: Report = {"machine": measure.machine(), "preset": name, "rows": []}
    print(f"{measure.headline(report['machine'])}; {name}, {str(DTYPE).removeprefix('torch.')}\n")
    print("| tokens | | peak GiB | floor GiB | times the floor | ms |\n|---:|---|---:|---:|---:|---:|", flush=True)
    for tokens in lengths:
        for who in (OURS, peers.X_TRANSFORMERS):
            row = row_of(who, name, tokens)
            report["rows"].append(asdict(row))
            save(report)
            print(line(row), flush=True)
    return report


def line(row: Row) -> str:
    head = f"| {row.tokens:,} | {row.name}"
    if row.bytes is None or row.floor_bytes is None or row.ms is None:
        return f"{head} | {row.problem} | | | |"
    floor = f"{row.floor_bytes / GIB:.2f} | {row.bytes / row.floor_bytes:.2f}"
    return f"{head} | {row.bytes / GIB:.2f} | {floor} | {row.ms:,.0f} |"


def row_of(who: str, name: str, tokens: int) -> Row:
    """In a process of its own."""
    if who != OURS and not peers.installed(who):
        return Row(who, name, tokens, problem="not installed")
    config = preset(name)
    limited = who != OURS and not CUDA
    too_much = f"more than {LIMIT / GIB:.0f} GiB" if limited else "out of memory"
    if limited and config.alibi_num_heads * tokens**2 * 4 > LIMIT:  # its bias alone
        return Row(who, name, tokens, problem=too_much)
    call = [sys.executable, "-m", "andromeda.benchmarks.memory", who, name, str(tokens)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Row(who, name, tokens, **json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode < 0 or "memory" in last:  # killed for it, or refused
        return Row(who, name, tokens, problem=too_much)
    if who == OURS:
        raise RuntimeError(done.stderr)
    return Row(who, name, tokens, problem=last[:160])


# ---- in that process -----------------------------------------------------------------------------


def forward(who: str, config: AndromedaConfig, tokens: int) -> dict[str, Any]:
    """Bytes at the peak, those of the floor, and milliseconds."""
    build = _builder(who)
    before = 0 if CUDA else peak_resident_bytes()
    torch.manual_seed(0)
    ids = torch.randint(config.num_tokens, (1, tokens), device=DEVICE)
    with torch.device(DEVICE):
        model = build(config, tokens).to(DTYPE).eval()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    logits = tokens * config.num_tokens * DTYPE.itemsize

    def once() -> None:
        assert model(ids).shape == (1, tokens, config.num_tokens)

    measure.release()
    with torch.inference_mode():
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            once()
            peak = torch.cuda.max_memory_allocated()
            ms = median(measure.times(once, apart=True))
        else:
            (ms,) = measure.clocked(once, 1)
            peak = peak_resident_bytes()
    return {"bytes": peak, "floor_bytes": before + weights + logits, "ms": ms}


def _builder(who: str) -> Callable[[AndromedaConfig, int], Any]:
    """Imports what it takes, and sets the limit."""
    if who == OURS:
        from andromeda.model import Andromeda

        return lambda config, _tokens: Andromeda(config)
    import x_transformers  # noqa: F401

    if not CUDA:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    return lambda config, tokens: peers.build(who, config, tokens)


if __name__ == "__main__":
    who, name, tokens = sys.argv[1:]
    print(json.dumps(forward(who, preset(name), int(tokens))))
