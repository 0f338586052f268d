"""Which sequences of the data a step takes: the next ones, all of one length, about as many tokens each time.

What a step takes follows from the position alone, the number of the first sequence that was not trained on yet. So a
run that goes on with another batch size, or on another number of processes, skips and repeats none.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from dataclasses import dataclass, replace

ENDLESS = sys.maxsize


@dataclass(frozen=True)
class Step:
    """Sequences first..first + count - 1.

    Attributes:
        seq_len: tokens of each.
        at_once: most sequences of one forward pass.
    """

    first: int
    count: int
    seq_len: int
    at_once: int

    def share(self, rank: int, ranks: int) -> Step:
        """The part that one of several processes takes: together they take all, each as many to within one."""
        begin, end = (self.count * place // ranks for place in (rank, rank + 1))
        return replace(self, first=self.first + begin, count=end - begin)


@dataclass(frozen=True)
class Steps:
    """The steps of a training run.

    A forward pass takes `batch_size` sequences of the longest length, or as many more shorter ones as make no more
    tokens; a step takes `accumulate` times that. No step crosses a stage's border: what is left of a stage makes a
    smaller one.

    Attributes:
        ends: of each stage, the number of the first sequence behind it; rising.
        lengths: of each stage, tokens of its sequences.
    """

    ends: tuple[int, ...]
    lengths: tuple[int, ...]
    batch_size: int
    accumulate: int

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        """Of a step, padding too; a step that a border or uneven lengths cut short has fewer."""
        return self.batch_size * self.accumulate * self.longest

    def at(self, sequence: int) -> Step:
        """The step that begins with a sequence.

        Raises:
            IndexError: there is no such sequence.
        """
        stage = bisect_right(self.ends, sequence)
        if not 0 <= sequence < self.ends[-1]:
            raise IndexError(f"steps: sequence {sequence} of {self.ends[-1]}")
        at_once = self._at_once(stage)
        return Step(sequence, min(at_once * self.accumulate, self.ends[stage] - sequence), self.lengths[stage], at_once)

    def left(self, sequence: int) -> int:
        """Steps from a sequence to the end of the data."""
        steps = 0
        for stage, end in enumerate(self.ends):
            if sequence < end:
                steps += -(-(end - sequence) // (self._at_once(stage) * self.accumulate))
                sequence = end
        return steps

    def _at_once(self, stage: int) -> int:
        return self.batch_size * self.longest // self.lengths[stage]
