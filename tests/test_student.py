"""Student's t and the intervals that rest on it, against scipy."""

import numpy as np
import pytest
from scipy import stats

from ticketfind import student


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
    assert student.difference_interval([*a], [*b], level=level) == pytest.approx((expected.low, expected.high))
    expected = stats.t.interval(0.95, len(a) - 1, a.mean(), stats.sem(a))
    assert student.mean_interval([*a]) == pytest.approx(expected)


def test_one_value_has_no_interval() -> None:
    assert student.mean_interval([0.5]) is None
    assert student.difference_interval([0.5], [0.4, 0.3]) is None


def test_no_spread() -> None:
    """Values that agree to the last bit are as certain as the least spread says."""
    assert student.difference_interval([0.5, 0.5], [0.25, 0.25]) == (0.25, 0.25)
    low, high = student.difference_interval([0.5, 0.5], [0.25, 0.25], least=0.01) or (0, 0)
    assert (low, high) == pytest.approx((0.25 - stats.t.ppf(0.975, 2) * 0.01, 0.25 + stats.t.ppf(0.975, 2) * 0.01))
    assert student.mean_interval([0.5, 0.5], least=0.01) == pytest.approx(
        (0.5 - stats.t.ppf(0.975, 1) * 0.01 / 2**0.5, 0.5 + stats.t.ppf(0.975, 1) * 0.01 / 2**0.5)
    )
