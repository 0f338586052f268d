"""`andromeda info`: what a model is, what it costs, and what it saves."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from andromeda.commands.comparisons import PUBLISHED, PublishedModel
from andromeda.commands.output import (
    binary_bytes,
    check_json_path,
    count,
    plain_console,
    plain_table,
    plural,
    significant,
    write_json,
)
from andromeda.config import PRESETS, AndromedaConfig
from andromeda.errors import AndromedaError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

CONTEXTS = (8192, 32768, 131072, 200000)
GAINS = ("q_gain", "k_gain")

Windows = list[list[float]]  # by block and head, tokens; infinite for a head that reaches everywhere


def info(model: str, json: str | None = None) -> None:
    """Says what a model is and what it needs.

    Parameters, operations a token, how far each head sees, and memory beside that of other models.

    Args:
        model: a preset (nano, 150m, 400m, 700m, 2b, 7b) or a model directory.
        json: file to write the same figures to.
    """
    check_json_path(json)
    config, windows, source = _open(model)
    figures = describe(model, config, windows) | {"windows_from": source, "attention": _attention_backend(config)}
    if json is not None:
        write_json(json, figures)
    console = plain_console()
    for part in _report(config, figures):
        console.print(part)


def _open(model: str) -> tuple[AndromedaConfig, Windows, str]:
    """The config, the windows, and what these were computed from."""
    from andromeda.positions import initial_windows

    if model in PRESETS:
        config = PRESETS[model]
        return config, [list(initial_windows(config))], "gains of 1, as at the start of training"
    from andromeda.checkpoint import load_config, resolve

    if not Path(model).exists():
        raise AndromedaError(f"{model}: neither a preset ({', '.join(PRESETS)}) nor a directory")
    directory = resolve(model)
    config = load_config(directory)
    if not (config.has_windows and config.attn_qk_norm_dim_scale):
        return config, [list(initial_windows(config))], "the config, which says all"
    gains = _read_gains(directory)
    if len(gains) != 2 * config.depth:
        return config, [list(initial_windows(config))], "gains of 1: the weights are not all there"
    return config, _windows_of(config, gains), "the gains in the weights"


# ---- figures -------------------------------------------------------------------------------------


def describe(name: str, config: AndromedaConfig, windows: Windows) -> dict[str, Any]:
    """All figures, as JSON has them. Bytes are those of bfloat16."""
    parameters = config.num_parameters()
    return {
        "model": name,
        "config": config.to_dict(),
        "parameters": parameters,
        "parameters_without_embedding": config.num_parameters(embedding=False),
        "weight_bytes": 2 * parameters,
        "kv_bytes_per_token": config.kv_bytes_per_token(),
        "windows": _window_summary(config, windows),
        "flops_per_token": [_flops(config, windows, context) for context in CONTEXTS],
        "cache_bytes": {context: context * config.kv_bytes_per_token() for context in CONTEXTS},
        "compared": [_compare(config, other) for other in PUBLISHED],
    }


def _window_summary(config: AndromedaConfig, windows: Windows) -> list[dict[str, Any]]:
    """A head each: its slope, and its windows over the blocks in tokens, None where it reaches everywhere."""
    from andromeda.positions import head_slopes

    summary = []
    for head, slope in enumerate(head_slopes(config)):
        over_blocks = [block[head] for block in windows]
        reach = {"shortest": min(over_blocks), "median": median(over_blocks), "longest": max(over_blocks)}
        finite = {name: None if math.isinf(tokens) else tokens for name, tokens in reach.items()}
        summary.append({"head": head, "slope": slope, **finite})
    return summary


def _flops(config: AndromedaConfig, windows: Windows, context: int) -> dict[str, float]:
    """Forward, a token, averaged over a causal sequence of `context` tokens, with all logits."""
    full = config.flops_per_token(context)
    windowed = [config.flops_per_token(context, block).attention for block in windows]
    return {
        "context": context,
        "products": full.products,
        "attention": full.attention,
        "attention_in_windows": sum(windowed) / len(windowed),
    }


def _compare(config: AndromedaConfig, other: PublishedModel) -> dict[str, Any]:
    """Another model's memory, how many times ours it is, and where the claimed ratio holds."""
    weights, kv = 2 * config.num_parameters(), config.kv_bytes_per_token()
    cache = {context: context * other.kv_bytes_per_token() for context in CONTEXTS}
    return {
        "model": other.name,
        "parameters": other.parameters,
        "context": other.context,
        "source": other.source,
        "weight_bytes": other.weight_bytes,
        "kv_bytes_per_token": other.kv_bytes_per_token(),
        "cache_bytes": cache,
        "claimed_ratio": other.claim,
        "cache_ratio": other.kv_bytes_per_token() / kv,
        "ratio_with_weights": {
            context: (other.weight_bytes + cache[context]) / (weights + context * kv) for context in CONTEXTS
        },
        "claim_holds_with_weights": _where(
            other.weight_bytes - other.claim * weights, other.kv_bytes_per_token() - other.claim * kv
        ),
    }


def _where(spare: int, spare_per_token: int) -> str:
    """For which numbers of tokens spare + spare_per_token * tokens is not negative."""
    if spare < 0:
        return f"from {math.ceil(-spare / spare_per_token):,} tokens" if spare_per_token > 0 else "nowhere"
    return f"up to {spare // -spare_per_token:,} tokens" if spare_per_token < 0 else "everywhere"


def _read_gains(directory: Path) -> dict[str, Any]:
    """The gains alone, by their names in the weights: the rest of the weights is not read."""
    from safetensors import safe_open

    from andromeda.tensorfile import TensorFile

    gains: dict[str, Any] = {}
    for path in sorted(directory.glob("model*.safetensors")):
        names = [name for name in TensorFile.open(path).specs if name.endswith(GAINS)]
        with safe_open(path, framework="pt") as file:
            gains |= {name: file.get_tensor(name) for name in names}
    return gains


def _windows_of(config: AndromedaConfig, gains: dict[str, Any]) -> Windows:
    """As `model.Attention.windows` has them."""
    import torch

    from andromeda.positions import certified_windows, head_slopes, in_tokens, logit_bounds

    slopes = torch.tensor(head_slopes(config), dtype=torch.float64)
    windows = []
    for block in range(config.depth):
        q_gain, k_gain = (gains[f"blocks.{block}.attention.{name}"].double() for name in GAINS)
        bounds = logit_bounds(q_gain, k_gain, config.qk_temperature)
        windows.append(in_tokens(certified_windows(bounds, slopes, config.window_epsilon)))
    return windows


def _attention_backend(config: AndromedaConfig) -> str:
    """What computes attention on this machine, at the lengths of CONTEXTS."""
    import torch

    from andromeda.kernels import Geometry, choose_backend
    from andromeda.positions import rotary

    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    geometry = Geometry(rotary=rotary(config))
    backend = choose_backend(device, dtype, config.dim_head, min(CONTEXTS), geometry, flash=config.attn_flash)
    place = torch.cuda.get_device_name() if on_gpu else f"CPU, {plural(torch.get_num_threads(), 'thread')}"
    return f"{backend} ({place}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__})"


# ---- tables --------------------------------------------------------------------------------------


def _report(config: AndromedaConfig, figures: dict[str, Any]) -> list[RenderableType]:
    """At most 80 columns wide."""
    return [
        _overview(config, figures),
        *_windows_table(figures),
        "\nForward operations a token in GFLOP, the mean over a sequence of so many tokens",
        _flops_table(figures),
        "\nMemory in bfloat16: weights, and cache of a token and of so many tokens",
        _memory_table(config, figures),
        "\nCache and weights together, over those of this model",
        _ratio_table(figures),
        "\nFrom how many tokens on this model needs so many times less",
        _claims_table(figures),
        _notes(),
    ]


def _overview(config: AndromedaConfig, figures: dict[str, Any]) -> Table:
    from rich.table import Table

    local = config.num_local_heads
    rows = {
        "model": figures["model"],
        "parameters": f"{count(figures['parameters'])}, "
        f"{count(figures['parameters_without_embedding'])} without the embedding",
        "shape": f"dim {config.dim:,}, depth {config.depth}, vocabulary {config.num_tokens:,}",
        "heads": f"{config.heads} of {config.dim_head} channels: {local} with ALiBi, {config.heads - local} without; "
        f"{config.kv_heads} for keys and values",
        "trained for": f"{config.max_seq_len:,} tokens, {'its limit' if config.use_abs_pos_emb else 'and reads more'}",
        "memory": f"weights {binary_bytes(figures['weight_bytes'])}, "
        f"cache {binary_bytes(figures['kv_bytes_per_token'])} a token",
        "attention": figures["attention"],
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(overflow="fold")
    for name, value in rows.items():
        grid.add_row(name, value)
    return grid


def _windows_table(figures: dict[str, Any]) -> list[RenderableType]:
    heads = figures["windows"]
    local = [head for head in heads if head["shortest"] is not None]
    if not local:
        return ["\nEvery head reaches everywhere: windows need QK norm, ALiBi and window_epsilon > 0."]
    names = ["shortest", "median", "longest"]
    if all(head["shortest"] == head["longest"] for head in local):
        names = ["shortest"]
    table = plain_table("head", "slope", *(["tokens"] if len(names) == 1 else names))
    for head in local:
        reach = ("everything" if head[name] is None else f"{head[name]:,.0f}" for name in names)
        table.add_row(str(head["head"]), f"{head['slope']:.4f}", *reach)
    return [
        f"\nHow many tokens a head provably sees in the blocks, from {figures['windows_from']}; "
        f"the other {len(heads) - len(local)} heads reach everywhere",
        table,
    ]


def _flops_table(figures: dict[str, Any]) -> Table:
    table = plain_table("tokens", "products", "attention", "in windows", "total", "in windows", "saved")
    for row in figures["flops_per_token"]:
        products, full, windowed = (row[name] / 1e9 for name in ("products", "attention", "attention_in_windows"))
        cells = (significant(number) for number in (products, full, windowed, products + full, products + windowed))
        table.add_row(f"{row['context']:,}", *cells, f"{(full - windowed) / (products + full):.0%}")
    return table


def _memory_table(config: AndromedaConfig, figures: dict[str, Any]) -> Table:
    table = plain_table("", "context", "weights", "a token", *(f"{context:,}" for context in CONTEXTS))
    ours = figures | {"model": "this model", "context": config.max_seq_len}
    for row in [ours, *figures["compared"]]:
        cache = (row["cache_bytes"][context] for context in CONTEXTS)
        sizes = [row["weight_bytes"], row["kv_bytes_per_token"], *cache]
        table.add_row(
            row["model"],
            f"{row['context']:,}",
            *(binary_bytes(size) for size in sizes),
        )
    return table


def _ratio_table(figures: dict[str, Any]) -> Table:
    table = plain_table("", *(f"{context:,}" for context in CONTEXTS), "cache alone")
    for row in figures["compared"]:
        ratios = [*(row["ratio_with_weights"][context] for context in CONTEXTS), row["cache_ratio"]]
        table.add_row(row["model"], *map(_times, ratios))
    return table


def _claims_table(figures: dict[str, Any]) -> Table:
    table = plain_table("", "claimed", "cache alone", "cache and weights")
    for row in figures["compared"]:
        cache = "everywhere" if row["cache_ratio"] >= row["claimed_ratio"] else "nowhere"
        table.add_row(row["model"], _times(row["claimed_ratio"]), cache, row["claim_holds_with_weights"])
    return table


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 99.5 else f"{ratio:.2g}x"


def _notes() -> str:
    names: dict[str, list[str]] = {}
    for other in PUBLISHED:
        names.setdefault(other.source, []).append(other.name)
    sources = (f"{', '.join(models)}: {source}." for source, models in names.items())
    return "\n".join(
        [
            "\nBeyond the context that a model was made for its figures are arithmetic: it was never to run there.",
            "A smaller model needs less for being smaller: compare with one of like size.",
            *sources,
        ]
    )
