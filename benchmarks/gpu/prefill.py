"""From a prompt to the logits of its last token on one GPU: milliseconds beside the ceiling, and beside peers.

Weights are random. The ceiling of a row is the time that its operations would take at the rates measured in the same
run: matrix products of 8192 x 8192 x 8192 in the row's precision, and attention, within the windows, at the bf16 rate.

    python benchmarks/gpu/prefill.py --json prefill.json                      # all rows
    python benchmarks/gpu/prefill.py --only 700m:32768:fp8 --breakdown        # the parts of one layer
    python benchmarks/gpu/prefill.py --peers --presets 700m --lengths 32768
    TRITON_INTERPRET=1 python benchmarks/gpu/prefill.py --check               # a CPU, tiny shapes
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from andromeda.config import PRESETS, AndromedaConfig, preset
from andromeda.inference.prefill import Prefill
from andromeda.model import Andromeda
from andromeda.positions import initial_windows

NAMES = ("400m", "700m", "2b")
LENGTHS = (8192, 32768, 102400, 200000)
PRECISIONS = ("bf16", "fp8")
PEERS = ("transformers Qwen3", "x-transformers", "x-transformers without ALiBi")
GRAPHED = 32768  # tokens; longer prompts hide the time to launch their kernels
SECONDS_A_ROW = 3.0
GIB = 2**30
CHECK = AndromedaConfig(num_tokens=256, max_seq_len=128, dim=64, depth=2, dim_head=32, heads=4, alibi_num_heads=2)


@dataclass(frozen=True)
class Ceilings:
    """Rates measured in this run: operations a second, bytes a second."""

    bf16: float
    fp8: float
    copy: float


@dataclass(frozen=True)
class Row:
    """One measurement; `error` instead of figures where there is none."""

    name: str
    preset: str
    length: int
    precision: str
    parameters: int
    ms: float | None = None  # the median
    repeats: int = 0
    tokens_per_second: float | None = None
    ceiling_ms: float | None = None
    share: float | None = None  # ceiling_ms / ms
    peak_gib: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Part:
    """One of the parts of a layer."""

    name: str
    ms: float
    tflops: float | None = None
    gb_per_second: float | None = None
    times_floor: float | None = None  # ms over what the operations or bytes take at the ceiling


def main() -> None:
    options = arguments()
    if options.check:
        check()
        return
    torch.manual_seed(0)
    began, ceilings = time.perf_counter(), measure_ceilings()
    report: dict[str, Any] = {"machine": machine(), "ceilings": asdict(ceilings), "rows": [], "layers": []}
    print(f"{report['machine']}\n{ceilings}", flush=True)
    for name, length, precision in wanted(options):
        if time.perf_counter() - began > options.seconds:
            print(f"stopped before {name} {length} {precision}: {options.seconds} s are over", flush=True)
            break
        if precision in PRECISIONS:
            row, parts = measure(name, length, precision, ceilings, options)
        else:
            row, parts = measure_peer(precision, name, length), []
        report["rows"].append(asdict(row))
        print(line(row), flush=True)
        if parts:
            report["layers"].append({"row": line(row), "parts": [asdict(part) for part in parts]})
            print("\n".join(part_line(part) for part in parts), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default=",".join(NAMES), help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--only", action="append", help="preset:length:precision, in place of all rows; repeatable")
    parser.add_argument("--alibi-heads", type=int, help="in place of the preset's alibi_num_heads")
    parser.add_argument("--peers", action="store_true", help="measure the peers too")
    parser.add_argument("--breakdown", action="store_true", help="the parts of one layer")
    parser.add_argument("--no-graph", action="store_true", help="no CUDA graphs")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no row after so many seconds")
    parser.add_argument("--json", help="file to write to, after each row")
    parser.add_argument("--check", action="store_true", help="tiny shapes, against the model itself")
    return parser.parse_args()


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """(preset, tokens, precision or peer)."""
    if options.only:
        for row in options.only:
            name, length, precision = row.split(":")
            yield name, int(length), precision
        return
    for name in options.presets.split(","):
        for length in map(int, options.lengths.split(",")):
            for precision in options.precisions.split(","):
                yield name, length, precision
            if options.peers:
                for peer in PEERS:
                    yield name, length, peer


# ---- ours ----------------------------------------------------------------------------------------


def measure(
    name: str, length: int, precision: str, ceilings: Ceilings, options: argparse.Namespace
) -> tuple[Row, list[Part]]:
    config = preset(name) if options.alibi_heads is None else preset(name, alibi_num_heads=options.alibi_heads)
    empty()
    runner = build(config, precision, graph=length <= GRAPHED and not options.no_graph)
    ids = torch.randint(config.num_tokens, (1, length), device="cuda")
    facts: dict[str, Any] = {"name": "andromeda", "preset": name, "length": length, "precision": precision}
    facts["parameters"] = config.num_parameters()
    if runner.reason is not None:
        return Row(**facts, error=runner.reason), []
    try:
        times, peak = timed(lambda: runner(ids))
        if not runner(ids).isfinite().all():
            return Row(**facts, error="not finite"), []
    except torch.cuda.OutOfMemoryError:
        return Row(**facts, error="out of memory"), []
    parts = layer_parts(runner, ids, ceilings) if options.breakdown else []
    ceiling = ceiling_seconds(config, length, precision, ceilings) * 1e3
    return filled(facts, times, peak, ceiling), parts


def build(config: AndromedaConfig, precision: str, graph: bool) -> Prefill:
    """The packed weights serve; the blocks' own are dropped."""
    with torch.device("cuda"):
        model = Andromeda(config).bfloat16().eval().requires_grad_(False)
    runner = Prefill(model, precision, graph=graph)
    if runner.reason is None:
        for block in model.blocks:
            for parameter in block.parameters():
                parameter.data = parameter.data.new_empty(0)
    empty()
    return runner


def filled(facts: dict[str, Any], times: list[float], peak: int, ceiling: float | None) -> Row:
    ms = statistics.median(times)
    return Row(
        **facts, ms=ms, repeats=len(times), tokens_per_second=facts["length"] / ms * 1e3, ceiling_ms=ceiling,
        share=None if ceiling is None else ceiling / ms, peak_gib=peak / GIB,
    )  # fmt: skip


def ceiling_seconds(config: AndromedaConfig, length: int, precision: str, ceilings: Ceilings) -> float:
    """Of what has to be done: the last block's products are those of keys and values, and it attends for one token."""
    flops = config.flops_per_token(length, initial_windows(config), logits=False)
    share = (config.depth - 1) / config.depth
    keys_and_values = 4.0 * config.dim * config.kv_heads * config.dim_head * length
    rate = ceilings.fp8 if precision == "fp8" else ceilings.bf16
    return flops.products * share * length / rate + (flops.attention * share * length + keys_and_values) / ceilings.bf16


def layer_parts(runner: Prefill, ids: Tensor, ceilings: Ceilings) -> list[Part]:
    """Runs through the layers, with a clock at each stage, so that the numbers are those of a real pass."""
    with torch.no_grad():
        step = runner._begin(ids, None)
        marks: list[list[torch.cuda.Event]] = []
        for n in range(runner.config.depth - 1):
            stages = runner._stages(n, step)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
            events[0].record()
            for event, stage in zip(events[1:], stages.values(), strict=True):
                stage()
                event.record()
            marks.append(events)
        torch.cuda.synchronize()
    parts = []
    for i, name in enumerate(stages):
        ms = statistics.median(events[i].elapsed_time(events[i + 1]) for events in marks)
        parts.append(part(name, ms, runner, ids.shape[1], ceilings))
    total, pointwise = (sum(p.ms for p in parts), sum(p.ms for p in parts if p.gb_per_second is not None))
    floor = sum(p.ms / p.times_floor for p in parts if p.gb_per_second is not None and p.times_floor)
    return [*parts, Part("everything pointwise", pointwise, times_floor=pointwise / floor), Part("layer", total)]


def part(name: str, ms: float, runner: Prefill, length: int, ceilings: Ceilings) -> Part:
    config, fp8 = runner.config, runner.precision == "fp8"
    queries, ff, kv = config.heads * config.dim_head, config.ff_mult * config.dim, config.kv_heads * config.dim_head
    products = {"product in": config.dim * (queries + ff + 2 * kv), "product out": config.dim * (queries + ff)}
    numbers_moved = {  # bytes a token
        "prepare": 4 * queries + 2 * kv + 2 * kv * (2 if config.num_rotated_heads else 1),
        "activation": 3 * (queries + ff) if fp8 else 4 * ff,
        "add, norm, shift": (7 if fp8 else 6) * config.dim,
    }
    if name in numbers_moved:
        rate = numbers_moved[name] * length / ms * 1e3
        return Part(name, ms, gb_per_second=rate / 1e9, times_floor=ceilings.copy / rate)
    if name in products:
        flops, ceiling = 2.0 * products[name] * length, ceilings.fp8 if fp8 else ceilings.bf16
    else:
        flops = config.flops_per_token(length, initial_windows(config)).attention * length / config.depth
        ceiling = ceilings.bf16
    return Part(name, ms, tflops=flops / ms / 1e9, times_floor=ceiling / (flops / ms * 1e3))


# ---- peers ---------------------------------------------------------------------------------------


def measure_peer(name: str, size: str, length: int) -> Row:
    facts: dict[str, Any] = {"name": name, "preset": size, "length": length, "precision": "bf16", "parameters": 0}
    empty()
    try:
        model, run = peer(name, preset(size), length)
        facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        ids = torch.randint(preset(size).num_tokens, (1, length), device="cuda")
        with torch.inference_mode():
            times, peak = timed(lambda: run(ids))
            finite = bool(run(ids).isfinite().all())
    except (ImportError, RuntimeError) as error:
        out = isinstance(error, torch.cuda.OutOfMemoryError)
        return Row(**facts, error="out of memory" if out else f"{type(error).__name__}: {error}"[:160])
    row = filled(facts, times, peak, None)
    return row if finite else Row(**asdict(row) | {"error": "not finite"})


def peer(
    name: str, config: AndromedaConfig, length: int, device: str = "cuda"
) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    """A model of about the preset's size in bf16, and ids -> logits of the last token."""
    with torch.device(device):
        if name == "transformers Qwen3":
            model = _qwen3(config, length).bfloat16().eval()
            return model, lambda ids: model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        wrapped = _x_transformer(config, length, alibi="without" not in name).bfloat16().eval()
        return wrapped, lambda ids: wrapped.to_logits(wrapped(ids, return_embeddings=True)[:, -1:])


def _qwen3(config: AndromedaConfig, length: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.num_tokens, hidden_size=config.dim, num_hidden_layers=config.depth,
            intermediate_size=round(config.dim * 8 / 3 / 64) * 64,  # of a gated feed-forward of the same size
            num_attention_heads=config.heads, num_key_value_heads=1, head_dim=config.dim_head,
            max_position_embeddings=length, tie_word_embeddings=True, attn_implementation="sdpa",
        )
    )  # fmt: skip


def _x_transformer(config: AndromedaConfig, length: int, alibi: bool) -> Any:
    from x_transformers import Decoder, TransformerWrapper

    bias = {"alibi_pos_bias": True, "alibi_num_heads": config.alibi_num_heads} if alibi else {}
    layers = Decoder(
        dim=config.dim, depth=config.depth, heads=config.heads, attn_dim_head=config.dim_head, attn_flash=True,
        rotary_xpos=True, shift_tokens=1, attn_one_kv_head=True, attn_qk_norm=True, attn_qk_norm_dim_scale=True,
        ff_relu_squared=True, **bias,
    )  # fmt: skip
    return TransformerWrapper(
        num_tokens=config.num_tokens, max_seq_len=length, attn_layers=layers, use_abs_pos_emb=False
    )


# ---- clocks and ceilings -------------------------------------------------------------------------


def timed(run: Callable[[], object]) -> tuple[list[float], int]:
    """Milliseconds of each of some runs after two to warm up, and the peak of memory, bytes."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    once = _milliseconds(run)
    repeats = max(3, min(50, int(SECONDS_A_ROW * 1e3 / once)))
    return [_milliseconds(run) for _ in range(repeats)], torch.cuda.max_memory_reserved()


def _milliseconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure_ceilings() -> Ceilings:
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    source = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def scaled() -> Tensor:
        return torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return Ceilings(
        bf16=2 * size**3 / seconds_each(lambda: a @ b.t()),
        fp8=2 * size**3 / seconds_each(scaled),
        copy=2 * source.numel() / seconds_each(lambda: target.copy_(source)),
    )


def seconds_each(run: Callable[[], object], batches: int = 7, batch: int = 10) -> float:
    """The median of batches, of which each runs `batch` times."""

    def several() -> None:
        for _ in range(batch):
            run()

    several()
    return statistics.median(_milliseconds(several) for _ in range(batches)) / batch / 1e3


def empty() -> None:
    gc.collect()
    torch.cuda.empty_cache()


# ---- what is printed -----------------------------------------------------------------------------


def line(row: Row) -> str:
    head = f"{row.name:28} {row.preset:5} {row.length:7,} {row.precision:5} {row.parameters / 1e9:5.2f} B"
    if row.ms is None:
        return f"{head}  {row.error}"
    share = "" if row.share is None else f"  {row.share:4.0%} of the ceiling"
    return (
        f"{head} {row.ms:9.2f} ms {row.tokens_per_second or 0:11,.0f} tokens/s{share}  {row.peak_gib:5.1f} GiB"
        f"  ({row.repeats} repeats)" + ("" if row.error is None else f"  {row.error}")
    )


def part_line(part: Part) -> str:
    rate = f"{part.tflops:8.0f} TFLOP/s" if part.tflops is not None else ""
    rate = rate or (f"{part.gb_per_second:8.0f} GB/s   " if part.gb_per_second is not None else " " * 16)
    floor = "" if part.times_floor is None else f"  {part.times_floor:.2f} x its floor"
    return f"    {part.name:22} {part.ms:8.3f} ms {rate}{floor}"


def machine() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version(),
        "commit": commit.stdout.strip(), "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip


def check() -> None:
    """Each precision on tiny shapes against the model itself; peers only run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Andromeda(CHECK).to(device).eval()
    ids = torch.randint(CHECK.num_tokens, (1, 200), device=device)
    with torch.no_grad():
        truth = model(ids, last_only=True)
    for precision in PRECISIONS if device == "cuda" else ("fp32", "fp8"):
        runner = Prefill(model, precision)
        error = float((runner(ids) - truth).norm() / truth.norm())
        print(f"{precision}: relative error {error:.1e}{'' if runner.reason is None else ' ' + runner.reason}")
    for name in PEERS:
        try:
            logits = peer(name, CHECK, 200, device)[1](ids)
            print(f"{name}: logits {tuple(logits.shape)}, {'finite' if logits.isfinite().all() else 'not finite'}")
        except ImportError as error:
            print(f"{name}: {error}")


if __name__ == "__main__":
    main()
