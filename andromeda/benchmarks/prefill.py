"""From a prompt to the logits of its last token on one GPU: milliseconds beside the ceiling, and beside peers.

Weights are random. The ceiling of a row is the time that its operations would take at the rates measured in the same
run: matrix products of 8192 x 8192 x 8192 in the row's precision, and attention, within the windows, at the bf16 rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from andromeda.benchmarks import measure, peers
from andromeda.benchmarks.measure import CUDA, DEVICE, GIB, Deadline, Report, Save
from andromeda.benchmarks.peers import PEERS
from andromeda.config import AndromedaConfig, preset
from andromeda.errors import AndromedaError
from andromeda.inference.prefill import Prefill, heads_in_fp8
from andromeda.model import Andromeda
from andromeda.positions import initial_windows

NAMES = ("400m", "700m", "2b")
LENGTHS = (8192, 32768, 102400, 200000)
PRECISIONS = ("bf16", "fp8")
LIMITS = {"fp32": 1e-5, "bf16": 0.05, "fp8": 0.1}  # of relative errors, tiny shapes
GRAPHED = 32768  # tokens; longer prompts hide the time to launch their kernels
SECONDS_A_ROW = 3.0
CHECK = AndromedaConfig(num_tokens=256, max_seq_len=128, dim=64, depth=3, dim_head=32, heads=4, alibi_num_heads=2)


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
    ms: float | None = None  # the median, one prompt behind the other
    rested_ms: float | None = None  # of prompts after pauses
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


@dataclass(frozen=True)
class Options:
    """Of ours."""

    alibi_heads: int | None = None  # None: the preset's alibi_num_heads
    breakdown: bool = False  # the parts of one layer too
    graph: bool = True


Wanted = tuple[str, int, str]  # preset, tokens, precision or peer


def wanted(presets: Sequence[str], lengths: Sequence[int], precisions: Sequence[str], peers: bool) -> list[Wanted]:
    """Every row, ours before the peers at each length.

    Raises:
        AndromedaError: no such precision.
    """
    for precision in precisions:
        if precision not in PRECISIONS:
            raise AndromedaError(f"--precisions {precision}: there are {', '.join(PRECISIONS)}")
    kinds = [*precisions, *(PEERS if peers else ())]
    return [(name, length, kind) for name in presets for length in lengths for kind in kinds]


def read_row(text: str) -> Wanted:
    """PRESET:TOKENS:PRECISION.

    Raises:
        AndromedaError: it is none.
    """
    name, _, rest = text.partition(":")
    length, _, kind = rest.partition(":")
    if not length.isdecimal() or kind not in (*PRECISIONS, *PEERS):
        raise AndromedaError(f"--only {text}: must be PRESET:TOKENS:PRECISION, as in 700m:32768:fp8")
    return name, int(length), kind


def run(rows: Sequence[Wanted], options: Options, seconds: float, save: Save) -> Report:
    """The rows one by one, as long as there is time.

    Raises:
        AndromedaError: no such preset.
    """
    for name, _, _ in rows:
        preset(name)
    torch.manual_seed(0)
    deadline, ceilings = Deadline(seconds), measure_ceilings()
    report: Report = {"machine": measure.machine(), "ceilings": asdict(ceilings), "rows": [], "layers": []}
    print(f"{measure.headline(report['machine'])}\n{ceilings}", flush=True)
    for name, length, kind in rows:
        if deadline.over():
            print(f"stopped before {name} {length} {kind}: {seconds:.0f} s are over", flush=True)
            break
        if kind in PRECISIONS:
            row, parts = measure_ours(name, length, kind, ceilings, options)
        else:
            row, parts = measure_peer(kind, name, length), []
        report["rows"].append(asdict(row))
        print(line(row), flush=True)
        if parts:
            report["layers"].append({"row": line(row), "parts": [asdict(part) for part in parts]})
            print("\n".join(part_line(part) for part in parts), flush=True)
        save(report)
    return report


# ---- ours ----------------------------------------------------------------------------------------


def measure_ours(
    name: str, length: int, precision: str, ceilings: Ceilings, options: Options
) -> tuple[Row, list[Part]]:
    config = preset(name) if options.alibi_heads is None else preset(name, alibi_num_heads=options.alibi_heads)
    measure.release()
    runner = build(config, precision, graph=options.graph and length <= GRAPHED)
    ids = torch.randint(config.num_tokens, (1, length), device=DEVICE)
    facts: dict[str, Any] = {"name": "andromeda", "preset": name, "length": length, "precision": precision}
    facts["parameters"] = config.num_parameters()
    if runner.reason is not None:
        return Row(**facts, error=runner.reason), []
    try:
        times, rested, peak, logits = timed(lambda: runner(ids))
        if not logits.isfinite().all():
            return Row(**facts, error="not finite"), []
    except torch.cuda.OutOfMemoryError:
        return Row(**facts, error="out of memory"), []
    parts = layer_parts(runner, ids, ceilings) if options.breakdown else []
    ceiling = ceiling_seconds(config, length, precision, ceilings) * 1e3
    return filled(facts, times, rested, peak, ceiling), parts


def build(config: AndromedaConfig, precision: str, graph: bool) -> Prefill:
    """The packed weights serve; the blocks' own are dropped."""
    with torch.device(DEVICE):
        model = Andromeda(config).bfloat16().eval().requires_grad_(False)
    runner = Prefill(model, precision, graph=graph)
    if runner.reason is None:
        for block in model.blocks:
            for parameter in block.parameters():
                parameter.data = parameter.data.new_empty(0)
    measure.release()
    return runner


def filled(facts: dict[str, Any], times: list[float], rested: float, peak: int, ceiling: float | None) -> Row:
    ms = median(times)
    return Row(
        **facts, ms=ms, rested_ms=rested, repeats=len(times), tokens_per_second=facts["length"] / ms * 1e3,
        ceiling_ms=ceiling, share=None if ceiling is None else ceiling / ms, peak_gib=peak / GIB,
    )  # fmt: skip


def ceiling_seconds(config: AndromedaConfig, length: int, precision: str, ceilings: Ceilings) -> float:
    """Of what has to be done: the last block's products are those of keys and values, and it attends for one token."""
    products = config.flops_per_token(length, initial_windows(config), logits=False).products * length / config.depth
    keys_and_values = 4.0 * config.dim * config.kv_heads * config.dim_head * length
    rate = ceilings.fp8 if precision == "fp8" else ceilings.bf16
    a_block = products / rate + attention_seconds(config, length, precision, ceilings)
    return (config.depth - 1) * a_block + keys_and_values / ceilings.bf16


def attention_seconds(config: AndromedaConfig, length: int, precision: str, ceilings: Ceilings) -> float:
    """One block's attention at the measured rates; in fp8 q.k of some heads, half of what they do, takes less."""
    flops = config.flops_per_token(length, initial_windows(config)).attention * length / config.depth
    in_fp8 = 0.0
    if precision == "fp8":
        in_fp8 = heads_in_fp8(config) * 2.0 * config.dim_head * length * (length + 1) / 2
    return (flops - in_fp8) / ceilings.bf16 + in_fp8 / ceilings.fp8


def layer_parts(runner: Prefill, ids: Tensor, ceilings: Ceilings) -> list[Part]:
    """Runs through the layers, with a clock at each stage, so that the numbers are those of a real pass.

    The first layer is left out: in fp8 it has a stage more.
    """
    with torch.no_grad():
        step = runner.begin(ids)
        step.block(0)
        marks: list[list[torch.cuda.Event]] = []
        for n in range(1, runner.config.depth - 1):
            stages = step.stages(n)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
            events[0].record()
            for event, stage in zip(events[1:], stages.values(), strict=True):
                stage()
                event.record()
            marks.append(events)
        torch.cuda.synchronize()
    parts = []
    for i, name in enumerate(stages):
        ms = median(events[i].elapsed_time(events[i + 1]) for events in marks)
        parts.append(part(name, ms, runner, ids.shape[1], ceilings))
    total, pointwise = (sum(p.ms for p in parts), sum(p.ms for p in parts if p.gb_per_second is not None))
    floor = sum(p.ms / p.times_floor for p in parts if p.gb_per_second is not None and p.times_floor)
    return [*parts, Part("everything pointwise", pointwise, times_floor=pointwise / floor), Part("layer", total)]


def part(name: str, ms: float, runner: Prefill, length: int, ceilings: Ceilings) -> Part:
    config, fp8 = runner.config, runner.precision == "fp8"
    queries, ff, kv = config.heads * config.dim_head, config.ff_mult * config.dim, config.kv_heads * config.dim_head
    products = {"product in": config.dim * (queries + ff + 2 * kv), "product out": config.dim * (queries + ff)}
    # of global heads: keys once more, queries written in one byte instead of two
    in_e4m3 = kv - runner.heads8 * config.dim_head if runner.heads8 else 0
    numbers_moved = {  # bytes a token
        "prepare": 4 * queries + 2 * kv + 2 * kv * (2 if config.num_rotated_heads else 1) + in_e4m3,
        "activation": 3 * (queries + ff) if fp8 else 4 * ff,
        "add, norm, shift": (7 if fp8 else 6) * config.dim,
    }
    if name in numbers_moved:
        rate = numbers_moved[name] * length / ms * 1e3
        return Part(name, ms, gb_per_second=rate / 1e9, times_floor=ceilings.copy / rate)
    if name in products:
        flops = 2.0 * products[name] * length
        floor = flops / (ceilings.fp8 if fp8 else ceilings.bf16)
    else:
        flops = config.flops_per_token(length, initial_windows(config)).attention * length / config.depth
        floor = attention_seconds(config, length, runner.precision, ceilings)
    return Part(name, ms, tflops=flops / ms / 1e9, times_floor=ms / 1e3 / floor)


# ---- peers ---------------------------------------------------------------------------------------


def measure_peer(name: str, size: str, length: int) -> Row:
    facts: dict[str, Any] = {"name": name, "preset": size, "length": length, "precision": "bf16", "parameters": 0}
    if not peers.installed(name):
        return Row(**facts, error="not installed")
    measure.release()
    try:
        with torch.device(DEVICE):
            model = peers.build(name, preset(size), length).to(DEVICE).bfloat16().eval()  # x-transformers' slopes
        call = peers.last_logits(name, model)
        facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        ids = torch.randint(preset(size).num_tokens, (1, length), device=DEVICE)
        with torch.inference_mode():
            times, rested, peak, logits = timed(lambda: call(ids))
            finite = bool(logits.isfinite().all())
    except RuntimeError as error:
        out = isinstance(error, torch.cuda.OutOfMemoryError)
        return Row(**facts, error="out of memory" if out else f"{type(error).__name__}: {error}"[:160])
    row = filled(facts, times, rested, peak, None)
    return row if finite else Row(**asdict(row) | {"error": "not finite"})


# ---- clocks and ceilings -------------------------------------------------------------------------


def timed(run: Callable[[], Tensor]) -> tuple[list[float], float, int, Tensor]:
    """After those to warm up: milliseconds of each of some runs, those after a pause, the peak of memory, a result."""
    result = run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = measure.times(run, SECONDS_A_ROW, apart=True)
    return times, measure.rested(run), torch.cuda.max_memory_reserved(), result


def measure_ceilings() -> Ceilings:
    return Ceilings(bf16=measure.product_rate(), fp8=measure.fp8_product_rate(), copy=measure.copy_rate(2 * GIB))


# ---- what is printed -----------------------------------------------------------------------------


def line(row: Row) -> str:
    head = f"{row.name:28} {row.preset:5} {row.length:7,} {row.precision:5} {row.parameters / 1e9:5.2f} B"
    if row.ms is None:
        return f"{head}  {row.error}"
    share = "" if row.share is None else f"  {row.share:4.0%} of the ceiling"
    return (
        f"{head} {row.ms:9.2f} ms, rested {row.rested_ms:9.2f} ms {row.tokens_per_second or 0:11,.0f} tokens/s{share}"
        f"  {row.peak_gib:5.1f} GiB  ({row.repeats} repeats)" + ("" if row.error is None else f"  {row.error}")
    )


def part_line(part: Part) -> str:
    rate = f"{part.tflops:8.0f} TFLOP/s" if part.tflops is not None else ""
    rate = rate or (f"{part.gb_per_second:8.0f} GB/s   " if part.gb_per_second is not None else " " * 16)
    floor = "" if part.times_floor is None else f"  {part.times_floor:.2f} x its floor"
    return f"    {part.name:22} {part.ms:8.3f} ms {rate}{floor}"


def check() -> Report:
    """Each precision on tiny shapes against the model itself; peers only run.

    Raises:
        WrongResultError: one is far from it.
    """
    torch.manual_seed(0)
    report: Report = {"machine": measure.machine(), "errors": {}, "peers": {}}
    model = Andromeda(CHECK).to(DEVICE).eval()
    ids = torch.randint(CHECK.num_tokens, (1, 200), device=DEVICE)
    with torch.no_grad():
        truth = model(ids, last_only=True)
    for precision in PRECISIONS if CUDA else ("fp32", "fp8"):
        runner = Prefill(model, precision)
        if runner.reason is None:
            report["errors"][precision] = float((runner(ids) - truth).norm() / truth.norm())
            measure.require(f"prefill in {precision}", report["errors"][precision], LIMITS[precision])
            print(f"{precision}: relative error {report['errors'][precision]:.1e}", flush=True)
        else:
            print(f"{precision}: {runner.reason}", flush=True)
    for name in PEERS:
        said = "not installed"
        if peers.installed(name):
            peer = peers.build(name, CHECK, 200).to(DEVICE).eval()
            with torch.inference_mode():
                said = "finite" if peers.last_logits(name, peer)(ids).isfinite().all() else "not finite"
        report["peers"][name] = said
        print(f"{name}: {said}", flush=True)
    return report
