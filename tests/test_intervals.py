"""Student's t, and the intervals that rest on it, against scipy."""

import numpy as np
import pytest
from scipy import stats

from ticketfind import intervals, student


@pytest.mark.parametrize("freedom", [1, 1.01, 2, 2.7, 4, 8, 17.3, 60, 1000])
def test_the_distribution(freedom: float) -> None:
    for t in (0.0, 0.01, 0.5, 1.0, 2.776, 12.7, 300.0):
        assert student.cumulative(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-11), t
    for p in (0.6, 0.95, 0.975, 0.995):
        assert student.quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-10), p


@pytest.mark.parametrize("sizes", [(2, 2), (3, 7), (5, 5), (40, 2)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_intervals(sizes: tuple[int, int], level: float) -> None:
    dice = np.random.default_rng(sum(sizes))
    a, b = (dice.normal(0.97, scale, size) for scale, size in zip((0.01, 0.03), sizes, strict=True))
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(level)
    found = intervals.of_difference([*a], [*b], level=level)
    assert found is not None and found.bounds == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(a.mean() - b.mean())
    found = intervals.of_mean([*a], level=level)
    assert found is not None and found.bounds == pytest.approx(
        stats.t.interval(level, len(a) - 1, a.mean(), stats.sem(a))
    )


def test_one_value_has_no_interval() -> None:
    assert intervals.of_mean([0.5]) is None
    assert intervals.of_difference([0.5], [0.4, 0.3]) is None


def test_no_spread() -> None:
    """Values that agree to the last bit are as certain as the least spread says."""
    found = intervals.of_difference([0.5, 0.5], [0.25, 0.25])
    assert found is not None and found.bounds == (0.25, 0.25)
    found, half = intervals.of_difference([0.5, 0.5], [0.25, 0.25], least=0.01), stats.t.ppf(0.975, 2) * 0.01
    assert found is not None and found.bounds == pytest.approx((0.25 - half, 0.25 + half))


def test_little_spread_counts_as_the_least() -> None:
    """Two steps of 0.002 apart; the other side's own spread is larger, and stays."""
    a, b, least = [0.5, 0.502], [0.2, 0.3], 0.01
    found, sd = intervals.of_difference(a, b, least=least), np.std(b, ddof=1)
    terms = np.array([least**2 / 2, sd**2 / 2])
    half = stats.t.ppf(0.975, terms.sum() ** 2 / (terms**2).sum()) * terms.sum() ** 0.5
    assert found is not None and found.bounds == pytest.approx((0.251 - half, 0.251 + half))
