"""Texts of one source -> token ids, some of them changed by the rules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from andromeda.data.augment.rules import TECHNIQUES, Rules
from andromeda.data.augment.technique import Ids, Learned
from andromeda.data.synthetic.draws import Draws
from andromeda.errors import AndromedaError
from andromeda.tokenizer import Tokenizer


@dataclass(frozen=True)
class Augmented:
    """A document.

    Attributes:
        learned: of each id; None: all.
        technique: what it was changed by; None: it is as it was.
    """

    ids: Ids
    learned: Learned = None
    technique: str | None = None


@dataclass(frozen=True)
class Augmenter:
    """`tokenizer.encode_batch`, with the rules of a source.

    Attributes:
        most_tokens: a document that would have more ids, with sentinels among them, is left as it is: packing would cut
            it, and what belongs together would come apart.

    Raises:
        AndromedaError: the tokenizer lacks a control token that the rules need.
    """

    rules: Rules
    tokenizer: Tokenizer
    seed: int
    source: str
    most_tokens: int
    _ids: dict[str, list[int]] = field(init=False, repr=False, compare=False)  # of sentinels, by technique

    def __post_init__(self) -> None:
        known = {token: self.tokenizer.token_to_id(token) for token in self.rules.sentinels}
        if missing := [token for token, token_id in known.items() if token_id is None]:
            raise AndromedaError(
                f"augment: the tokenizer has no token {missing[0]}, which the rules of source {self.source} need; "
                "take one that has it, or train one with the data (tokenizer: {vocab_size: ...})"
            )
        techniques = self.rules.techniques.items()
        ids = {name: [known[token] for token in technique.sentinels] for name, technique in techniques}
        object.__setattr__(self, "_ids", ids)

    def encode_batch(self, texts: Sequence[str], names: Sequence[str]) -> list[Augmented]:
        """Ids of texts; each name says which document of the source it is, and decides what is drawn for it."""
        plans = [self._plan(text, name) for text, name in zip(texts, names, strict=True)]
        encoded = iter(self.tokenizer.encode_batch([part for _, _, parts in plans for part in parts]))
        return [
            self._joined(text, chosen, draws, [next(encoded) for _ in parts])
            for text, (chosen, draws, parts) in zip(texts, plans, strict=True)
        ]

    def _plan(self, text: str, name: str) -> tuple[str | None, Draws, Sequence[str]]:
        draws = Draws(json.dumps(["augment", self.seed, self.source, name]))
        chosen = self.rules.choice(draws)
        return chosen, draws, (text,) if chosen is None else TECHNIQUES[chosen].parts(text, draws)

    def _joined(self, text: str, chosen: str | None, draws: Draws, parts: Sequence[Ids]) -> Augmented:
        if chosen is None:
            return Augmented(parts[0])
        ids, learned = TECHNIQUES[chosen].joined(parts, draws, self._ids[chosen])
        if self._ids[chosen] and len(ids) > self.most_tokens:
            return Augmented(self.tokenizer.encode(text))
        return Augmented(ids, learned, chosen)
