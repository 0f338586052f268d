"""The loss curve as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from andromeda.atomic import replace_file


def plot_losses(lines: Sequence[dict[str, Any]], path: Path, title: str) -> bool:
    """Draws training and validation, in bits per byte over tokens (of pairs the loss alone).

    False where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines = [line for line in lines if "loss" in line]  # the others say what was left out
    validated = [line for line in lines if "validation_bits_per_byte" in line]
    is_text = all("train_bits_per_byte" in line for line in lines)
    train = [line["train_bits_per_byte" if is_text else "loss"] for line in lines]
    axes.plot([line["tokens"] for line in lines], train, color="#8fa8c8", linewidth=0.8, label="training")
    if validated and is_text:
        values = [line["validation_bits_per_byte"] for line in validated]
        label = f"validation ({values[-1]:.3f} at the end)"
        axes.plot([line["tokens"] for line in validated], values, "o-", color="#c23b22", markersize=4, label=label)
    if lines:  # without the fall of the first steps, in which nothing could be seen
        settled = sorted(train)[: max(1, len(train) * 19 // 20)]
        axes.set_ylim(top=settled[-1] * 1.05)
    axes.set(title=title, xlabel="tokens trained on", ylabel="bits per byte" if is_text else "loss")
    axes.xaxis.set_major_formatter(_short_number)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())
    return True


def _short_number(value: float, _: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"
