"""What `andromeda train` reads: text files as windows of tokens without end, or a build in its order, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from andromeda.checkpoint import run_checkpoints
from andromeda.commands.output import count, plural, warn
from andromeda.data.pairs import PairSequences, load_pairs, split_files
from andromeda.data.store import Store
from andromeda.data.stream import Stream
from andromeda.data.text import Corpus
from andromeda.data.windows import Batch, TokenWindows
from andromeda.errors import AndromedaError
from andromeda.tokenizer import Tokenizer
from andromeda.training.recipe import Recipe
from andromeda.training.state import TrainingState, load_counts
from andromeda.training.steps import ENDLESS, Steps


@dataclass(frozen=True)
class TrainingData:
    """Sequences by number, and how many of them a step takes.

    Attributes:
        key: fingerprint; of a build, the SHA-256 of its manifest.
        batches: (first, count) -> that many sequences.
        described: in a few words.
        num_tokens: of one time through; None: there is no second time.
        pairs: where it trains on such.
    """

    key: str
    steps: Steps
    batches: Callable[[int, int], Batch]
    bytes_per_token: float
    described: str
    num_tokens: int | None
    pairs: PairSequences | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model reads; of pairs half of what a step takes for one."""
        return self.steps.longest // (1 if self.pairs is None else 2)


def text_data(recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer, seq_len: int) -> TrainingData:
    windows = TokenWindows(
        corpus.tokens, seq_len, seed=recipe.seed, end_of_text=tokenizer.eos_id,
        packed_documents=recipe.data.packed_documents,
    )  # fmt: skip
    described = f"{plural(len(corpus.tokens), 'token')} of {corpus.bytes_per_token:.2f} bytes"
    steps = Steps((ENDLESS,), (seq_len,), recipe.batch_size, recipe.accumulate)
    return TrainingData(corpus.key, steps, windows.batch, corpus.bytes_per_token, described, len(corpus.tokens))


def pairs_data(recipe: Recipe, folder: Path, tokenizer: Tokenizer, seq_len: int, state: TrainingState) -> TrainingData:
    """
    Args:
        folder: where their tokens are kept.

    Raises:
        AndromedaError: no pair fits into a sequence, or the run began with others: its reference belongs to those.
    """
    store = load_pairs(recipe.data.pairs_paths, tokenizer, folder)
    key, facts = store.facts["key"], store.facts
    if state.data_key not in ("", key):
        raise AndromedaError(
            f"{recipe.output}: data.pairs={recipe.data.pairs!r} is not what this run began with, and what it is "
            "measured against belongs to that; put it back, or choose another output"
        )
    pairs = _sequences(store, recipe, tokenizer, seq_len)
    described = f"{plural(len(pairs.fitting), 'pair')} in {plural(len(pairs), 'sequence')} of twice {seq_len:,}"
    steps = Steps((ENDLESS,), (2 * seq_len,), recipe.batch_size, recipe.accumulate)
    bytes_per_token = facts["num_bytes"] / facts["num_tokens"]
    return TrainingData(key, steps, pairs.batch, bytes_per_token, described, len(pairs) * steps.longest, pairs)


def validation_files(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Files of text, and, where pairs are trained on, files of pairs. Raises AndromedaError what `split_files` does."""
    paths = recipe.data.validation_paths
    return split_files(paths) if recipe.data.pairs else (paths, [])


def held_out_pairs(
    recipe: Recipe, paths: list[str], folder: Path, tokenizer: Tokenizer, seq_len: int
) -> PairSequences | None:
    """Those that validate; None: there are none. Args: folder: where their tokens are kept."""
    return _sequences(load_pairs(paths, tokenizer, folder), recipe, tokenizer, seq_len) if paths else None


def _sequences(store: Store, recipe: Recipe, tokenizer: Tokenizer, seq_len: int) -> PairSequences:
    """Says how many pairs do not fit. Raises AndromedaError where none does."""
    pairs = PairSequences(store, seq_len, seed=recipe.seed, end_of_text=tokenizer.eos_id)
    if count := len(pairs.too_long):
        first = store.where(2 * int(pairs.too_long[0]))
        warn(f"{plural(count, 'pair')} of {pairs.num_pairs:,}, first {first}: longer than seq_len={seq_len}, left out")
    return pairs


def no_text(recipe: Recipe, seq_len: int) -> TrainingData:
    """Of a recipe whose tasks have examples alone: a step takes no sequence."""

    def none(first: int, count: int) -> Batch:
        raise AssertionError(f"sequences {first} to {first + count - 1} of no text")

    return TrainingData("", Steps((ENDLESS,), (seq_len,), 0, recipe.accumulate), none, 1.0, "no text", None)


def build_data(recipe: Recipe, stream: Stream) -> TrainingData:
    steps = build_steps(recipe, stream)
    sizes = " and ".join(f"{length:,}" for length in dict.fromkeys(steps.lengths))
    tokens = sum(facts["num_tokens"] for facts in stream.manifest["sources"].values())
    described = f"{stream.folder}, {count(tokens)} tokens of {stream.bytes_per_token:.2f} bytes"
    described += f" in {plural(len(stream), 'sequence')} of {sizes}"
    return TrainingData(stream.key, steps, stream.batch, stream.bytes_per_token, described, None)


def build_steps(recipe: Recipe, stream: Stream) -> Steps:
    lengths = tuple(stage.seq_len for stage in stream.mix.stages)
    return Steps(tuple(stream.mix.starts[1:].tolist()), lengths, recipe.batch_size, recipe.accumulate)


def within_build(recipe: Recipe, stream: Stream | None, state: TrainingState) -> Recipe:
    """The recipe with as many steps as a run that stands there will have.

    Raises:
        AndromedaError: it asks for more than the build has.
    """
    if stream is None:
        return recipe
    return recipe.within(state.step + build_steps(recipe, stream).left(state.sequence))


def open_build(recipe: Recipe, check: bool = True) -> Stream | None:
    """The recipe's build; None: it trains on text.

    Args:
        check: every byte of it against its manifest.

    Raises:
        AndromedaError: it is not whole, something in it was changed (the file is named), or the run has trained on
            another build.
    """
    if recipe.data.build is None:
        return None
    stream = Stream(recipe.data.build, check=check)
    for checkpoint in run_checkpoints(Path(recipe.output)):
        try:
            state = load_counts(checkpoint)
        except AndromedaError:  # a damaged checkpoint is dealt with later
            continue
        _check_same(recipe, state, stream)
        break
    return stream


def _check_same(recipe: Recipe, state: TrainingState, stream: Stream) -> None:
    if state.data_key not in ("", stream.key):
        raise AndromedaError(
            f"{recipe.output}: this run trains on the build with the manifest {state.data_key[:12]}, and "
            f"{stream.folder} has {stream.key[:12]}; name that build, or choose another output"
        )


def check_text_key(state: TrainingState, data: TrainingData) -> None:
    """Says where the text files of a run have changed: windows of other text are as good."""
    if state.data_key not in ("", data.key):
        warn("the training data is not what this run began with; it goes on with what is there now")
