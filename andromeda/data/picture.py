"""What a build holds as a picture: tokens by stage and source, lengths of documents, what was left out."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from andromeda.atomic import replace_file
from andromeda.data.build import PICTURE
from andromeda.data.stream import Stream

STEPS = 8  # of lengths, from one to twice as much
ROW = 0.34  # inches of a bar
REASONS = {
    "duplicate": "#7a5195", "near-duplicate": "#bc5090", "evaluation text": "#ef5675", "repetition": "#ff764a",
    "gopher": "#ffa600", "c4": "#ffd380", "English": "#8a9a5b", "unread": "#555555",
}  # fmt: skip
OTHER = "#a8a8a8"


def draw(stream: Stream) -> bool:
    """Writes report.png into the build; False where matplotlib is not installed.

    Raises:
        OSError: it cannot be written.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    names = list(stream.stores)
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    colours = {name: palette(number % palette.N) for number, name in enumerate(names)}
    rows = len(stream.mix.stages), 8, len(names)
    figure = Figure(figsize=(9, 3.2 + ROW * sum(rows)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    heights = [1.2 + ROW * number for number in rows]
    stages, lengths, left_out = figure.subplots(3, 1, gridspec_kw={"height_ratios": heights})
    _stages(stages, stream, colours)
    _lengths(lengths, stream, colours)
    _left_out(left_out, stream)
    handles, labels = stages.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(names)), frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    replace_file(stream.folder / PICTURE, picture.getvalue())
    return True


def _stages(axes: Any, stream: Stream, colours: dict[str, Any]) -> None:
    """A bar for each stage, of the tokens that training reads of each source."""
    seq_lens = np.array([stage.seq_len for stage in stream.mix.stages])
    tokens = stream.mix.counts * seq_lens[:, None]  # (stages, sources)
    places, begun = np.arange(len(seq_lens)), np.zeros(len(seq_lens))
    for name, colour in colours.items():
        own = tokens[:, stream.mix.sources.index(name)] if name in stream.mix.sources else np.zeros(len(seq_lens))
        axes.barh(places, own, left=begun, color=colour, label=name, height=0.7)
        begun = begun + own
    names = [stage.name.replace("$", r"\$") for stage in stream.mix.stages]  # between two of them a formula stands
    axes.set_yticks(
        places, [f"{name} ({stage.seq_len:,})" for name, stage in zip(names, stream.mix.stages, strict=True)]
    )
    axes.set_title(
        "Tokens that training reads, padding too, by stage (tokens a sequence) and source", loc="left", fontsize=10
    )
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(_short_number)
    _quiet(axes, "x")


def _lengths(axes: Any, stream: Stream, colours: dict[str, Any]) -> None:
    """A line for each source, of how much of it lies in documents up to a length; dotted, where sequences cut."""
    for name, store in stream.stores.items():
        borders, shares = shares_up_to(store.lengths)
        axes.plot(borders, shares, color=colours[name], linewidth=1.8)
    for seq_len in sorted({stage.seq_len for stage in stream.mix.stages}):
        axes.axvline(seq_len, color="black", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_title(
        "Share of a source's tokens in documents of at most so many tokens; dotted: a sequence", loc="left", fontsize=10
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(0, 1.02)
    _quiet(axes, "both")


def shares_up_to(lengths: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N,) lengths of documents, 1 or more -> (B,) rising lengths and the share of all tokens in documents below each.

    Lengths are STEPS an octave, the first below the shortest document and the last above the longest.
    """
    if not len(lengths):
        return np.zeros(0), np.zeros(0)
    steps = np.floor(np.log2(lengths) * STEPS).astype(np.int64)
    first = int(steps.min())
    tokens = np.concatenate([[0.0], np.cumsum(np.bincount(steps - first, weights=lengths))])
    return 2.0 ** (np.arange(first, first + len(tokens)) / STEPS), tokens / tokens[-1]


def _left_out(axes: Any, stream: Stream) -> None:
    """A bar for each source: the share of its documents that is not there, by reason."""
    names = list(stream.stores)
    groups = {name: reason_groups(store.facts) for name, store in stream.stores.items()}
    totals = {name: sum(groups[name].values()) + stream.stores[name].facts["num_documents"] for name in names}
    most = max(sum(groups[name].values()) / max(1, totals[name]) for name in names)
    places, begun = np.arange(len(names)), np.zeros(len(names))
    for reason in sorted({reason for group in groups.values() for reason in group}, key=_rank):
        shares = np.array([groups[name][reason] / max(1, totals[name]) for name in names])
        axes.barh(places, shares, left=begun, color=REASONS.get(reason, OTHER), label=reason, height=0.7)
        begun = begun + shares
    for place, name in enumerate(names):
        note = f"{begun[place]:.1%} of {totals[name]:,}" if begun[place] else f"none of {totals[name]:,}"
        axes.annotate(note, (begun[place], place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, names)
    axes.set_xlim(0, max(0.01, most * 1.25))
    axes.set_ylim(-0.5, len(names) - 0.5)  # where no bar sets it
    axes.set_title("Documents left out, by source and reason", loc="left", fontsize=10)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    _quiet(axes, "x")
    if most:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, fontsize=8, frameon=False)


def reason_groups(facts: dict[str, Any]) -> Counter[str]:
    """Documents of a source that are not there by kind of reason: `gopher: words` is gopher, all that is unread one."""
    groups = Counter({"unread": sum(facts["unread"].values())}) if facts["unread"] else Counter[str]()
    for reason, number in facts["removed"].items():
        groups[reason.partition(":")[0]] += number
    return groups


def _rank(reason: str) -> tuple[int, str]:
    known = list(REASONS)
    return known.index(reason) if reason in known else len(known), reason


def _quiet(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _short_number(value: float, _: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
