"""Serving: tokens a second and time to the first one, by the engine, by plain `generate` and by transformers' Llama.

On a CPU, float32, random weights, greedy, prompts of PROMPT random tokens: what a step takes is the time of 1 + n new
tokens less that of one, over n. The engine runs a second time as it does where there is no C++ compiler. All contenders
take their turns in every round; the best round counts, for a shared machine only ever adds. Attention over pages by
itself stands beside a copy of the bytes it reads. No drafts: greedy text of random weights repeats itself, and drafts
would always be right.
On a GPU, bfloat16: steps of the engine behind contexts of random keys and values, put into its pages.

The ceiling of a step is the longer of two: reading weights, keys and values at the rate of a sum over as many bytes (on
a GPU of a copy that touches as many), and the products at the rate of a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
import torch.nn.functional as F

from andromeda.benchmarks import measure, peers
from andromeda.benchmarks.measure import CUDA, DEVICE, DTYPE, Deadline, Report, Save
from andromeda.config import AndromedaConfig, preset
from andromeda.inference.engine.blocks import PAGE, extend_hashes
from andromeda.inference.engine.engine import Engine
from andromeda.inference.engine.request import Request
from andromeda.inference.generate import generate, generate_batch
from andromeda.inference.sampling import GREEDY
from andromeda.inference.speed import bytes_per_token
from andromeda.kernels import Geometry, paged_attention
from andromeda.kernels.cpu.library import library, without_library
from andromeda.kernels.cpu.memory import in_large_pages
from andromeda.model import Andromeda
from andromeda.positions import rotary

PRESETS = ("2b",) if CUDA else ("nano", "150m")
BATCHES = (1, 32) if CUDA else (1, 8, 32)
CONTEXTS = (1024, 32768, 131072)  # tokens, on a GPU
PROMPT = 32  # tokens, shorter than a page, so that nothing is found in the cache
PREFIX, QUESTION = 2000, 16  # tokens
LENGTHS, ROWS = (300, 2000, 32000), 8  # of attention by itself
ROUNDS, LARGE_ROUNDS = 5, 3
NEW, LARGE_NEW = 32, 16  # tokens
LARGE = 50e6  # parameters
GPU_STEPS = 20

Run = Callable[[int], Any]  # writes so many new tokens for each prompt


def run(presets: Sequence[str], batches: Sequence[int], contexts: Sequence[int], seconds: float, save: Save) -> Report:
    """All rows, and what each is beside its ceiling."""
    report: Report = {"machine": measure.machine(), "decode": [], "first_token": [], "attention": []}
    print(measure.headline(report["machine"]), flush=True)
    deadline = Deadline(seconds)
    for name in presets:
        config = preset(name)
        if CUDA:
            rows = _on_gpu(name, config, batches, contexts, deadline)
        else:
            rows = _on_cpu(name, config, batches, deadline)
        for table, row in rows:
            report[table].append(row)
            print(_line(row), flush=True)
            save(report)
    return report


def check() -> Report:
    """Tiny: everything runs, and the engine writes what `generate` writes."""
    config = AndromedaConfig(num_tokens=64, max_seq_len=64, dim=32, depth=2, dim_head=16, heads=2, alibi_num_heads=1)
    model = _model(config)
    rows = [*_decode(_contenders("check", model, 2), model, 2, new=2, rounds=1)]
    return {"decode": rows, "first_token": _first_token(model, prefix=2 * PAGE, question=3, rounds=1)}


# ---- on a CPU ------------------------------------------------------------------------------------


def _on_cpu(
    name: str, config: AndromedaConfig, batches: Sequence[int], deadline: Deadline
) -> Iterator[tuple[str, dict[str, Any]]]:
    model = _model(config)
    large = config.num_parameters() > LARGE
    for batch in batches:
        if deadline.over():
            return
        rounds, new = (LARGE_ROUNDS, LARGE_NEW) if large else (ROUNDS, NEW)
        for row in _decode(_contenders(name, model, batch), model, batch, new, rounds):
            yield "decode", {"preset": name, **row}
    if not deadline.over():
        for row in _first_token(model, PREFIX, QUESTION, LARGE_ROUNDS):
            yield "first_token", {"preset": name, **row}
    for length in LENGTHS:
        if not deadline.over():
            yield "attention", {"preset": name, **_attention(model, length)}


def _model(config: AndromedaConfig) -> Andromeda:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return Andromeda(config).to(DTYPE).eval()


def _contenders(name: str, model: Andromeda, batch: int) -> dict[str, Run]:
    """By name. The engine is asked for the same tokens as `generate` first.

    Raises:
        WrongResultError: it writes others.
    """
    config = model.config
    prompts = _prompts(config, batch, PROMPT)
    engine = Engine(model, max_running=batch, speculate=0)
    with without_library():
        slower = Engine(model, max_running=batch, speculate=0)

    def by_engine(new: int) -> list[list[int]]:
        return _written(engine, prompts, new)

    def by_slower(new: int) -> list[list[int]]:
        with without_library():
            return _written(slower, prompts, new)

    def plainly(new: int) -> list[list[int]]:
        if batch == 1:
            return [list(generate(model, prompts[0], max_new_tokens=new, sampling=GREEDY))]
        return generate_batch(model, prompts, max_new_tokens=new, sampling=GREEDY)

    wrong = sum(a != b for a, b in zip(by_engine(8), plainly(8), strict=True))
    measure.require(f"{name}, batch {batch}: texts that are not those of generate", float(wrong), 0.5)
    contenders: dict[str, Run] = {"engine": by_engine, "generate": plainly}
    if library() is not None:
        contenders["engine, plain PyTorch"] = by_slower
    if peers.installed(peers.LLAMA):
        contenders |= _llama(config, prompts)
    return contenders


def _llama(config: AndromedaConfig, prompts: Sequence[Sequence[int]]) -> dict[str, Run]:
    torch.manual_seed(0)
    model = peers.llama(config, 4 * PREFIX).eval()
    ids = torch.tensor(prompts)

    def run_with(cache: str) -> Run:
        return lambda new: model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new,
            cache_implementation=cache,
        )  # fmt: skip

    return {f"{peers.LLAMA}, {cache} cache": run_with(cache) for cache in ("dynamic", "static")}


def _decode(
    contenders: dict[str, Run], model: Andromeda, batch: int, new: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """A row each, in turns; `processor_ms` is the time of all threads, which other work on the machine adds less to."""
    ceiling = _ceiling(model, batch, PROMPT + new // 2)
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for turn in range(rounds + 1):
        for name, write in contenders.items():
            for tokens in (1, 1 + new):
                began = perf_counter(), process_time()
                write(tokens)
                if turn:  # the first warms up
                    seconds = perf_counter() - began[0], process_time() - began[1]
                    found.setdefault((name, tokens), []).append(seconds)
    for name in contenders:
        wall, processor = (
            [
                (long - short) / new
                for short, long in zip(*(_best_first(found[name, n], clock) for n in (1, 1 + new)), strict=True)
            ]
            for clock in (0, 1)
        )
        yield {
            "batch": batch, "contender": name, "tokens_per_second": batch / wall[0], "ms_a_step": 1e3 * wall[0],
            "processor_ms": 1e3 * processor[0], "median_ms": 1e3 * median(wall), "ceiling_ms": 1e3 * ceiling,
            "of_ceiling": ceiling / wall[0],
        }  # fmt: skip


def _best_first(seconds: Sequence[tuple[float, ...]], clock: int) -> list[float]:
    return sorted(times[clock] for times in seconds)


@torch.inference_mode()
def _attention(model: Andromeda, length: int) -> dict[str, Any]:
    """One block's, of a token a row, over pages that lie anywhere; the copy is of the keys and values of all rows."""
    config, attention = model.config, model.blocks[0].attention
    geometry = Geometry(
        attention.slopes, attention.windows(DTYPE), attention.bounds(DTYPE), rotary=rotary(config),
        local_heads=config.num_local_heads,
    )  # fmt: skip
    width = -(-length // PAGE)
    table = torch.randperm(ROWS * width, generator=torch.Generator().manual_seed(0)).view(ROWS, width).int()
    keys = F.normalize(torch.randn(ROWS * width, PAGE, config.kv_heads, config.dim_head), dim=-1)
    values, copies = torch.randn_like(keys), torch.empty_like(keys)
    q = config.qk_temperature * F.normalize(torch.randn(ROWS, 1, config.heads, config.dim_head), dim=-1)
    ragged = [length - row for row in range(ROWS)]

    def once() -> None:
        paged_attention(q, keys, values, table, ragged, geometry)

    def copy() -> None:
        copies.copy_(keys)
        copies.copy_(values)

    ours, bytes_only = (_processor_ms(run) for run in (once, copy))
    with without_library():
        plain = _processor_ms(once)
    read = keys.nbytes + values.nbytes
    return {
        "rows": ROWS, "length": length, "mib": read / 2**20, "processor_ms": ours, "plain_pytorch_ms": plain,
        "copy_ms": bytes_only, "of_copy": bytes_only / ours,
    }  # fmt: skip


def _processor_ms(call: Callable[[], Any], count: int = 10) -> float:
    """The best of some calls, after one to warm up."""
    call()
    found = []
    for _ in range(count):
        began = process_time()
        call()
        found.append(process_time() - began)
    return 1e3 * min(found)


def _first_token(model: Andromeda, prefix: int, question: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds from a request to its first token, the prefix being new and being cached, and plainly."""
    config = model.config
    engine = Engine(model, max_running=1, speculate=0)
    contenders: dict[str, Run] = {}
    seconds: dict[str, list[float]] = {"engine": [], "engine, prefix cached": [], "generate": []}

    def time(name: str, write: Callable[[], Any]) -> None:
        began = perf_counter()
        write()
        seconds.setdefault(name, []).append(perf_counter() - began)

    for turn in range(rounds):
        start = _prompts(config, 1, prefix, seed=turn)[0]
        first, second = ([*start, *end] for end in _prompts(config, 2, question, seed=turn + rounds))
        time("engine", partial(_written, engine, [first], 1))
        time("engine, prefix cached", partial(_written, engine, [second], 1))
        time("generate", partial(list, generate(model, first, max_new_tokens=1, sampling=GREEDY)))
        if peers.installed(peers.LLAMA):
            contenders = contenders or _llama(config, [first])
            name = f"{peers.LLAMA}, dynamic cache"
            time(name, partial(contenders[name], 1))
    whole = min(seconds["engine"])
    return [
        {
            "tokens": prefix + question, "contender": name, "ms_to_first": 1e3 * min(found),
            "median_ms": 1e3 * median(found), "times_sooner": whole / min(found),
        }
        for name, found in seconds.items()
    ]  # fmt: skip


def _prompts(config: AndromedaConfig, batch: int, tokens: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = torch.randint(config.num_tokens, (batch, tokens), generator=generator).tolist()
    return ids


def _written(engine: Engine, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    numbers = [engine.add(Request(ids, max_new_tokens=new, sampling=GREEDY)) for ids in prompts]
    texts: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.busy:
        for number, update in engine.step():
            texts[number] += [token.id for token in update.tokens]
    return [texts[number] for number in numbers]


# ---- on a GPU ------------------------------------------------------------------------------------


def _on_gpu(
    name: str, config: AndromedaConfig, batches: Sequence[int], contexts: Sequence[int], deadline: Deadline
) -> Iterator[tuple[str, dict[str, Any]]]:
    model = _model(config)
    for batch in batches:
        for context in contexts:
            if deadline.over():
                return
            try:
                row = row_of_steps(model, batch, context)
            except torch.OutOfMemoryError:
                row = {"problem": "out of memory"}
            measure.release()
            yield "decode", {"preset": name, "batch": batch, "context": context, "contender": "engine", **row}


def row_of_steps(model: Andromeda, batch: int, context: int, steps: int = GPU_STEPS) -> dict[str, Any]:
    """Steps of a batch of texts of that many tokens, the host's work included."""
    engine = Engine(model, max_running=batch, num_pages=1 + batch * (context // PAGE + 2), speculate=0)
    fill(engine)
    for ids in _prompts(model.config, batch, context + 1):  # all but the last lie in pages
        hold(engine, ids)
        engine.add(Request(ids, max_new_tokens=8 + steps, sampling=GREEDY))
    for _ in range(5):  # all have begun, and all is warm
        failed = [update.error for _, update in engine.step() if update.error is not None]
        if failed:
            raise measure.WrongResultError(f"a step ended in an error: {failed[0]}")
    seconds = []
    for _ in range(steps):
        began = perf_counter()
        engine.step()  # it ends with the tokens on the host
        seconds.append(perf_counter() - began)
    ceiling, took = _ceiling(model, batch, context), median(seconds)
    cached = engine.stats().total_cached_tokens / batch
    engine.close()
    return {
        "tokens_per_second": batch / took, "ms_a_step": 1e3 * took, "ceiling_ms": 1e3 * ceiling,
        "of_ceiling": ceiling / took, "cached_tokens": cached,
    }  # fmt: skip


def fill(engine: Engine) -> None:
    """Random keys of length 1, values and shift states."""
    pages = engine._runner.pages
    for block in range(pages.keys.shape[0]):
        pages.values[block].normal_()
        for part in pages.keys[block].normal_().split(4096):
            part.copy_(F.normalize(part.float(), dim=-1))
    if pages.shifts is not None:
        pages.shifts.normal_()


def hold(engine: Engine, ids: Sequence[int]) -> None:
    """Makes the engine believe that it has read the full pages of a prompt; what it has of them is what lies there."""
    pool, hashes = engine._pool, list[bytes]()
    extend_hashes(hashes, ids, len(ids) // PAGE)
    pages = [page for page in (pool.take() for _ in hashes) if page is not None]
    for page, known in zip(pages, hashes, strict=True):
        pool.register(page, known)
    pool.release(pages)


# ---- ceilings ------------------------------------------------------------------------------------


def _ceiling(model: Andromeda, batch: int, context: int) -> float:
    """Seconds of a step, at least."""
    read = bytes_per_token(model, 0) + batch * (bytes_per_token(model, context) - bytes_per_token(model, 0))
    operations = batch * model.config.flops_per_token(1).products
    rate = measure.copy_rate() if CUDA else _read_rate(read)
    return max(read / rate, operations / (measure.product_rate() if CUDA else measure.product_rate(1024)))


def _read_rate(size: int) -> float:
    """Bytes a second of adding up so many on a CPU, in large pages where there are any."""
    numbers = in_large_pages(size // 4).fill_(1.0)
    return 1e3 * size / _processor_ms(numbers.sum)


def _line(row: dict[str, Any]) -> str:
    if "copy_ms" in row:
        size = f"{row['rows']} rows of {row['length']:,} tokens, {row['mib']:.1f} MiB"
        return (
            f"{row['preset']:5} attention, {size}: {row['processor_ms']:.2f} ms, in plain PyTorch "
            f"{row['plain_pytorch_ms']:.2f}, a copy {row['copy_ms']:.2f}"
        )
    place = f"{row['preset']:5} {row['contender']:34}"
    if "problem" in row:
        return f"{place} batch {row['batch']:3} context {row['context']:7,} {row['problem']}"
    if "tokens" in row:
        return (
            f"{place} {row['tokens']:,} tokens: {row['ms_to_first']:9,.1f} ms, {row['times_sooner']:.1f} times sooner"
        )
    context = f" context {row['context']:7,}" if "context" in row else ""
    speed = f"{row['tokens_per_second']:9,.1f} tokens/s, {row['ms_a_step']:8.2f} ms a step"
    if "processor_ms" in row:
        speed += f" ({row['processor_ms']:.2f} of the processor)"
    return f"{place} batch {row['batch']:3}{context} {speed}, ceiling {row['ceiling_ms']:.2f} ({row['of_ceiling']:.0%})"
