"""Which token comes next: from logits to ids.

Steps and conventions are those of Hugging Face's `generate`, in its order: repetition penalty, temperature, top-k,
top-p, min-p, each over what the one before it left. (vLLM has the same steps, but min-p before top-k.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from andromeda.errors import AndromedaError

GREEDY_BELOW = 1e-5  # a temperature below it is 0, as in vLLM: the softmax would be one-hot anyway


@dataclass(frozen=True)
class Sampling:
    """How to draw a token. The defaults draw from the model's own distribution.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token (greedy).
        top_k: keep the k most probable tokens, and those as probable as the k-th; 0 keeps all.
        top_p: keep the fewest most probable tokens whose probabilities sum to top_p or more (Holtzman et al. 2020).
        min_p: keep tokens at least min_p times as probable as the most probable one (Nguyen et al. 2024).
        repetition_penalty: tokens that already occurred, in the prompt or since, have a positive logit divided by it
            and a negative one multiplied (Keskar et al. 2019, section 4.1); 1 leaves them as they are.

    Raises:
        AndromedaError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        self._require(0 <= self.temperature < math.inf, "temperature", "must be 0 (greedy) or more")
        self._require(isinstance(self.top_k, int) and self.top_k >= 0, "top_k", "must be a count, or 0 for all")
        self._require(0 < self.top_p <= 1, "top_p", "must lie in (0, 1]")
        self._require(0 <= self.min_p <= 1, "min_p", "must lie in [0, 1]")
        self._require(0 < self.repetition_penalty < math.inf, "repetition_penalty", "must be more than 0")

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise AndromedaError(f"sampling: {name}={getattr(self, name)!r} {what}")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalises(self) -> bool:
        """Whether `sample` needs to know which tokens occurred."""
        return self.repetition_penalty != 1


GREEDY = Sampling(temperature=0.0)


def sample(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None, seen: Tensor | None = None
) -> Tensor:
    """Draws the next token of each row.

    Args:
        logits: (B, num_tokens), in any float type; -inf forbids a token.
        generator: the source of chance, on the logits' device; None: torch's own.
        seen: (B, num_tokens) booleans, which tokens occurred; needed only where `sampling.penalises`.

    Returns:
        (B,) int64 ids.

    Raises:
        AndromedaError: NaN or infinity among the logits, or a row that forbids every token.
    """
    logits = _penalised(logits.float(), sampling, seen)
    top = logits.amax(-1, keepdim=True)  # NaN or infinite if anything is wrong
    if not bool(top.isfinite().all()):
        _raise_for(top)
    if sampling.greedy:
        return logits.argmax(-1)
    return _draw(_filtered(logits - top, sampling).softmax(-1), generator)


def probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """(B, num_tokens) float32: the distribution that `sample` draws from, for the same arguments."""
    logits = _penalised(logits.float(), sampling, seen)
    if sampling.greedy:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    return _filtered(logits - logits.amax(-1, keepdim=True), sampling).softmax(-1)


def _penalised(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    if not sampling.penalises:
        return logits
    if seen is None:
        raise ValueError("sample: a repetition penalty needs `seen`")
    penalty = sampling.repetition_penalty
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits with a maximum of 0 -> the same at the temperature, -inf where left out; the maximum stays."""
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        p = ranked.softmax(-1)
        beyond = p.cumsum(-1) - p >= sampling.top_p  # what is more probable suffices; never so for the first
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter_(1, order, beyond), -torch.inf)
    if sampling.min_p > 0:
        logits = logits.masked_fill(logits < math.log(sampling.min_p), -torch.inf)
    return logits


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B, num_tokens) -> (B,) ids, where one uniform number a row falls on the cumulative sum.

    On a CPU a sixth of torch.multinomial's time or less, which draws a number for every token.
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    uniform = torch.rand(len(cumulative), 1, generator=generator, dtype=torch.float64, device=cumulative.device)
    # In (0, total]: the first sum to reach it exists, and is a token's of probability more than 0.
    target = (1 - uniform) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target)[:, 0]


def _raise_for(top: Tensor) -> None:
    row = int((~top[:, 0].isfinite()).nonzero()[0])
    if top[row].item() == -math.inf:
        raise AndromedaError(f"sampling: every token of row {row} is forbidden (logits of -inf); nothing can be drawn")
    raise AndromedaError(
        f"sampling: row {row} of the model's logits holds NaN or infinity; the weights are damaged, or this precision "
        "is too narrow for them: try another checkpoint, or float32"
    )
