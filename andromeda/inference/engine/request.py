"""What is asked of the engine, and what comes back: no tensors, no policy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from andromeda.inference.sampling import Sampling

FinishReason = Literal["stop", "length", "error"]


class Constraint(Protocol):
    """What may come next in one text: a state that moves on with it. `inference.grammar` has those of grammars."""

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Sets bit t % 32 of row[t // 32] where token t may come next, and clears it where not.

        At least one token may, an end token where the text may end.
        """

    def advance(self, tokens: Sequence[int]) -> int:
        """Moves on by these tokens, up to the first that may not come; returns by how many."""

    def rollback(self, tokens: int) -> None:
        """Takes back the last so many tokens."""

    def forced(self) -> list[int]:
        """Tokens that must come next whatever the model says, often none: drafts that cost nothing to find."""


@dataclass(frozen=True)
class Request:
    """One text to be continued.

    Attributes:
        ids: the prompt, at least one token.
        max_new_tokens: at most so many come, at least 1.
        sampling: how each is drawn.
        stop_ids: any of these ends the text, and is the last token that comes.
        seed: of the draws: the same text whatever else the engine has to do; None: a fresh one.
        top_logprobs: report each token's log-probability, and those of so many most probable tokens; None: neither.
        constraint: what the text must keep to; this request's own, fresh.
    """

    ids: Sequence[int]
    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    seed: int | None = None
    top_logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Token:
    """A token that was drawn.

    Attributes:
        logprob: natural, of the model's own distribution (no temperature, penalty or mask); None: not asked for.
        top: the most probable tokens with theirs, most probable first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Update:
    """What came of a request in one step.

    Attributes:
        tokens: in order; several where drafts were right, none in a last update that says why it ended.
        finish_reason: of the last update: `stop` for a stop id, `length`, or `error`; None: more will come.
        cached_tokens: of the prompt, read from the prefix cache.
        error: in one line, where finish_reason says so.
    """

    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Stats:
    """How an engine does. Counts since the start are `total_`.

    Attributes:
        running, waiting: requests.
        used_pages, cached_pages, num_pages: of the cache; cached ones are held for prompts to come, and free to take.
    """

    running: int = 0
    waiting: int = 0
    used_pages: int = 0
    cached_pages: int = 0
    num_pages: int = 0
    total_prompt_tokens: int = 0
    total_cached_tokens: int = 0
    total_new_tokens: int = 0
    total_drafted_tokens: int = 0
    total_accepted_tokens: int = 0
    total_preemptions: int = 0
    total_steps: int = 0


class Backend(Protocol):
    """An engine as a server sees it, from one event loop."""

    @property
    def alive(self) -> bool:
        """Whether it takes requests: until it is closed, or has failed for good."""

    def check(self, request: Request) -> None:
        """Raises AndromedaError for what could never be answered, such as a prompt that the cache cannot hold."""

    def stream(self, request: Request) -> AsyncIterator[Update]:
        """Updates as they come. An iterator that is closed early gives back all that its request held."""

    def stats(self) -> Stats: ...

    async def close(self) -> None:
        """Ends what still runs, and the engine's thread."""
