"""Intervals against scipy."""

import numpy as np
import pytest
from scipy import stats

from ticketfind import intervals


@pytest.mark.parametrize("freedom", [1, 1.7, 2, 3, 4.4, 8, 30, 300])
@pytest.mark.parametrize("probability", [0.8, 0.975, 0.99])
def test_quantiles_of_student(freedom: float, probability: float) -> None:
    assert intervals.quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-6)


def test_a_mean() -> None:
    values = [0.97, 0.98, 0.965, 0.99]
    found = intervals.of_mean(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert found is not None and (found.low, found.high) == pytest.approx(expected)
    assert intervals.of_mean([0.5]) is None


@pytest.mark.parametrize("level", [0.95, 0.99])
def test_a_difference_is_that_of_welch(level: float) -> None:
    a, b = [0.97, 0.98, 0.965, 0.99, 0.975], [0.95, 0.96, 0.90]
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(level)
    found = intervals.of_difference(a, b, level=level)
    assert found is not None and (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6)
    assert intervals.of_difference(a, [0.9]) is None


def test_no_spread_is_smaller_than_the_least() -> None:
    equal = intervals.of_difference([0.5, 0.5], [0.4, 0.4])
    assert equal is not None and equal.low == equal.high == pytest.approx(0.1)
    found = intervals.of_difference([0.5, 0.5], [0.4, 0.4], least=0.01)
    assert found is not None and found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, 2) * 0.01)
