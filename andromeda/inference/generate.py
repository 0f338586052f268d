"""The loop over tokens: read the prompt in chunks, then draw a token and read it back, again and again.

With a cache each token is read once. Without one everything is read again for each token: slow, and the oracle that
the cache is tested against.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from andromeda.cache import Cache
from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError
from andromeda.inference.sampling import History, Sampling, sample
from andromeda.model import Andromeda, check_range

PREFILL_BYTES = 256 * 2**20  # activations that a chunk of the prompt may take, about


class Context:
    """What a model has read of one text, for a later `generate` to go on from.

    Attributes:
        ids: the text's token ids; the cache holds the first cache.length of them.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.cache = Cache()

    def restart(self, ids: Sequence[int]) -> None:
        """Makes `ids` the text, and keeps the cache if they go on from what it holds."""
        held = self.cache.length
        if held >= len(ids) or self.ids[:held] != list(ids[:held]):  # one token at least is to be read
            self.cache = Cache()
        self.ids = list(ids)


def generate(
    model: Andromeda,
    ids: Sequence[int],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
    vocab_size: int | None = None,
    prefill_chunk: int | None = None,
    use_cache: bool = True,
    context: Context | None = None,
) -> Iterator[int]:
    """Continues a prompt, yielding each token as soon as it is drawn.

    Args:
        ids: the prompt, at least one token.
        max_new_tokens: fewer come where a stop id ends the text, or learned positions do.
        sampling: how to draw; None: from the model's own distribution.
        stop_ids: any of these ends the text, and is the last token yielded.
        seed: of the draws, 0 to 2^63 - 1; None: torch's own generator.
        vocab_size: draw ids below it alone, for a tokenizer that has fewer than the model; None: any.
        prefill_chunk: tokens of the prompt to read at once; None: as many as fit in PREFILL_BYTES.
        use_cache: False reads everything again for each token.
        context: what earlier calls with this model read; it is extended.

    Raises:
        AndromedaError: at once for an argument out of range; while iterating, for logits that are not numbers.
    """
    _check(model.config, [ids], max_new_tokens, seed, prefill_chunk)
    context = Context() if context is None else context
    context.restart(ids)
    draws = _draw_rows(
        model, torch.tensor([context.ids]), context.cache if use_cache else None,
        max_new_tokens, sampling or Sampling(), seed, vocab_size, prefill_chunk,
    )  # fmt: skip
    return _until_stop(draws, stop_ids, context)


def _until_stop(draws: Iterator[Tensor], stop_ids: Collection[int], context: Context) -> Iterator[int]:
    for drawn in draws:
        token = int(drawn)
        context.ids.append(token)
        yield token
        if token in stop_ids:
            return


def generate_batch(
    model: Andromeda,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int = 1,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
    vocab_size: int | None = None,
    prefill_chunk: int | None = None,
) -> list[list[int]]:
    """Continues prompts of equal length side by side, each `samples` times; a prompt is read once for all its samples.

    Arguments as in `generate`. The draws share one generator, so with a seed they depend on the batch.

    Returns:
        len(prompts) * samples continuations, those of the first prompt first, each up to its stop id.

    Raises:
        AndromedaError: prompts of unequal length, an argument out of range, or logits that are not numbers.
    """
    _check(model.config, prompts, max_new_tokens, seed, prefill_chunk)
    if samples < 1 or len({len(ids) for ids in prompts}) != 1:
        raise AndromedaError("generate: a batch needs at least one sample of at least one prompt, all of equal length")
    ids, cache = torch.tensor(prompts, device=model.output_weight.device), Cache()
    if ids.shape[1] > 1:
        _read(model, ids[:, :-1], cache, prefill_chunk)
        cache.expand(samples)
    ids = ids.repeat_interleave(samples, 0)
    texts: list[list[int]] = [[] for _ in ids]
    open_rows = set(range(len(texts)))
    sampling = sampling or Sampling()
    for drawn in _draw_rows(model, ids, cache, max_new_tokens, sampling, seed, vocab_size, prefill_chunk):
        for row, token in enumerate(drawn.tolist()):
            if row in open_rows:
                texts[row].append(token)
                if token in stop_ids:
                    open_rows.remove(row)
        if not open_rows:
            break
    return texts


@torch.inference_mode()
def _draw_rows(
    model: Andromeda,
    ids: Tensor,
    cache: Cache | None,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None,
    vocab_size: int | None,
    prefill_chunk: int | None,
) -> Iterator[Tensor]:
    """Yields (B,) ids at a time, which continue `ids` (B, T); the cache holds the first of these already."""
    weight, config = model.output_weight, model.config
    ids = ids.to(weight.device)
    sampling.check(vocab_size or config.num_tokens)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    history = History.of(ids, config.num_tokens) if sampling.penalises else None
    if config.use_abs_pos_emb:
        max_new_tokens = min(max_new_tokens, config.max_seq_len + 1 - ids.shape[1])  # the last one is not read
    for _ in range(max_new_tokens):
        logits = model.logits(_read(model, ids, cache, prefill_chunk))[:, :vocab_size]
        drawn = sample(logits, sampling, generator, None if history is None else history.below(vocab_size))
        yield drawn
        ids = torch.cat([ids, drawn[:, None]], dim=1)
        if history is not None:
            history.record(drawn)


@torch.inference_mode()
def _read(model: Andromeda, ids: Tensor, cache: Cache | None, prefill_chunk: int | None) -> Tensor:
    """Reads what the cache does not hold of `ids` (B, T), without one all; the last token's hidden state, (B, dim)."""
    if cache is None:
        return model.hidden(ids)[:, -1]
    chunk = prefill_chunk or default_prefill_chunk(model.config, len(ids), model.output_weight.element_size())
    for piece in ids[:, cache.length :].split(chunk, dim=1):
        hidden = model.hidden(piece, cache=cache)
    return hidden[:, -1]


def default_prefill_chunk(config: AndromedaConfig, batch: int = 1, bytes_per_element: int = 4) -> int:
    """Tokens of each row whose activations, at the widest moment of a block, take about PREFILL_BYTES."""
    width = (4 + 2 * config.ff_mult) * config.dim + 4 * config.heads * config.dim_head
    return max(1, PREFILL_BYTES // (width * batch * bytes_per_element))


def _check(
    config: AndromedaConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seed: int | None,
    prefill_chunk: int | None,
) -> None:
    """On the host, where a wrong id costs a clear line and not a device-side assertion."""
    for ids in prompts:
        if not ids:
            raise AndromedaError("generate: the prompt is empty; give at least one token")
        check_range(config, min(ids), max(ids))
        if config.use_abs_pos_emb and len(ids) > config.max_seq_len:
            raise AndromedaError(
                f"generate: the prompt has {len(ids)} tokens, but with use_abs_pos_emb=True "
                f"max_seq_len={config.max_seq_len} is a hard limit; shorten it"
            )
    if max_new_tokens < 0:
        raise AndromedaError(f"generate: max_new_tokens={max_new_tokens} must be 0 or more")
    if seed is not None and not 0 <= seed < 2**63:
        raise AndromedaError(f"generate: seed={seed} must lie between 0 and 2^63 - 1")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise AndromedaError(f"generate: prefill_chunk={prefill_chunk} must be at least 1")
