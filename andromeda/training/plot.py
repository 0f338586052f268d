"""What a run's files hold, as pictures. All are drawn from the lines of metrics.jsonl and heads.jsonl alone."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from andromeda.atomic import replace_file

Line = dict[str, Any]
BLUE, PALE, RED, ORANGE, GREY = "#2c5f9e", "#8fa8c8", "#c23b22", "#e08a1e", "#777777"
WIDE = 20  # an axis from one value to so many times it is logarithmic
MOST_LABELS = 12  # blocks or heads of a map that are numbered


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


# ---- the loss ------------------------------------------------------------------------------------


def plot_losses(lines: Sequence[Line], path: Path, title: str) -> None:
    """Training and validation, in bits per byte over tokens; of pairs their losses."""
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    lines = [line for line in lines if "loss" in line]  # the others say what was left out
    is_text = all("train_bits_per_byte" in line for line in lines)
    key = "validation_bits_per_byte" if is_text else "validation_loss"
    validated = [line for line in lines if key in line]
    train = [line["train_bits_per_byte" if is_text else "loss"] for line in lines]
    axes.plot([line["tokens"] for line in lines], train, color=PALE, linewidth=0.8, label="training")
    if validated:
        values = [line[key] for line in validated]
        label = f"validation ({values[-1]:.3f} at the end)"
        axes.plot([line["tokens"] for line in validated], values, "o-", color=RED, markersize=4, label=label)
    if lines:  # without the fall of the first steps, in which nothing could be seen
        settled = sorted(train)[: max(1, len(train) * 19 // 20)]
        axes.set_ylim(top=settled[-1] * 1.05)
    axes.set(title=title, xlabel="tokens trained on", ylabel="bits per byte" if is_text else "loss")
    axes.xaxis.set_major_formatter(_short_number)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


# ---- the other curves ----------------------------------------------------------------------------


def plot_curves(lines: Sequence[Line], path: Path, title: str, clip_norm: float | None) -> None:
    """Gradient norm, learning rate, speed, and how much of the machine's speed it is, over steps."""
    figure = _figure(9, 6)
    figure.suptitle(title)
    (norms, rates), (speeds, shares) = figure.subplots(2, 2, sharex=True)
    left_out = [line["step"] for line in lines if "left_out" in line]
    lines = [line for line in lines if "loss" in line]
    _plot_norms(norms, lines, left_out, clip_norm)
    _plot_values(rates, lines, "learning_rate", "learning rate", BLUE)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    _plot_values(speeds, lines, "tokens_per_second", "tokens a second", BLUE)
    speeds.yaxis.set_major_formatter(_short_number)
    percent = [100 * line["flops_per_second"] / line["possible_flops_per_second"] for line in lines]
    shares.plot([line["step"] for line in lines], percent, color=ORANGE, linewidth=1)
    shares.set(ylabel="% of the possible FLOP/s", xlabel="step")
    _from_zero(shares, percent)
    speeds.set(xlabel="step")
    for axes in (norms, rates, speeds, shares):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter(_short_number)
    _save(figure, path)


def _plot_norms(axes: Any, lines: Sequence[Line], left_out: Sequence[int], clip_norm: float | None) -> None:
    known = [line for line in lines if line["gradient_norm"]]
    sizes = [line["gradient_norm"] for line in known]
    if sizes and max(sizes) > WIDE * min(sizes):
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    else:
        _from_zero(axes, [*sizes, clip_norm or 0.0])
    axes.plot([line["step"] for line in known], sizes, color=BLUE, linewidth=0.9)
    if clip_norm is not None:
        axes.axhline(clip_norm, color=GREY, linestyle="--", linewidth=0.9, label=f"clipped at {clip_norm:g}")
    for number, step in enumerate(left_out):
        axes.axvline(step, color=RED, linewidth=0.7, alpha=0.6, label="left out" if number == 0 else None)
    axes.set(ylabel="gradient norm")
    if clip_norm is not None or left_out:
        axes.legend(fontsize="small")


def _plot_values(axes: Any, lines: Sequence[Line], key: str, label: str, color: str) -> None:
    axes.plot([line["step"] for line in lines], [line[key] for line in lines], color=color, linewidth=1)
    axes.set(ylabel=label)
    _from_zero(axes, [line[key] for line in lines])


# ---- the heads -----------------------------------------------------------------------------------


def plot_heads(lines: Sequence[Line], path: Path, title: str, num_local: int, seq_len: int) -> None:
    """Bounds, windows and entropies: over steps above, and below by block and head as they are now.

    Args:
        lines: of heads.jsonl, at least one.
        num_local: heads with ALiBi, which come first.
        seq_len: tokens of the longest sequence.
    """
    keys = [key for key in ("bounds", "windows", "entropies") if key in lines[-1]]
    lines = [line for line in lines if all(key in line for key in keys)]
    figure = _figure(4.6 * len(keys), 7.2)
    figure.suptitle(title)
    grid = figure.subplots(2, len(keys), squeeze=False)
    for (over, now), key in zip(grid.T, keys, strict=True):
        if key == "windows":
            _plot_windows(over, lines, num_local, seq_len)
        else:
            _plot_groups(over, lines, key, num_local)
        over.set(xlabel="step", ylabel=UNITS[key], xlim=_with_room(lines))
        over.set_title(TITLES[key], fontsize="medium")
        over.xaxis.set_major_formatter(_short_number)
        over.grid(alpha=0.3)
        _draw_map(figure, now, lines[-1], key, num_local)
    _save(figure, path)


TITLES = {
    "bounds": "bound B of the logits: mean and range", "windows": "certified window: median and range of blocks",
    "entropies": "entropy of attention: mean and range",
}  # fmt: skip
UNITS = {"bounds": "B", "windows": "tokens", "entropies": "nats"}


def _plot_groups(axes: Any, lines: Sequence[Line], key: str, num_local: int) -> None:
    """The mean of the local heads and of the global ones, and between which values all of a group lie."""
    steps = [line["step"] for line in lines]
    groups = {"local": (BLUE, slice(num_local)), "global": (ORANGE, slice(num_local, None))}
    values = {name: [_of_all(line[key], heads) for line in lines] for name, (_, heads) in groups.items()}
    means = {name: [mean(x) for x in found] for name, found in values.items() if found[0]}
    for name, found in means.items():
        color = groups[name][0]
        axes.plot(steps, found, "o-", color=color, markersize=3)
        lowest, highest = [min(x) for x in values[name]], [max(x) for x in values[name]]
        axes.fill_between(steps, lowest, highest, color=color, alpha=0.15, linewidth=0)
        above = found[-1] == max(other[-1] for other in means.values())
        _label_end(axes, steps[-1], found[-1], name, color, "bottom" if above else "top")


def _of_all(blocks: Sequence[Sequence[float]], heads: slice) -> list[float]:
    return [value for block in blocks for value in block[heads]]


def _plot_windows(axes: Any, lines: Sequence[Line], num_local: int, seq_len: int) -> None:
    """A line a local head: the median of its windows in all blocks, and between which they lie."""
    from matplotlib import colormaps

    steps = [line["step"] for line in lines]
    for head in range(num_local):
        # a window that nothing certifies is as long as the rest of the picture
        values = [[block[head] or 2**31 for block in line["windows"]] for line in lines]
        color = colormaps["viridis"](0.9 * head / max(1, num_local - 1))
        axes.plot(steps, [median(x) for x in values], "o-", color=color, markersize=3)
        lowest, highest = [min(x) for x in values], [max(x) for x in values]
        axes.fill_between(steps, lowest, highest, color=color, alpha=0.15, linewidth=0)
        _label_end(axes, steps[-1], median(values[-1]), f"head {head}", color)
    axes.axhline(seq_len, color=GREY, linestyle="--", linewidth=0.9, label=f"sequence, {seq_len:,} tokens")
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis)
    axes.legend(fontsize="small")


def _with_room(lines: Sequence[Line]) -> tuple[float, float]:
    """The steps, and room for names behind them."""
    first, last = lines[0]["step"], lines[-1]["step"]
    span = max(last - first, 1)
    return first - 0.05 * span, last + 0.25 * span


def _label_end(axes: Any, x: float, y: float, text: str, color: Any, va: str = "center") -> None:
    axes.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", va=va, fontsize=8, color=color)


def _draw_map(figure: Any, axes: Any, line: Line, key: str, num_local: int) -> None:
    """Blocks by heads, in colours."""
    from matplotlib.colors import LogNorm

    blocks = [block[:num_local] for block in line[key]] if key == "windows" else line[key]
    blocks = [[float("nan") if x is None else x for x in block] for block in blocks]
    norm = LogNorm() if key == "windows" else None
    image = axes.imshow(blocks, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, label=UNITS[key])
    if norm is not None:
        _plain_ticks(bar.ax.yaxis)
    heads = len(blocks[0])
    if num_local < heads:
        axes.axvline(num_local - 0.5, color="white", linewidth=2)
    axes.set(xlabel="head" if num_local == heads else "head (the local ones left of the line)", ylabel="block")
    axes.set_title(f"at step {line['step']:,}", fontsize="medium")
    axes.set_xticks(_some(heads))
    axes.set_yticks(_some(len(blocks)))


def _some(count: int) -> Iterable[int]:
    return range(0, count, -(-count // MOST_LABELS))


# ---- what they share -----------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())


def _from_zero(axes: Any, values: Sequence[float]) -> None:
    axes.set_ylim(0, max(values, default=0) * 1.15 or 1)


def _plain_ticks(axis: Any) -> None:
    """Of a logarithmic axis: 1, 2, 5, 10, ... in plain figures."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_short_number)


def _short_number(value: float, _: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"
