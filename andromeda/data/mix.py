"""Sources -> one stream of sequences, stage after stage: exact shares at every prefix, exact epochs, no sampling.

Which sequence of which source is number n of the stream follows from n, so a reader's whole state is n. All arithmetic
is in integers and fractions.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from heapq import heapify, heappop, heappush
from itertools import count, islice
from numbers import Rational
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from andromeda.data.permutation import shuffled_array
from andromeda.errors import AndromedaError

Ints = NDArray[np.int64]

MAX_SEQUENCES = 2**32  # of a stage: ranks take four bytes
POSITIVE_NUMBER = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?|[0-9]{1,18}/0*[1-9][0-9]{0,17}")


def exact(value: object, where: str) -> Fraction:
    """A number of a spec as the fraction that its digits say: 3, "3/4", "0.3", and 0.3 is three tenths.

    Raises:
        AndromedaError: not a number above zero, or one of more than 18 digits on a side; `where` is named.
    """
    text = format(Decimal(float.__repr__(value)), "f") if isinstance(value, float) else str(value)
    if not POSITIVE_NUMBER.fullmatch(text) or not Fraction(text):
        raise AndromedaError(
            f"{where}: {value!r} is not a number above zero that can be taken exactly; write one like 3, 0.25 or 1/3"
        )
    return Fraction(text)


@dataclass(frozen=True)
class Stage:
    """A part of the stream with its own sources and length. Either epochs rule or proportions do; the other follows.

    Attributes:
        name: unique among the stages.
        seq_len: tokens of its sequences.
        epochs: by source, how often each of its sequences appears: exactly, counted over all stages of this seq_len.
            Of a fraction of an epoch, as many sequences appear as are whole; what is left over counts for later stages.
        proportions: by source, its part of the sequences relative to the others' (3 and 1 are 3/4 and 1/4); each source
            is repeated as often as that takes.
        num_sequences: with proportions, the length of the stage.
        max_epochs: with proportions, by source, how many epochs of it the stage may take. Without num_sequences the
            stage is as long as they allow.

    Raises:
        AndromedaError: both or neither rule; no source; a value that is not above zero; a length that is missing or
            said twice; max_epochs of a source without a proportion.
        TypeError: a value that is not exact; see `exact`.
    """

    name: str
    seq_len: int
    epochs: Mapping[str, Fraction] | None = None
    proportions: Mapping[str, Fraction] | None = None
    num_sequences: int | None = None
    max_epochs: Mapping[str, Fraction] | None = None

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        self._check_rule(where)
        if self.seq_len < 1:
            raise AndromedaError(f"{where}: seq_len is {self.seq_len}; a sequence needs at least one token")
        if self.num_sequences is not None and self.num_sequences < 1:
            raise AndromedaError(
                f"{where}: num_sequences is {self.num_sequences}; ask for one or more, or drop the stage"
            )
        if not self.sources:
            raise AndromedaError(f"{where}: names no source; give one, or drop the stage")
        if unknown := [source for source in self.max_epochs or () if source not in self.sources]:
            raise AndromedaError(f"{where}: max_epochs names {unknown[0]!r}, which has no proportion; give it one")
        for what in ("epochs", "proportions", "max_epochs"):
            for source, value in (getattr(self, what) or {}).items():
                if not isinstance(value, Rational):
                    raise TypeError(f"{where}: {what} of {source!r} must be a Fraction; got {type(value).__name__}")
                if value <= 0:
                    raise AndromedaError(f"{where}: {what} of {source!r} is {value}; leave the source out instead")

    def _check_rule(self, where: str) -> None:
        lengths = self.num_sequences is not None, self.max_epochs is not None
        if self.epochs is not None and self.proportions is not None:
            raise AndromedaError(
                f"{where}: has both epochs and proportions, and one must rule; for epochs to rule, drop proportions; "
                "for proportions to rule, write max_epochs for epochs"
            )
        if self.epochs is None and self.proportions is None:
            raise AndromedaError(f"{where}: has neither epochs nor proportions; give one of them, by source")
        if self.epochs is not None and any(lengths):
            raise AndromedaError(f"{where}: its epochs say how long it is; drop num_sequences and max_epochs")
        if self.proportions is not None and not any(lengths):
            raise AndromedaError(f"{where}: proportions do not say how long it is; add num_sequences or max_epochs")

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self.epochs or self.proportions or ())


class Draws(NamedTuple):
    """n sequences of the stream: where each is from."""

    stage: Ints  # (n,) in Mix.stages
    source: Ints  # (n,) in Mix.sources
    epoch: Ints  # (n,) how often all of the source, at this seq_len, came before
    sequence: Ints  # (n,) which of the source's sequences


class Mix:
    """The stream of all stages.

    After any number of a stage's sequences, each of its sources has had its proportion of them, to within one sequence
    (to within 1 - 1/(2k - 2) of one, for k >= 2 sources). Where epochs rule, the proportions are those of the counts.

    Within an epoch each sequence of a source comes once, in an order that follows from the seed, the source and the
    epoch. Stages with the same seq_len go on where an earlier one left a source; another seq_len is another set of
    sequences, which begins with epoch 0.

    Memory: 5 or 6 bytes a sequence, and 30 while it is laid out; less where the shares repeat with a short period.

    Args:
        stages: in their order.
        sizes: how many sequences a source has, by (source, seq_len).
        seed: of the order within the epochs.

    Attributes:
        sources: names, in the order in which the stages name them.
        counts: (stages, sources) sequences.
        starts: (stages + 1,) the first sequence of each stage, and the end.

    Raises:
        AndromedaError: two stages of one name; a source that has no sequences of a stage's seq_len; a stage without
            sequences, or of 2^32 and more, or that takes more than its max_epochs allow.
    """

    def __init__(self, stages: Sequence[Stage], sizes: Mapping[tuple[str, int], int], seed: int) -> None:
        self.stages, self.seed = tuple(stages), seed
        self.sources = tuple(dict.fromkeys(source for stage in stages for source in stage.sources))
        self.counts = np.zeros((len(self.stages), len(self.sources)), np.int64)
        self._schedules: list[_Schedule] = []
        numbers = {source: number for number, source in enumerate(self.sources)}
        used: defaultdict[tuple[str, int], Fraction] = defaultdict(Fraction)  # with the part of a sequence left over
        for row, stage in zip(self.counts, _unique(self.stages), strict=True):
            size = {source: _size(stage, source, sizes) for source in stage.sources}
            before = {source: used[source, stage.seq_len] for source in stage.sources}
            shares, length = _quota(stage, size, before)
            facts = [(numbers[source], math.floor(before[source]), size[source]) for source in shares]
            schedule = _lay_out(shares, length, facts)
            self._schedules.append(schedule)
            row[schedule.source] = schedule.counts
            for source in stage.sources:
                asked = stage.epochs[source] * size[source] if stage.epochs else int(row[numbers[source]])
                used[source, stage.seq_len] += asked
        self.starts = np.concatenate([[0], np.cumsum(self.counts.sum(axis=1))])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def draws(self, first: int, count: int) -> Draws:
        """Sequences first..first + count - 1 of the stream.

        Raises:
            IndexError: some of them lie outside the stream.
        """
        if not 0 <= first <= first + count <= len(self):
            raise IndexError(f"mix: sequences {first} to {first + count - 1} of {len(self)}")
        numbers = np.arange(first, first + count)
        stage = np.searchsorted(self.starts, numbers, side="right") - 1
        source, epoch, sequence = (np.empty_like(numbers) for _ in range(3))
        for which in np.unique(stage).tolist():
            part = stage == which
            drawn = self._draws(self._schedules[which], numbers[part] - self.starts[which])
            source[part], epoch[part], sequence[part] = drawn
        return Draws(stage, source, epoch, sequence)

    def _draws(self, schedule: _Schedule, numbers: Ints) -> tuple[Ints, Ints, Ints]:
        cycle, slot = np.divmod(numbers, len(schedule.order))
        local = schedule.order[slot]
        position = schedule.begin[local] + cycle * schedule.counts_a_period[local] + schedule.rank[slot]
        epoch, place = np.divmod(position, schedule.size[local])
        sequence = np.empty_like(place)
        grouped = np.lexsort((epoch, local))
        borders = np.flatnonzero(np.diff(local[grouped]).astype(bool) | np.diff(epoch[grouped]).astype(bool)) + 1
        for group in np.split(grouped, borders):  # one source in one epoch
            which, when = local[group[0]], epoch[group[0]]
            key = f"mix {self.seed} {when} {json.dumps(self.sources[schedule.source[which]])}"
            sequence[group] = shuffled_array(place[group], int(schedule.size[which]), key)
        return schedule.source[local], epoch, sequence


# ---- a stage -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Schedule:
    """A stage's k sources, and whose turn it is in a period of P sequences, which repeats up to num_sequences."""

    num_sequences: int
    source: Ints  # (k,) in Mix.sources
    begin: Ints  # (k,) sequences of it that earlier stages have used
    size: Ints  # (k,) sequences of an epoch
    order: NDArray[np.unsignedinteger[Any]]  # (P,) the source that has this turn, in range(k)
    rank: NDArray[np.uint32]  # (P,) its earlier turns in the period
    counts_a_period: Ints  # (k,)

    @property
    def counts(self) -> Ints:
        """(k,) turns in the whole stage."""
        cycles, rest = divmod(self.num_sequences, len(self.order))
        return cycles * self.counts_a_period + np.bincount(self.order[:rest], minlength=len(self.source))


def _unique(stages: Sequence[Stage]) -> Iterator[Stage]:
    names: set[str] = set()
    for stage in stages:
        if stage.name in names:
            raise AndromedaError(f"stage {stage.name!r}: there are two of this name; rename one")
        names.add(stage.name)
        yield stage


def _size(stage: Stage, source: str, sizes: Mapping[tuple[str, int], int]) -> int:
    size = sizes.get((source, stage.seq_len), 0)
    if size < 1:
        raise AndromedaError(
            f"stage {stage.name!r}: source {source!r} has no sequences of {stage.seq_len} tokens; "
            "give it documents, or take it out of the stage"
        )
    return size


def _quota(stage: Stage, size: Mapping[str, int], used: Mapping[str, Fraction]) -> tuple[Mapping[str, Fraction], int]:
    """Relative shares by source, of those that have any, and the number of sequences."""
    if stage.epochs is not None:
        ends = {source: used[source] + epochs * size[source] for source, epochs in stage.epochs.items()}
        counts = {source: math.floor(end) - math.floor(used[source]) for source, end in ends.items()}
        shares: Mapping[str, Fraction] = {source: Fraction(number) for source, number in counts.items() if number}
        length = sum(counts.values())
    else:
        shares = stage.proportions or {}
        length = _length(stage, shares, size)
    if not 0 < length < MAX_SEQUENCES:
        raise AndromedaError(
            f"stage {stage.name!r}: is {length} sequences long, and must be 1 to {MAX_SEQUENCES - 1}; change its "
            "epochs, max_epochs or num_sequences"
        )
    return shares, length


def _length(stage: Stage, proportions: Mapping[str, Fraction], size: Mapping[str, int]) -> int:
    """Sequences of a stage where proportions rule: as asked, or as many as max_epochs surely allow.

    n sequences give a source of share p at most ceil(p * n), which is within its limit while p * n is.
    """
    total = sum(proportions.values())
    allowed = {
        source: math.floor(math.floor(epochs * size[source]) * total / proportions[source])
        for source, epochs in (stage.max_epochs or {}).items()
    }
    if stage.num_sequences is None:
        return min(allowed.values(), default=0)
    for source, most in allowed.items():
        if stage.num_sequences > most:
            raise AndromedaError(
                f"stage {stage.name!r}: {stage.num_sequences} sequences would repeat {source!r} more than its "
                f"max_epochs allow; ask for num_sequences of at most {most}, or change its proportion or max_epochs"
            )
    return stage.num_sequences


def _lay_out(shares: Mapping[str, Fraction], num_sequences: int, sources: Sequence[tuple[int, int, int]]) -> _Schedule:
    """`sources`: number, begin and size of each."""
    weights = _whole_numbers(shares.values())
    source, begin, size = np.array(sources, np.int64).T
    period = min(sum(weights), num_sequences)
    order = np.fromiter(islice(interleave(weights), period), np.min_scalar_type(len(weights)), period)
    counts = np.bincount(order, minlength=len(weights))
    rank = np.empty(period, np.uint32)
    rank[np.argsort(order, kind="stable")] = np.arange(period) - np.repeat(np.cumsum(counts) - counts, counts)
    return _Schedule(num_sequences, source, begin, size, order, rank, counts)


def _whole_numbers(shares: Iterable[Fraction]) -> list[int]:
    """The smallest whole numbers in these proportions."""
    shares = list(shares)
    denominator = math.lcm(*(share.denominator for share in shares))
    numbers = [int(share * denominator) for share in shares]
    divisor = math.gcd(*numbers)
    return [number // divisor for number in numbers]


def interleave(weights: Sequence[int]) -> Iterator[int]:
    """Whose turn it is, without end and with period sum(weights) / gcd(weights).

    After any number n of turns, source i has had n * weights[i] / sum(weights) of them to within 1 - 1/(2k - 2), for k
    sources (exactly, for one). R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): a turn
    may be taken when it brings its source no further ahead than that, must be taken before the source is further
    behind, and of the turns that may be taken the one that must soonest is. Here deadlines are whole turns, and the
    source named first wins a tie. That loses nothing: of turns that take equal time, earliest deadline first meets all
    deadlines that can be met. (To take the source that is furthest behind is simpler, and at times off by more than 1.)

    Args:
        weights: 1 or more each.
    """
    total, num_sources = sum(weights), len(weights)
    slack = max(1, 2 * num_sources - 2)  # all deviations stay within (slack - 1) / slack
    taken = [0] * num_sources

    def release(source: int) -> int:
        """The first turn n with taken + 1 <= n * weight / total + (slack - 1) / slack."""
        return -(-total * (slack * taken[source] + 1) // (slack * weights[source]))

    def deadline(source: int) -> int:
        """The first turn n after which taken < n * weight / total - (slack - 1) / slack, were it not taken by then."""
        return total * (slack * (taken[source] + 1) - 1) // (slack * weights[source]) + 1

    waiting = [release(source) * num_sources + source for source in range(num_sources)]  # a time and a source as one
    heapify(waiting)
    ready: list[int] = []
    for turn in count(1):
        while waiting and waiting[0] < (turn + 1) * num_sources:
            source = heappop(waiting) % num_sources
            heappush(ready, deadline(source) * num_sources + source)
        source = heappop(ready) % num_sources
        yield source
        taken[source] += 1
        heappush(waiting, release(source) * num_sources + source)
