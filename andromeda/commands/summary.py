"""The page at the end of a run: what was trained on what, what came of it, and pictures. RUN/summary.md."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from andromeda.atomic import replace_file
from andromeda.commands.output import binary_bytes, count, plural, significant
from andromeda.config import AndromedaConfig
from andromeda.positions import head_slopes
from andromeda.training.metrics import read_metrics
from andromeda.training.nebula.curves import describe_tasks, plot_tasks
from andromeda.training.plot import can_draw, plot_curves, plot_heads, plot_losses
from andromeda.training.processes import Processes
from andromeda.training.recipe import Recipe
from andromeda.training.run import RunDirectory

Line = dict[str, Any]
MOST_LEFT_OUT = 20  # steps that are listed
CONVENTION = (
    "FLOP/s count what the mathematics needs: three times the forward pass, attention causal, no key outside a "
    "certified window, nothing twice (a checkpointed block, say). What is possible is the best large matrix product on "
    "the same devices, in the same precision, measured at the start."
)


@dataclass(frozen=True)
class About:
    """What the files of a run do not say.

    Attributes:
        status: how it ended, or where it stands.
        data: what is trained on, in words.
        seq_len: tokens of the longest sequence.
    """

    recipe: Recipe
    config: AndromedaConfig
    processes: Processes
    status: str
    data: str
    seq_len: int


def summarise(run: RunDirectory, about: About) -> bool:
    """Writes summary.md and its pictures; False where matplotlib is not installed, and there are none."""
    lines, heads = read_metrics(run.metrics), read_metrics(run.heads)
    pictures = draw(run, about, lines, heads) if can_draw() else []
    parts = [
        f"# {run.path.name}\n\n{about.status}\n",
        _table(_facts(run, about, lines)),
        *(f"![{name}]({name}.png)\n" for name in pictures),
        _heads(about.config, heads),
        f"{CONVENTION}\n",
        "## Recipe\n\n```yaml\n" + about.recipe.to_yaml() + "```\n",
    ]
    replace_file(run.summary, "\n".join(part for part in parts if part))
    return bool(pictures)


def draw(run: RunDirectory, about: About, lines: Sequence[Line], heads: Sequence[Line]) -> list[str]:
    """The pictures' names."""
    title, config = str(run.path), about.config
    plot_losses(lines, run.plot, title)
    plot_curves(lines, run.path / "curves.png", title, about.recipe.clip_norm)
    drawn = ["loss", "curves"]
    if about.recipe.tasks:
        plot_tasks(lines, run.path / "tasks.png", title)
        drawn.insert(1, "tasks")
    if heads and "bounds" in heads[-1]:
        plot_heads(heads, run.path / "heads.png", title, config.num_local_heads, about.seq_len)
        drawn.append("heads")
    return drawn


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"


def _facts(run: RunDirectory, about: About, lines: Sequence[Line]) -> dict[str, str]:
    config, recipe = about.config, about.recipe
    logged = [line for line in lines if "loss" in line]
    heads = f"{config.heads} heads of {config.dim_head}, {config.num_local_heads} of them local"
    body = count(config.num_parameters(embedding=False))
    return {
        "parameters": f"{count(config.num_parameters())}, {body} of them outside the vocabulary's matrices",
        "model": f"dim {config.dim}, depth {config.depth}, {heads}, for sequences of {config.max_seq_len:,} tokens",
        "data": about.data,
        "optimizer": f"{recipe.optimizer}, learning rate {recipe.learning_rate:g}, {recipe.schedule}",
        "machine": _machine(about),
        **(_results(logged) if logged else {}),
        "left out": _left_out(lines),
        "checkpoints": _checkpoints(run),
    }


def _machine(about: About) -> str:
    processes, device = about.processes, about.processes.device
    threads = plural(torch.get_num_threads(), "thread")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads}"
    many = "" if processes.ranks == 1 else f", {processes.ranks} processes, {about.recipe.engine}"
    return f"{name}{many}, {about.recipe.precision}, torch {torch.__version__}, Python {platform.python_version()}"


def _results(lines: Sequence[Line]) -> dict[str, str]:
    """Of lines of metrics with a loss."""
    last, found = lines[-1], {}
    validated = [line for line in lines if "validation_bits_per_byte" in line]
    if validated:
        final, best = validated[-1], min(validated, key=lambda line: line["validation_bits_per_byte"])
        at = f"{final['validation_bits_per_byte']:.4f} bits per byte at step {final['step']:,}"
        lowest = f"{best['validation_bits_per_byte']:.4f} at step {best['step']:,}"
        found["validation"] = f"{at}; lowest {lowest}"
    if compared := [line for line in lines if "validation_loss" in line]:
        final, best = compared[-1], min(compared, key=lambda line: line["validation_loss"])
        right = f"{final['validation_reward_accuracy']:.1%} right, mean margin {final['validation_reward_margin']:.3f}"
        lowest = f"lowest loss {best['validation_loss']:.4f} at step {best['step']:,}"
        found["held-out pairs"] = f"loss {final['validation_loss']:.4f}, {right} at step {final['step']:,}; {lowest}"
    text = f" ({last['train_bits_per_byte']:.4f} bits per byte)" if "train_bits_per_byte" in last else ""
    found["training loss"] = f"{last['loss']:.4f}{text}, the mean since the line before"
    found |= {f"task {name}": figures for name, figures in describe_tasks(last).items()}
    found["tokens"] = f"{last['tokens']:,} trained on, in {plural(last['step'], 'step')}"
    found["time"] = f"{_duration(last['seconds'])} of training, without validation and checkpoints"
    found["speed"] = _speed(lines)
    found["peak memory"] = _memory(lines)
    return {name: value for name, value in found.items() if value}


def _speed(lines: Sequence[Line]) -> str:
    keys = ("tokens_per_second", "flops_per_second", "possible_flops_per_second")
    speed, achieved, possible = (median(line[key] for line in lines) for key in keys)
    unit, size = ("T", 1e12) if possible >= 1e12 else ("G", 1e9)
    ceiling = f"{achieved / possible:.1%} of the possible {significant(possible / size)} {unit}FLOP/s"
    return f"{speed:,.0f} tokens a second; {ceiling} (medians of the logged steps)"


def _memory(lines: Sequence[Line]) -> str:
    """Lines of runs before there was such a figure have none."""
    names = {"peak_device_bytes": "on the device", "peak_host_bytes": "on the host"}
    peaks = {name: max((line.get(key, 0) for line in lines), default=0) for key, name in names.items()}
    return ", ".join(f"{binary_bytes(size)} {name}" for name, size in peaks.items() if size)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _left_out(lines: Sequence[Line]) -> str:
    refused = [line for line in lines if "left_out" in line]
    if not refused:
        return "no step"
    listed = ["step {:,} (sequences {:,} to {:,})".format(line["step"], *line["left_out"]) for line in refused]
    more = "" if len(listed) <= MOST_LEFT_OUT else f" and {len(listed) - MOST_LEFT_OUT:,} more"
    return f"{plural(len(refused), 'step')}: {', '.join(listed[:MOST_LEFT_OUT])}{more}"


def _checkpoints(run: RunDirectory) -> str:
    paths, best = run.checkpoints(), run.best()
    named = [f"`{path.relative_to(run.path)}`" + (" (lowest validation)" if path == best else "") for path in paths]
    return ", ".join(named) or "none"


def _heads(config: AndromedaConfig, heads: Sequence[Line]) -> str:
    """A line a local head: what its window was, and is."""
    if not heads or "windows" not in heads[-1]:
        return ""
    first, last = heads[0], heads[-1]
    steps = f"window at step {first['step']:,} | at step {last['step']:,}"
    rows = [f"| local head | slope | {steps} | shortest to longest of all blocks |", "|---:|---:|---:|---:|---:|"]
    for head, slope in enumerate(head_slopes(config)[: config.num_local_heads]):
        before, now = ([block[head] or float("inf") for block in line["windows"]] for line in (first, last))
        ends = f"{min(now):,} to {max(now):,}"
        rows.append(f"| {head} | {significant(slope)} | {median(before):,.0f} | {median(now):,.0f} | {ends} |")
    return "## Heads\n\n" + "\n".join(rows) + "\n"
