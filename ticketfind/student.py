"""Student's t distribution. No torch.

Formulas: Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.1 (the distribution by the incomplete beta
function) and 26.5.8 (that as a continued fraction).
"""

import functools
import math


@functools.lru_cache(maxsize=1024)
def quantile(p: float, freedom: float) -> float:
    """The t that a share p (0.5 to 1) of Student's distribution with `freedom` degrees of freedom lies below."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi * freedom)
    t, step = 0.0, 1.0
    while step > 1e-13 * t:  # Newton's method from 0: the distribution is concave there, so that no step goes too far
        density = scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2)
        step = (p - cumulative(t, freedom)) / density
        t += max(step, 0.0)
    return t


def cumulative(t: float, freedom: float) -> float:
    """The share of Student's distribution below t >= 0."""
    return 1 - _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5) / 2


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b), 0 <= x <= 1."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, its mirror image does not
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    numerator, denominator = 1.0, 1 / (1 - (a + b) * x / (a + 1))  # Lentz's way, from the outermost term
    value = denominator
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            denominator = 1 / (1 + term * denominator)
            numerator = 1 + term / numerator
            value *= numerator * denominator
        if abs(numerator * denominator - 1) < 1e-15:
            break
    return front * value / a
