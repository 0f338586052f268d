"""Fill-in-the-middle: a model that reads from left to right learns to write what stands between two texts.

Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (2022, arXiv:2207.14255). A document is
cut in three at two characters, each drawn from all of them and the end; its parts, encoded one by one, are put as

    PSM    <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle
    SPM    <|fim_prefix|> <|fim_suffix|> suffix <|fim_middle|> prefix middle

SPM is the paper's second variant, whose opening tells it from PSM. Every token is learned, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

from andromeda.data.augment.technique import Ids, Learned, Technique
from andromeda.data.synthetic.draws import Draws

SENTINELS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")  # the names of Qwen2.5-Coder and CodeGemma


def parts(text: str, draws: Draws) -> tuple[str, str, str]:
    """Prefix, middle and suffix; any of them may be empty."""
    begin, end = sorted(draws.below(len(text) + 1) for _ in range(2))
    return text[:begin], text[begin:end], text[end:]


def prefix_first(encoded: Sequence[Ids], _: Draws, sentinels: Sequence[int]) -> tuple[Ids, Learned]:
    """PSM."""
    prefix, middle, suffix = encoded
    before, between, behind = sentinels
    return [before, *prefix, between, *suffix, behind, *middle], None


def suffix_first(encoded: Sequence[Ids], _: Draws, sentinels: Sequence[int]) -> tuple[Ids, Learned]:
    """SPM."""
    prefix, middle, suffix = encoded
    before, between, behind = sentinels
    return [before, between, *suffix, behind, *prefix, *middle], None


PSM = Technique(parts, prefix_first, SENTINELS)
SPM = Technique(parts, suffix_first, SENTINELS)
