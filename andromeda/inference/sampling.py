"""Which token comes next: from logits to ids.

Steps and conventions are those of Hugging Face's `generate`, in its order: bias, penalties, temperature, top-k, top-p,
min-p, each over what the one before it left. (vLLM has the same steps, but min-p before top-k.) Chance is one uniform
number a token, from a generator on the CPU: the same seed writes the same text on any device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

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
        frequency_penalty, presence_penalty: taken from a token's logit for each time that it was generated, and once
            if it was (as vLLM and OpenAI, the prompt not counted); -2 to 2, 0 leaves them as they are.
        logit_bias: added to the logits of these ids, before all else; -100 to 100.

    Raises:
        AndromedaError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self._require(0 <= self.temperature < math.inf, "temperature", "must be 0 (greedy) or more")
        self._require(isinstance(self.top_k, int) and self.top_k >= 0, "top_k", "must be a count, or 0 for all")
        self._require(0 < self.top_p <= 1, "top_p", "must lie in (0, 1]")
        self._require(0 <= self.min_p <= 1, "min_p", "must lie in [0, 1]")
        self._require(0 < self.repetition_penalty < math.inf, "repetition_penalty", "must be more than 0")
        for name in ("frequency_penalty", "presence_penalty"):
            self._require(-2 <= getattr(self, name) <= 2, name, "must lie between -2 and 2")
        bias = self.logit_bias
        self._require(
            all(isinstance(token, int) and token >= 0 for token in bias), "logit_bias", "must be of token ids"
        )
        self._require(all(-100 <= value <= 100 for value in bias.values()), "logit_bias", "must lie in -100 to 100")

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise AndromedaError(f"sampling: {name}={getattr(self, name)!r} {what}")

    def check(self, num_tokens: int) -> None:
        """Raises AndromedaError for a bias of an id that is none of so many tokens."""
        worst = max(self.logit_bias, default=0)
        if worst >= num_tokens:
            raise AndromedaError(f"sampling: logit_bias has token id {worst}, but there are only {num_tokens} tokens")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalises(self) -> bool:
        """Whether `sample` needs to know which tokens occurred."""
        return self.repetition_penalty != 1 or self.counts

    @property
    def counts(self) -> bool:
        """Whether `sample` needs to know how often each token was generated."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class History:
    """Which tokens occurred in texts of B rows.

    Attributes:
        seen: (B, num_tokens) booleans, in the prompt or since.
        counts: (B, num_tokens) float32, how often each was generated.
    """

    seen: Tensor
    counts: Tensor

    @classmethod
    def of(cls, prompts: Tensor, num_tokens: int) -> History:
        """Nothing generated yet after prompts of ids (B, T)."""
        seen = torch.zeros(len(prompts), num_tokens, dtype=torch.bool, device=prompts.device)
        return cls(seen.scatter_(1, prompts, True), torch.zeros_like(seen, dtype=torch.float32))

    def record(self, ids: Tensor) -> None:
        """One more token of each row was generated, (B,)."""
        self.seen.scatter_(1, ids[:, None], True)
        self.counts.scatter_add_(1, ids[:, None], torch.ones_like(self.counts[:, :1]))

    def below(self, vocab_size: int | None) -> History:
        """That of ids below it alone, a view."""
        return History(self.seen[:, :vocab_size], self.counts[:, :vocab_size])


def sample(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None, history: History | None = None
) -> Tensor:
    """Draws the next token of each row.

    Args:
        logits: (B, num_tokens), in any float type; -inf forbids a token.
        generator: the source of chance, on the CPU; None: torch's own.
        history: which tokens occurred; needed only where `sampling.penalises`.

    Returns:
        (B,) int64 ids.

    Raises:
        AndromedaError: NaN or infinity among the logits, or a row that forbids every token.
    """
    uniform = None
    if not sampling.greedy:
        uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64).to(logits.device)
    ids = choose(logits, sampling, uniform, history)
    if bool((ids < 0).any()):
        row = int((ids < 0).nonzero()[0])
        raise AndromedaError(f"sampling: {why_none(logits[row], f'row {row}')}")
    return ids


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor | None = None, history: History | None = None) -> Tensor:
    """As `sample`, given the chance, and without waiting for the device.

    Args:
        uniform: (B,) float64 in [0, 1), one a row; needed only where not `sampling.greedy`.

    Returns:
        (B,) int64 ids; -1 where `why_none` says why there is none.
    """
    logits = _penalised(logits.float(), sampling, history)
    top = logits.amax(-1)  # NaN or infinite if anything is wrong
    if sampling.greedy:
        ids = _argmax(logits)
    else:
        assert uniform is not None
        ids = _draw(_filtered(logits - top[:, None], sampling).softmax(-1), uniform)
    return torch.where(top.isfinite(), ids, -1)


def _argmax(logits: Tensor) -> Tensor:
    """(B, num_tokens) -> (B,). On a CPU numpy's takes a tenth of the time."""
    return torch.from_numpy(logits.detach().numpy().argmax(-1)) if logits.is_cpu else logits.argmax(-1)


def why_none(logits: Tensor, row: str) -> str:
    """Why `choose` found no token in a row, whose logits (num_tokens,) these are, in words."""
    if logits.amax().item() == -math.inf:
        return f"every token of {row} is forbidden (logits of -inf); nothing can be drawn"
    return (
        f"{row} of the model's logits holds NaN or infinity; the weights are damaged, or this precision is too narrow "
        "for them: try another checkpoint, or float32"
    )


def probabilities(logits: Tensor, sampling: Sampling, history: History | None = None) -> Tensor:
    """(B, num_tokens) float32: the distribution that `sample` draws from, for the same arguments."""
    logits = _penalised(logits.float(), sampling, history)
    if sampling.greedy:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    return _filtered(logits - logits.amax(-1, keepdim=True), sampling).softmax(-1)


def _penalised(logits: Tensor, sampling: Sampling, history: History | None) -> Tensor:
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
        bias = torch.tensor(list(sampling.logit_bias.values()), dtype=logits.dtype, device=logits.device)
        logits = logits.index_add(1, ids, bias.expand(len(logits), -1))
    if not sampling.penalises:
        return logits
    if history is None:
        raise ValueError("sample: penalties need the history")
    penalty = sampling.repetition_penalty
    if penalty != 1:
        logits = torch.where(history.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.counts:
        counts = history.counts
        logits = logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
    return logits


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
        beyond = p.cumsum(-1) - p >= sampling.top_p  # what is more probable suffices
        beyond[:, 0] = False  # though float32 may take top_p for 0
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter_(1, order, beyond), -torch.inf)
    if sampling.min_p > 0:
        logits = logits.masked_fill(logits < math.log(sampling.min_p), -torch.inf)
    return logits


def _draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """(B, num_tokens) -> (B,) ids, where one uniform number a row falls on the cumulative sum.

    On a CPU a sixth of torch.multinomial's time or less, which draws a number for every token.
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    # In (0, total]: the first sum to reach it exists, and is a token's of probability more than 0.
    target = (1 - uniform[:, None]) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target)[:, 0]
