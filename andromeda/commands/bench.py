"""`andromeda bench SUBJECT`: speed and memory beside ceilings and peers, measured in the same run."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from andromeda.commands.output import check_json_path, write_json
from andromeda.errors import AndromedaError

if TYPE_CHECKING:
    from andromeda.benchmarks.measure import Report, Save


def attention(
    *,
    lengths: list[int] | None = None,
    peers: bool = True,
    sweep: bool = False,
    seconds: float = 540.0,
    check: bool = False,
    json: str | None = None,
) -> None:
    """Times attention, forward and backward, beside SDPA and FlexAttention.

    24 heads of 128 channels over one key/value head, bfloat16, against the rate of a large matrix product.

    Args:
        lengths: tokens (default: 8192,32768,102400).
        peers: measure them too.
        sweep: tile shapes of our kernels as well, behind everything else.
        seconds: start nothing more after so many.
        check: errors at small sizes alone; without a GPU in Triton's interpreter.
        json: file to write the same figures to.
    """
    save = _begin("attention", json, check)
    from andromeda.benchmarks import attention as benchmark

    if not check:
        benchmark.run(_lengths(lengths, benchmark.LENGTHS), peers, sweep, seconds, save)
        return
    errors = benchmark.check()
    for tokens, by_way in errors.items():
        for way, values in by_way.items():
            print(f"{tokens:>5} tokens, {way:5}  output, dq, dk, dv:", *(f"{value:.1e}" for value in values))
    save({"errors": errors})


def decode(*, sweep: bool = False, check: bool = False, json: str | None = None) -> None:
    """Times one new token against a long paged cache, beside SDPA.

    Up to 131,072 tokens of context, batches of 1 and of 32, against the bandwidth of a copy.

    Args:
        sweep: candidate configurations of the kernel in place of the peers.
        check: the error at small sizes alone; without a GPU in Triton's interpreter.
        json: file to write the same figures to.
    """
    save = _begin("decode", json, check)
    from andromeda.benchmarks import decode as benchmark

    if not check:
        benchmark.run(sweep, save)
        return
    error = benchmark.check()
    print(f"largest relative error: {error:.1e}")
    save({"error": error})


def embedding(*, sweep: bool = False, check: bool = False, json: str | None = None) -> None:
    """Times the token embedding, forward and backward, beside torch.nn.Embedding.

    A table of 50,432 x 2,560 in bfloat16, against the bandwidth of a copy.

    Args:
        sweep: our tiles in place of the peers.
        check: small sizes; without a GPU in Triton's interpreter.
        json: file to write the same figures to.
    """
    save = _begin("embedding", json, check)
    from andromeda.benchmarks import embedding as benchmark

    benchmark.run(sweep, check, save)


def loss(*, check: bool = False, json: str | None = None) -> None:
    """Times the loss head, forward and backward, beside plain PyTorch, liger-kernel and cut-cross-entropy.

    dim 2,560, a vocabulary of 50,432, bfloat16, against the rate of a large matrix product.

    Args:
        check: small sizes; without a GPU in Triton's interpreter.
        json: file to write the same figures to.
    """
    save = _begin("loss", json, check)
    from andromeda.benchmarks import loss as benchmark

    benchmark.run(check, save)


def prefill(
    *,
    presets: str = "400m,700m,2b",
    lengths: list[int] | None = None,
    precisions: str = "bf16,fp8",
    only: list[str] | None = None,
    alibi_heads: int | None = None,
    peers: bool = True,
    breakdown: bool = False,
    graph: bool = True,
    seconds: float = 540.0,
    check: bool = False,
    json: str | None = None,
) -> None:
    """Times a prompt to the logits of its last token, beside transformers' Qwen3 class and x-transformers.

    Random weights; against the time of the same operations at the rates of matrix products.

    Args:
        presets: models, with commas between.
        lengths: tokens (default: 8192,32768,102400,200000).
        precisions: of bf16 and fp8.
        only: one row, PRESET:TOKENS:PRECISION, in place of all; may be given again.
        alibi_heads: in place of the preset's.
        peers: measure them too.
        breakdown: the parts of one layer as well.
        graph: CUDA graphs for prompts up to 32,768 tokens.
        seconds: start nothing more after so many.
        check: errors at small sizes alone; without a GPU in Triton's interpreter.
        json: file to write the same figures to.
    """
    names = presets.split(",")
    _check_presets("prefill", "--presets", names)
    save = _begin("prefill", json, check)
    from andromeda.benchmarks import prefill as benchmark

    if check:
        save(benchmark.check())
        return
    if only is None:
        tokens = _lengths(lengths, benchmark.LENGTHS)
        rows = benchmark.wanted(names, tokens, precisions.split(","), peers)
    else:
        rows = [benchmark.read_row(row) for row in only]
    benchmark.run(rows, benchmark.Options(alibi_heads, breakdown, graph), seconds, save)


def memory(*, preset: str | None = None, lengths: list[int] | None = None, json: str | None = None) -> None:
    """Measures peak memory and time of one long forward pass, beside x-transformers with the same flags.

    Runs on a GPU or a CPU, each pass in a process of its own, against the size of weights and logits.

    Args:
        preset: the model (default: 700m on a GPU, nano on a CPU).
        lengths: tokens (default: 8192,32768,102400).
        json: file to write the same figures to.
    """
    _check_presets("memory", "--preset", [preset] if preset is not None else [])
    save = _begin("memory", json, anywhere=True)
    from andromeda.benchmarks import memory as benchmark

    benchmark.run(preset or benchmark.PRESET, _lengths(lengths, benchmark.LENGTHS), save)


def serving(
    *,
    presets: str | None = None,
    batches: list[int] | None = None,
    lengths: list[int] | None = None,
    seconds: float = 540.0,
    check: bool = False,
    json: str | None = None,
) -> None:
    """Times decode and the first token, by the engine, by plain generate and by transformers' Llama class.

    On a CPU in float32, all in turns, and prompts whose first 2,000 tokens are cached. On a GPU in bfloat16, the engine
    behind contexts of random keys and values. Against the rates of a copy and of a large matrix product.

    Args:
        presets: models, with commas between (default: nano,150m; 2b on a GPU).
        batches: texts at a time (default: 1,8,32; 1,32 on a GPU).
        lengths: tokens of context on a GPU (default: 1024,32768,131072).
        seconds: start nothing more after so many.
        check: whether the engine writes what generate writes, at a tiny size alone.
        json: file to write the same figures to.
    """
    names = presets.split(",") if presets is not None else []
    _check_presets("serving", "--presets", names)
    save = _begin("serving", json, anywhere=True)
    from andromeda.benchmarks import serving as benchmark

    if check:
        save(benchmark.check())
        return
    contexts = _lengths(lengths, benchmark.CONTEXTS)
    benchmark.run(names or benchmark.PRESETS, tuple(batches or benchmark.BATCHES), contexts, seconds, save)


def training(
    *,
    preset: str = "2b",
    lengths: list[int] | None = None,
    only: list[str] | None = None,
    once: bool = False,
    peers: bool = True,
    breakdown: bool = False,
    seconds: float = 540.0,
    check: bool = False,
    json: str | None = None,
) -> None:
    """Times optimizer steps, and their peak memory, beside transformers' Qwen3 class.

    One sequence a step, activations in bfloat16, against the rate of a large matrix product.

    Args:
        preset: the model.
        lengths: tokens (default: 8192,32768,131072).
        only: one row in place of all, such as ours:2b:8192:compile:2 (sequences) or qwen3:2b:32768:full; may be given
            again.
        once: a single step of each, the first, for its memory: whether it fits.
        peers: measure them too.
        breakdown: the time of each kernel as well.
        seconds: start nothing more after so many.
        check: two steps of each way at a small size, anywhere.
        json: file to write the same figures to.
    """
    _check_presets("training", "--preset", [preset])
    save = _begin("training", json, check)
    from andromeda.benchmarks import training as benchmark

    if check:
        for done in benchmark.check():
            print(done)
    else:
        rows = benchmark.wanted(preset, _lengths(lengths, benchmark.LENGTHS), peers)
        benchmark.run(rows if only is None else list(map(benchmark.read_row, only)), once, breakdown, seconds, save)


SUBJECTS: dict[str, Callable[..., None]] = {
    "attention": attention, "decode": decode, "embedding": embedding, "loss": loss, "prefill": prefill,
    "serving": serving, "training": training, "memory": memory,
}  # fmt: skip


def _begin(subject: str, json: str | None, check: bool = False, anywhere: bool = False) -> Save:
    """Before the kernels are imported: looks for what is needed. Returns what writes the report.

    Raises:
        AndromedaError: there is no CUDA device or no triton for what needs one, or --json names no place for a file.
    """
    check_json_path(json)
    import torch

    if not torch.cuda.is_available():
        if not (check or anywhere):
            raise AndromedaError(
                f"bench {subject}: needs a CUDA device, and torch finds none; --check runs without one"
            )
        if check:
            os.environ["TRITON_INTERPRET"] = "1"
    if not anywhere and find_spec("triton") is None:
        raise AndromedaError(f"bench {subject}: needs triton: pip install triton")

    def save(report: Report) -> None:
        if json is not None:
            write_json(json, report)

    return save


def _check_presets(subject: str, flag: str, names: list[str]) -> None:
    from andromeda.config import PRESETS

    for name in names:
        if name not in PRESETS:
            raise AndromedaError(f"bench {subject}: {flag} {name}: there are {', '.join(PRESETS)}")


def _lengths(given: list[int] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    lengths = default if given is None else tuple(given)
    if min(lengths) < 1:
        raise AndromedaError(f"--lengths {','.join(map(str, lengths))}: a length must be at least 1 token")
    return lengths
