"""Shares of cases, and medians, with their 95 % intervals."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_Z = 1.96
"""Of the normal distribution, at 95 %."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share of cases, with its 95 % interval (Wilson 1927)."""

    hits: int
    cases: int

    @classmethod
    def of(cls, marks: Iterable[bool]) -> "Rate":
        """The share of the marks that are true."""
        marks = list(marks)
        return cls(hits=sum(marks), cases=len(marks))

    @property
    def value(self) -> float:
        """The share; not a number when there was no case."""
        return self.hits / self.cases if self.cases else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % interval."""
        if not self.cases:
            return math.nan, math.nan
        n, p = self.cases, self.value
        centre = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
        half = _Z / (1 + _Z * _Z / n) * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def is_above(self, other: "Rate") -> bool:
        """Whether the two intervals do not touch, and this one is the higher; False when either has no case."""
        return self.interval[0] > other.interval[1]


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a median, whatever the distribution: from one value to another (Conover 1999, section 3.2).

    Not a number with fewer than six values, which hold none so sure.
    """
    from scipy import stats  # it takes a second

    place = int(stats.binom.ppf(0.025, len(values), 0.5)) if values else 0
    if place < 1:
        return math.nan, math.nan
    ordered = sorted(values)
    return ordered[place - 1], ordered[-place]
