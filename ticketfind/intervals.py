"""95 % intervals of a mean and of a difference of means, by Student's t. No torch."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Interval:
    """An estimate, and the interval around it."""

    mean: float
    low: float
    high: float


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


@lru_cache(maxsize=1024)
def quantile(probability: float, freedom: float) -> float:
    """The quantile of Student's t for a probability of 0.5 or more; degrees of freedom need not be whole.

    With t = sqrt(freedom) * tan(angle) the density is that of cos(angle) ** (freedom - 1), which is integrated by
    Simpson's rule; bisection over the angle.
    """
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if 0.5 + scale * _integral(middle, freedom - 1) < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _integral(angle: float, power: float, pieces: int = 200) -> float:
    """Of cos ** power from 0 to `angle`."""
    heights = [math.pow(math.cos(angle * i / pieces), power) for i in range(pieces + 1)]
    return angle / pieces / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
