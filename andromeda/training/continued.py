"""Going on from a model at another length: what of its config a recipe may change, and what stays as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError

# Position interpolation: Chen et al. 2023, arXiv:2306.15595. A raised base: Rozière et al. 2023, arXiv:2308.12950.
KEYS = ("max_seq_len", "position_interpolation", "rotary_base")


def continued(config: AndromedaConfig, keys: Mapping[str, Any]) -> AndromedaConfig:
    """The config of a model that goes on with some of `KEYS` changed; its weights serve as they are.

    xPos decays as it was trained to: over as many tokens as before, where the config leaves that to its max_seq_len.
    Windows follow from the weights, and so stay; global heads are sharpened beyond the new length alone.

    Raises:
        AndromedaError: a value out of range, or another length of a model that has a weight for each position.
    """
    longer = AndromedaConfig.from_dict(config.to_dict() | dict(keys))
    if longer.max_seq_len == config.max_seq_len:
        return longer
    if config.use_abs_pos_emb:
        raise AndromedaError(
            f"recipe: model.max_seq_len={longer.max_seq_len} needs a weight for each position (use_abs_pos_emb), and "
            f"the model of model.from has {config.max_seq_len}; leave it out"
        )
    return replace(longer, xpos_scale_base=config.xpos_scale) if config.rotary_xpos else longer
