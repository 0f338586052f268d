"""A model goes on with tokens added to its vocabulary: rows of the embedding and of the logits for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError
from andromeda.training.recipe import NUM_TOKENS_MULTIPLE

TABLES = ("embedding.weight", "to_logits.weight")  # (num_tokens, dim)


def with_room(config: AndromedaConfig, vocab_size: int | None) -> AndromedaConfig:
    """The config with rows for so many tokens; None: for those that it has."""
    if vocab_size is None or vocab_size <= config.num_tokens:
        return config
    return replace(config, num_tokens=-(-vocab_size // NUM_TOKENS_MULTIPLE) * NUM_TOKENS_MULTIPLE)


def with_new_tokens(weights: Mapping[str, Tensor], known: int, vocab_size: int, num_tokens: int) -> dict[str, Tensor]:
    """A model's weights with `num_tokens` rows. A new token begins as the mean of those that were trained.

    So it is as likely as any, and near what the model can read (Hewitt 2021, "Initializing new word embeddings").

    Args:
        known: tokens that were trained; rows behind them that the model has are spare.
        vocab_size: tokens with the new ones.

    Raises:
        AndromedaError: the model's embedding is no table of its tokens.
    """
    grown = dict(weights)
    if vocab_size == known:
        return grown
    if TABLES[0] not in weights:
        raise AndromedaError("recipe: the model of model.from has an embedding of its own, which takes no new tokens")
    for name in TABLES:
        if name not in weights:  # tied
            continue
        old = weights[name]
        mean = old[:known].double().mean(0).to(old.dtype)
        table = mean.repeat(num_tokens, 1)
        table[:known] = old[:known]
        table[vocab_size : len(old)] = old[vocab_size:]
        grown[name] = table
    return grown
