"""What a push costs streams of tokens, from when their tokens came. Nothing here measures.

In each round the same streams start together. In some of them a push comes once they run; in others none does. What a
push costs is what its round lacks of those without one, over the same time since the streams' start: from 2 s before
the push to 2 s after it. So neither contexts that grow nor requests that end and start count as a cost.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pydantic import BaseModel

MARGIN_S = 2.0  # what lies so close to a push counts as its own
Span = tuple[float, float]


@dataclass(frozen=True)
class Times:
    """Of one push: its begin, the begin of its commit, its end."""

    began: float
    committing: float
    ended: float

    @property
    def around(self) -> Span:
        return self.began - MARGIN_S, self.ended + MARGIN_S


@dataclass(frozen=True)
class Round:
    """`arrivals`: of each stream, when its tokens came; all of them ran from `began` to `ended`. One clock, seconds."""

    began: float
    ended: float
    arrivals: Sequence[Sequence[float]]

    def tokens(self, span: Span) -> int:
        """That came in `span`, its end not included."""
        self._check(span)
        return sum(span[0] <= time < span[1] for times in self.arrivals for time in times)

    def gaps(self, span: Span) -> Iterator[float]:
        """Of all streams: the times without a token that are partly in `span`. The last may not have ended."""
        self._check(span)
        for times in self.arrivals:
            if not times or times[0] > span[0]:
                raise ValueError("a stream had no token before")
            ends = [*times, span[1]] if times[-1] < span[1] else times
            yield from (end - start for start, end in pairwise(ends) if end > span[0] and start < span[1])

    def same(self, span: Span, other: Round) -> Span:
        """The `span` of the `other` round, so far after the start, in this one."""
        return span[0] - other.began + self.began, span[1] - other.began + self.began

    def _check(self, span: Span) -> None:
        if not self.began <= span[0] <= span[1] <= self.ended:
            raise ValueError(f"the round is from {self.began:.3f} to {self.ended:.3f} s, not around {span}")


class Load(BaseModel):
    """Streams of one mode beside pushes. `lost`: tokens that each later push cost, of the number that came in that time
    in each round without one.

    `normal_s`: the median of all gaps without a push. The longest gap of any stream: near the first push, near the
    later ones, and in the same time without one. Tokens a second: of later pushes until their commit, and without one.
    """

    num_streams: int
    in_flight: str
    normal_s: float
    longest_first_s: float
    longest_s: float
    longest_quiet_s: float
    lost: list[float]
    quiet_tokens: list[int]
    receiving_rate: float
    quiet_rate: float


def compare_rounds(in_flight: str, pushed: Sequence[tuple[Round, Times]], quiet: Sequence[Round]) -> Load:
    """`pushed`: the first push, and later ones; `quiet`: rounds without one.

    Raises: ValueError: there is none of these, or one is too short.
    """
    if len(pushed) < 2 or not quiet:
        raise ValueError("there has to be a later push, and a round without one")
    later = pushed[1:]
    windows = [[(other, other.same(push.around, round_)) for other in quiet] for round_, push in later]
    usual = [statistics.mean(other.tokens(span) for other, span in window) for window in windows]
    without = [each for window in windows for each in window]
    quiet_s = sum(end - start for _, (start, end) in without)
    receiving_s = sum(push.committing - push.began for _, push in later)
    steps = [gap for other, span in without for gap in other.gaps(span) if gap > 0.0]  # tokens of one chunk: no gap
    return Load(
        num_streams=len(pushed[0][0].arrivals),
        in_flight=in_flight,
        normal_s=statistics.median(steps),
        longest_first_s=max(pushed[0][0].gaps(pushed[0][1].around)),
        longest_s=max(max(round_.gaps(push.around)) for round_, push in later),
        longest_quiet_s=max(steps),
        lost=[most - round_.tokens(push.around) for most, (round_, push) in zip(usual, later, strict=True)],
        quiet_tokens=[other.tokens(span) for other, span in without],
        receiving_rate=sum(round_.tokens((push.began, push.committing)) for round_, push in later) / receiving_s,
        quiet_rate=sum(other.tokens(span) for other, span in without) / quiet_s,
    )
