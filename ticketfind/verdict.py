"""Is it a winning ticket? What the figures of an evaluation say, with the intervals that say how surely. No torch.

All of it is about mean test accuracy at early stop, over replicates, with Welch's intervals for differences of means.
"""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ticketfind import intervals, student
from ticketfind.results import Spread, Stats

CONTROLS = ("reinit", "random")
"""The arms that a winning ticket must beat."""
_MOST = 1000
"""Replicates that are worth naming as a way out of doubt."""


@dataclass(frozen=True)
class Comparison:
    """The mean accuracy of one arm less that of another, fractions."""

    arm: str
    other: str
    difference: float
    interval: tuple[float, float] | None
    """95 %; None where one of them has a single replicate."""

    @classmethod
    def of(cls, arms: Mapping[str, Spread], arm: str, other: str, *, least: float) -> "Comparison":
        """Compare two of `arms` (Welch). least: a standard deviation counts as this at least."""
        a, b = arms[arm], arms[other]
        found = intervals.of_difference(a.values, b.values, least=least)
        return cls(arm, other, a.mean - b.mean, None if found is None else found.bounds)


@dataclass(frozen=True)
class Verdict:
    """An answer, and what it rests on."""

    text: str
    """Begins with: winning, matching but not special, not matching, or inconclusive."""
    margin: float | None
    """How far, as a fraction, below the dense mean still matches; None without a dense network."""
    comparisons: tuple[Comparison, ...]


def margin(dense: Stats, given: float | None, test_size: int | None) -> float:
    """How far, as a fraction, below the dense mean still matches.

    given: percentage points. Without it the larger of two things that cannot be told from nothing: the standard
    deviation of the dense replicates, and the standard error of a proportion over `test_size` examples, by which
    accuracies on another test set of this size would differ.
    """
    if given is not None:
        return given / 100
    p = min(max(dense.accuracy_early.mean, 0.0), 1.0)
    return max(dense.accuracy_early.sd or 0.0, math.sqrt(p * (1 - p) / test_size) if test_size else 0.0)


def verdict(
    arms: Mapping[str, Stats], remaining: float, *, tolerance: float | None, test_size: int | None, lost: int = 0
) -> Verdict:
    """Which of the four it is; the first that applies:

    - *inconclusive* without a dense network or with a single replicate: there is nothing to match, or no spread.
    - *not matching*: ticket - dense is below -margin with 95 % (one-sided).
    - *inconclusive* unless it is above -margin with 95 % (one-sided, as is usual for "not inferior").
    - *inconclusive*: trainings of the ticket failed, and its mean is that of those that went well.
    - *inconclusive*: a control was not trained.
    - *winning*: ticket - control is above 0 with 97.5 %, for both controls.
    - *matching but not special*: control - dense is above -margin with 97.5 %, for one of the two.
    - *inconclusive*: neither.

    So each verdict but the last is false with at most 5 %. tolerance: the margin in points, by `margin` where None.
    remaining: of the weights, a fraction, for the text. lost: trainings of the ticket that failed.
    """
    least = 1 / test_size if test_size else 1e-6

    early = {name: stats.accuracy_early for name, stats in arms.items()}

    def compare(arm: str, other: str) -> Comparison:
        return Comparison.of(early, arm, other, least=least)

    ticket, dense = arms["ticket"], arms.get("dense")
    allowed = None if dense is None else margin(dense, tolerance, test_size)
    of_ticket = {name: compare("ticket", name) for name in arms if name != "ticket"}
    of_others = {name: compare(name, "dense") for name in arms if dense and name not in ("ticket", "dense")}

    def say(text: str) -> Verdict:
        return Verdict(text, allowed, (*of_ticket.values(), *of_others.values()))

    share = f"{100 * remaining:.3g} % of the weights"
    if dense is None or allowed is None:
        return say("inconclusive: without the dense network there is nothing to match")
    to_dense = of_ticket["dense"]
    figures = f"{share} reach {_percent(ticket)}, the dense network {_percent(dense)}"
    if to_dense.interval is None:
        return say(f"inconclusive: {figures}, in a single replicate; search with more --replicates")
    low, high = _one_sided(ticket, dense, least)
    figures += f" (difference {100 * to_dense.difference:+.2f}"
    if high < -allowed:
        return say(f"not matching: {figures}, with 95 % at most {100 * high:+.2f}; margin {100 * allowed:.2f})")
    figures += f", with 95 % at least {100 * low:+.2f}; margin {100 * allowed:.2f})"
    if low <= -allowed:
        more = _more(ticket, dense, to_dense.difference + allowed, least)
        return say(f"inconclusive: {figures}; it may match or not{more}")
    if lost:
        return say(f"inconclusive: {figures}; {lost} of its trainings failed, which the mean leaves out")
    missing = [name for name in CONTROLS if name not in arms]
    if missing:
        return say(f"inconclusive: {figures}; not compared with {' and '.join(missing)}")
    controls = ", ".join(f"{name} {_percent(arms[name])}" for name in CONTROLS)
    beaten = [name for name in CONTROLS if _lies_above(of_ticket[name], 0.0)]
    if len(beaten) == len(CONTROLS):
        return say(f"winning: {figures}; the controls stay below it ({controls})")
    equal = [name for name in CONTROLS if _lies_above(of_others[name], -allowed)]
    if equal:
        verb = "matches" if len(equal) == 1 else "match"
        return say(f"matching but not special: {figures}; {' and '.join(equal)} {verb} too ({controls})")
    unclear = [name for name in CONTROLS if name not in beaten]
    more = _more(ticket, arms[unclear[0]], of_ticket[unclear[0]].difference, least)
    return say(f"inconclusive: {figures}; not clearly above {' and '.join(unclear)} ({controls}){more}")


def replicates_needed(a: Stats, b: Stats, gap: float, least: float = 0.0) -> int | None:
    """How many replicates would make the 95 % interval for a difference of means narrower than `gap`.

    To either side, by spread and difference as they are now: a rough guide. None where over 1,000 would be needed.
    """
    variance = sum(max(s.accuracy_early.sd or 0.0, least) ** 2 for s in (a, b))

    def is_enough(count: int) -> bool:
        return student.quantile(0.975, 2 * count - 2) * math.sqrt(variance / count) < abs(gap)

    count = 2 + bisect.bisect_left(range(2, _MOST + 1), True, key=is_enough)
    return count if count <= _MOST else None


def _more(a: Stats, b: Stats, gap: float, least: float) -> str:
    count = replicates_needed(a, b, gap, least)
    if count is None:
        return ", and it is too close to be settled by replicates"
    if count <= a.replicates:  # the spread is unequal; one more step
        count = a.replicates + 1
    return f"; about {count} replicates would decide if the figures stay as they are"


def _lies_above(found: Comparison, bound: float) -> bool:
    return found.interval is not None and found.interval[0] > bound


def _one_sided(a: Stats, b: Stats, least: float) -> tuple[float, float]:
    """Bounds for a - b, each of which holds with 95 % for itself."""
    found = intervals.of_difference(a.accuracy_early.values, b.accuracy_early.values, least=least, level=0.9)
    assert found is not None
    return found.bounds


def _percent(stats: Stats) -> str:
    early = stats.accuracy_early
    return f"{100 * early.mean:.2f}" + (f" ± {100 * early.sd:.2f} %" if early.sd is not None else " %")
