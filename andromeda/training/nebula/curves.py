"""The curves of tasks, in words and as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from andromeda.atomic import replace_file

TRAINING, VALIDATION, WEIGHT = "#8fa8c8", "#c23b22", "#777777"
MEASURES = ("accuracy", "error")


def describe_tasks(values: dict[str, Any]) -> dict[str, str]:
    """The figures of each task in a line of metrics, such as {"tool": "loss 0.231, accuracy 0.912, weight 0.5"}."""
    tasks: dict[str, list[str]] = {}
    for key, value in values.items():
        name, slash, figure = key.partition("/")
        if slash:
            tasks.setdefault(name, []).append(f"{figure.replace('_', ' ')} {value:.3g}")
    return {name: ", ".join(figures) for name, figures in tasks.items()}


def plot_tasks(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws a panel a task, over steps: its loss, its weight, and what was validated of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [line for line in lines if "loss" in line]  # the others say what was left out
    names = list(dict.fromkeys(key.partition("/")[0] for line in lines for key in line if "/" in key))
    figure = Figure(figsize=(7, 0.8 + 2.6 * max(1, len(names))), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(max(1, len(names)), squeeze=False)[:, 0], names, strict=False):
        _panel(axes, lines, name)
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())


def _panel(axes: Any, lines: Sequence[dict[str, Any]], name: str) -> None:
    def draw(on: Any, key: str, label: str, *style: str, **keys: Any) -> None:
        drawn = [(line["step"], line[key]) for line in lines if key in line]
        if drawn:
            label += f" ({drawn[-1][1]:.3g} at the end)"
            on.plot(*zip(*drawn, strict=True), *style, label=label, **keys)

    draw(axes, f"{name}/loss", "loss", color=TRAINING, linewidth=0.8)
    draw(axes, f"{name}/weight", "weight", color=WEIGHT, linewidth=0.8, linestyle=":")
    axes.set(title=name, xlabel="step", ylabel="loss, weight")
    axes.grid(alpha=0.3)
    other = axes.twinx()
    of_text = not any(f"{name}/{measure}" in line for line in lines for measure in MEASURES)
    for key in ["validation_bits_per_byte"] if of_text else [f"{name}/validation_{measure}" for measure in MEASURES]:
        label = key.removeprefix(f"{name}/").replace("_", " ")
        draw(other, key, label, "o-", color=VALIDATION, markersize=3)
    handles = [handle for part in (axes, other) for handle in part.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, fontsize="small")
