"""`andromeda eval`: bits per byte of a text, by context length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from andromeda.commands.output import check_json_path, plain_console, plain_table, read_text, write_json
from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError

if TYPE_CHECKING:
    from rich.table import Table

    from andromeda.evaluation.perplexity import Perplexity

MULTIPLES = (1, 4, 16)  # of the trained length, where no lengths are given


def evaluate(directory: str, *, text: str, lengths: list[int] | None = None, json: str | None = None) -> None:
    """Measures bits per byte of a text at several context lengths.

    The same tokens are scored at each length, in windows of that many tokens, so the lengths compare.

    Args:
        directory: a model directory, or the directory of a training run.
        text: UTF-8 file to predict.
        lengths: tokens of context, as in 512,2048 (default: 1, 4 and 16 times the trained length, as far as the text
            goes).
        json: file to write the figures to.
    """
    check_json_path(json)
    content = read_text(text, f"--text {text}")
    if not content:
        raise AndromedaError(f"--text {text}: is empty; name a file with text")

    import torch

    from andromeda.evaluation.perplexity import count_bytes, score_lengths, scored_tokens
    from andromeda.inference.loading import load_model

    model, tokenizer = load_model(directory)
    ids = tokenizer.encode(content)
    lengths = lengths or default_lengths(model.config, len(ids))
    scored = scored_tokens(len(ids), lengths)
    byte_counts = torch.tensor(count_bytes(tokenizer, ids, content))
    with _progress_bar(scored * len(set(lengths))) as advance:
        result = score_lengths(
            model, torch.tensor(ids), byte_counts, lengths, end_of_text=tokenizer.eos_id, progress=advance
        )
    if json is not None:
        write_json(json, {"model": directory, "text": text, "text_tokens": len(ids), **as_json(result)})
    console = plain_console()
    size = result.lengths[0].bytes
    console.print(f"{scored:,} of {len(ids):,} tokens scored, the same at each length ({size:,} bytes)\n")
    console.print(lengths_table(result))
    console.print("\nBits per byte by position: a token further on sees more of the longer contexts")
    console.print(positions_table(result))


def default_lengths(config: AndromedaConfig, tokens: int) -> list[int]:
    """1, 4 and 16 times the trained length, as far as the model and a text of so many tokens go; 1 at least."""
    multiples = MULTIPLES[:1] if config.use_abs_pos_emb else MULTIPLES
    fitting = [multiple * config.max_seq_len for multiple in multiples if multiple * config.max_seq_len <= tokens]
    return fitting or [config.max_seq_len]


@contextmanager
def _progress_bar(tokens: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while it is a terminal; yields what moves it on."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = plain_console(stderr=True)
    columns = (TextColumn("evaluating"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=tokens)
        yield lambda done: bar.advance(task, done)


# ---- results -------------------------------------------------------------------------------------


def as_json(result: Perplexity) -> dict[str, Any]:
    """The scores with what is derived from them."""
    return {
        "tokens": result.lengths[0].tokens,
        "bytes": result.lengths[0].bytes,
        "lengths": [
            {
                "length": score.length,
                "bits_per_byte": score.bits_per_byte,
                "nats_per_token": score.nats_per_token,
            }
            for score in result.lengths
        ],
        "positions": [asdict(score) for score in result.positions],
    }


def lengths_table(result: Perplexity) -> Table:
    table = plain_table("context, tokens", "bits per byte", "nats per token")
    for score in result.lengths:
        table.add_row(f"{score.length:,}", f"{score.bits_per_byte:.4f}", f"{score.nats_per_token:.4f}")
    return table


def positions_table(result: Perplexity) -> Table:
    """One row a band of positions: the same tokens, with contexts of each length."""
    lengths = [score.length for score in result.lengths]
    longest = f"position in {lengths[-1]:,}"
    table = plain_table(longest, *(f"context {length:,}" for length in lengths))
    for score in result.positions:
        figures = (f"{score.bits_per_byte[length]:.4f}" for length in lengths)
        table.add_row(f"{score.first:,} to {score.last - 1:,}", *figures)
    return table
