"""Where tokens are: ALiBi slopes, rotary rates and xPos decay, bounds on the logits, and the windows they certify."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from andromeda.config import AndromedaConfig
from andromeda.kernels import Rotary

NO_WINDOW = 2**31 - 1  # tokens; a head that reaches everywhere, in an int32 too


def alibi_slopes(num_heads: int) -> list[float]:
    """Slopes m_h of `num_heads` ALiBi heads: a geometric sequence from 2^(-8/n) (Press et al. 2022, section 3).

    For n not a power of two: those of the largest power of two p below n, then every other one of 2p's.
    """
    if num_heads == 0:
        return []
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-4 * (i + 1) / power) for i in range(0, 2 * (num_heads - power), 2)]


def head_slopes(config: AndromedaConfig) -> list[float]:
    """One slope a query head; 0 for a head without ALiBi."""
    return alibi_slopes(config.num_local_heads) + [0.0] * (config.heads - config.num_local_heads)


def rotary(config: AndromedaConfig) -> Rotary | None:
    """Rates and decay of the rotated heads (Su et al. 2021; xPos: Sun et al. 2022, table 1), or None if none is."""
    if config.num_rotated_heads == 0:
        return None
    return Rotary(
        heads=config.num_rotated_heads,
        pairs=config.dim_head // 2,
        base=config.rotary_base,
        interpolation=config.position_interpolation,
        xpos_scale=config.xpos_scale if config.rotary_xpos else None,
    )


def log_n_temperature(positions: Tensor, max_seq_len: int) -> Tensor:
    """Factor on a global head's logits for queries at `positions`: max(1, ln(i + 1) / ln(max_seq_len)).

    Scalable softmax (Nakanishi 2025) that leaves training lengths as they are.
    """
    return (torch.log(positions.double() + 1) / math.log(max_seq_len)).clamp(min=1.0)


def logit_bounds(q_gain: Tensor, k_gain: Tensor, temperature: float) -> Tensor:
    """B_h such that |logit| <= B_h for unit q and k times these gains, whatever the rotation.

    Rotation mixes the two channels (p, p + dim_head/2) of a pair, so the pair's largest gains bound it:
    B_h = tau * max_p(max gain of q in pair p * max gain of k in pair p).

    Args:
        q_gain: (heads, dim_head). k_gain: (kv_heads, dim_head). temperature: tau.

    Returns:
        (heads,), in the gains' dtype, detached.
    """
    heads, dim_head = q_gain.shape
    if dim_head % 2:  # never rotated
        q_pair, k_pair = q_gain.detach().abs(), k_gain.detach().abs()
    else:
        q_pair = q_gain.detach().abs().view(heads, 2, dim_head // 2).amax(1)
        k_pair = k_gain.detach().abs().view(k_gain.shape[0], 2, dim_head // 2).amax(1)
    return temperature * (q_pair * k_pair.repeat_interleave(heads // k_gain.shape[0], 0)).amax(1)


def certified_windows(bounds: Tensor, slopes: Tensor, epsilon: float) -> Tensor:
    """Tokens each head must see, itself included, so that the softmax mass it leaves out is at most epsilon.

    With |q.k| <= B the mass at distances of w and more is at most e^(2B - m*w), hence w >= (2B - ln(epsilon)) / m.
    See docs/attention.md for the proof.

    Args:
        bounds, slopes: (heads,); a slope of 0 is a head that reaches everywhere.

    Returns:
        (heads,) int64 on the bounds' device, computed without a host synchronisation.
    """
    slope = slopes.double().clamp(min=1e-30)
    reach = (2 * bounds.double() - math.log(epsilon)) / slope
    everywhere = (slopes == 0) | (reach >= NO_WINDOW)
    return torch.where(everywhere, NO_WINDOW, reach.ceil().clamp(min=1, max=NO_WINDOW)).to(torch.int64)


def initial_windows(config: AndromedaConfig) -> Sequence[float]:
    """Each head's window, tokens, while all gains are 1; infinite for heads that reach everywhere."""
    if not config.has_windows:
        return [math.inf] * config.heads
    slopes = torch.tensor(head_slopes(config), dtype=torch.float64)
    bounds = torch.full_like(slopes, config.qk_temperature)
    return in_tokens(certified_windows(bounds, slopes, config.window_epsilon))


def in_tokens(windows: Tensor) -> list[float]:
    """Certified windows as numbers, infinite for heads that reach everywhere."""
    return [math.inf if window == NO_WINDOW else window for window in windows.tolist()]
