"""Which share of a source's documents is changed, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction

from andromeda.data.augment import fill_in_the_middle, span_corruption, verse_order
from andromeda.data.augment.technique import Technique
from andromeda.data.synthetic.draws import Draws
from andromeda.errors import AndromedaError

TECHNIQUES: Mapping[str, Technique] = {
    "fim_psm": fill_in_the_middle.PSM,
    "fim_spm": fill_in_the_middle.SPM,
    "span_corruption": span_corruption.SPANS,
    "permute_lines": verse_order.LINES,
    "permute_stanzas": verse_order.STANZAS,
}


@dataclass(frozen=True)
class Rules:
    """The share of documents that each technique changes; a document is changed by one at most.

    Raises:
        AndromedaError: a share below 0, or more than 1 together.
    """

    fim_psm: Fraction = Fraction(0)
    fim_spm: Fraction = Fraction(0)
    span_corruption: Fraction = Fraction(0)
    permute_lines: Fraction = Fraction(0)
    permute_stanzas: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        for name, rate in self.rates.items():
            if rate < 0:
                raise AndromedaError(f"augment: {name} is {rate}; it is a share of the documents, from 0 to 1")
        total = float(sum(self.rates.values()))
        if total > 1:
            raise AndromedaError(f"augment: the shares come to {total:g}; a document is changed once at most")

    @property
    def rates(self) -> dict[str, Fraction]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def techniques(self) -> dict[str, Technique]:
        """Those that change any document."""
        return {name: TECHNIQUES[name] for name, rate in self.rates.items() if rate}

    @property
    def sentinels(self) -> tuple[str, ...]:
        """Control tokens that the tokenizer must have."""
        return tuple(dict.fromkeys(token for technique in self.techniques.values() for token in technique.sentinels))

    @property
    def masks(self) -> bool:
        """Whether there are ids that are not learned."""
        return any(technique.masks for technique in self.techniques.values())

    def choice(self, draws: Draws) -> str | None:
        """The technique for a document; None: it stays as it is."""
        parts = math.lcm(*(rate.denominator for rate in self.rates.values()))
        place = draws.below(parts)
        for name, rate in self.rates.items():
            place -= int(rate * parts)
            if place < 0:
                return name
        return None
