"""95 % intervals of a mean and of a difference of means, by Student's t. No torch."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ticketfind.student import quantile


@dataclass(frozen=True)
class Interval:
    """An estimate, and the interval around it."""

    mean: float
    low: float
    high: float

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval alone."""
        return self.low, self.high


def of_mean(values: Sequence[float], *, level: float = 0.95) -> Interval | None:
    """The interval of a mean: mean ± t * sd / sqrt(n), n - 1 degrees of freedom; None for a single value."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    width = quantile(0.5 + level / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - width, mean + width)


def of_difference(
    a: Sequence[float], b: Sequence[float], *, least: float = 0.0, level: float = 0.95
) -> Interval | None:
    """The interval of mean(a) - mean(b), variances not taken for equal (Welch 1947); None where one has one value.

    least: a standard deviation counts as this at least, for values measured in steps.
    """
    if min(len(a), len(b)) < 2:
        return None
    difference = statistics.fmean(a) - statistics.fmean(b)
    terms = [(max(statistics.stdev(values), least) ** 2 / len(values), len(values) - 1) for values in (a, b)]
    variance = sum(term for term, _ in terms)
    if not variance:
        return Interval(difference, difference, difference)
    freedom = variance**2 / sum(term**2 / degrees for term, degrees in terms)
    width = quantile(0.5 + level / 2, freedom) * math.sqrt(variance)
    return Interval(difference, difference - width, difference + width)
