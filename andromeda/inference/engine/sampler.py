"""From logits to tokens, for many requests at once: each draws by its own chance, from its own history.

The k-th token of a request is drawn by the k-th uniform number of its seed, whatever else is in the batch, and whether
it was drafted or not. So drafts need no rejection sampling: each position is drawn from the model's distribution there,
and drafts are right as long as they are what was drawn. The text is the one without drafts, at any temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from andromeda.inference.engine.request import Request, Token
from andromeda.inference.sampling import History, Sampling, choose

AT_ONCE = 32  # uniform numbers that are made ahead


class Draws:
    """What the draws of one request have been, and what its next ones need."""

    def __init__(self, request: Request, vocab_size: int, device: torch.device) -> None:
        self.request = request
        self.history: History | None = None
        self._uniforms: list[float] = []
        self._generator: torch.Generator | None = None
        if request.sampling.penalises:
            prompt = torch.tensor(
                [[token for token in request.ids if token < vocab_size]], dtype=torch.int64, device=device
            )
            self.history = History.of(prompt, vocab_size)
        if not request.sampling.greedy:
            self._generator = torch.Generator()
            if request.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(request.seed)

    def uniform(self, index: int) -> float:
        """In [0, 1), by which the token of this index is drawn, the first new one's being 0."""
        while index >= len(self._uniforms):
            more = torch.rand(AT_ONCE, generator=self._generator, dtype=torch.float64)
            self._uniforms += more.tolist()
        return self._uniforms[index]

    def record(self, ids: Sequence[int]) -> None:
        """These were drawn."""
        if self.history is not None:
            for token in ids:
                self.history.record(torch.tensor([token], device=self.history.seen.device))

    def history_with(self, drafts: Sequence[int]) -> History:
        """Were these drawn, too."""
        assert self.history is not None
        if not drafts:
            return self.history
        supposed = History(self.history.seen.clone(), self.history.counts.clone())
        for token in drafts:
            supposed.record(torch.tensor([token], device=supposed.seen.device))
        return supposed


@dataclass(frozen=True)
class Asking:
    """A token that asks for the next one.

    Attributes:
        index: of the next one, the first new token of the request being 0.
        drafts: between the last token that was drawn and this one, itself included.
    """

    draws: Draws
    index: int
    drafts: Sequence[int]


@torch.inference_mode()
def draw(asking: Sequence[Asking], logits: Tensor, masks: Tensor | None) -> list[int]:
    """The next token of each, or -1 where `sampling.why_none` says why there is none.

    Args:
        logits: (n, vocab_size), the model's own.
        masks: (n, ceil(vocab_size / 32)) int32, what may come, a bit a token; None: anything.
    """
    if masks is not None:
        logits = logits.masked_fill(~unpacked(masks, logits.shape[1]), -torch.inf)
    groups: dict[Sampling, list[int]] = {}
    for row, one in enumerate(asking):
        groups.setdefault(one.draws.request.sampling, []).append(row)
    if len(groups) == 1:
        sampling = next(iter(groups))
        return _draw_group(asking, logits, sampling).tolist()
    ids = torch.empty(len(asking), dtype=torch.int64, device=logits.device)
    for sampling, rows in groups.items():
        index = torch.tensor(rows, device=logits.device)
        ids[index] = _draw_group([asking[row] for row in rows], logits[index], sampling)
    return ids.tolist()


def _draw_group(asking: Sequence[Asking], logits: Tensor, sampling: Sampling) -> Tensor:
    uniform = history = None
    if not sampling.greedy:
        numbers = [one.draws.uniform(one.index) for one in asking]
        uniform = torch.tensor(numbers, dtype=torch.float64).to(logits.device)
    if sampling.penalises:
        each = [one.draws.history_with(one.drafts) for one in asking]
        history = History(torch.cat([one.seen for one in each]), torch.cat([one.counts for one in each]))
    return choose(logits, sampling, uniform, history)


def unpacked(masks: Tensor, vocab_size: int) -> Tensor:
    """(n, words) int32 -> (n, vocab_size) booleans."""
    ids = torch.arange(vocab_size, device=masks.device)
    return (masks[:, ids // 32] >> (ids % 32)) & 1 != 0


def with_logprobs(ids: Sequence[int], logits: Tensor, top: int) -> list[Token]:
    """Tokens with their log-probabilities, and those of the `top` most probable; logits (n, vocab_size), raw."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor([ids], device=logits.device).T)[:, 0].tolist()
    best, places = (x.tolist() for x in logprobs.topk(min(top, logits.shape[1])))
    return [
        Token(token, logprob, tuple(zip(where, values, strict=True)))
        for token, logprob, where, values in zip(ids, own, places, best, strict=True)
    ]
