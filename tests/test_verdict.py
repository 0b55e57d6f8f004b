"""The four answers: figures made by hand, scipy's tests, and simulations in which the truth is known."""

import numpy as np
import pytest
from scipy import stats as reference
from scipy.optimize import brentq

from ticketfind.results import Measured, Stats
from ticketfind.verdict import margin, replicates_needed, verdict


def stats(*accuracies: float) -> Stats:
    return Stats.of(
        [Measured(early_stop=10, accuracy_early=a, accuracy_end=0.123, validation_loss=0.5) for a in accuracies]
    )


def around(mean: float, sd: float = 0.002) -> Stats:
    """Five replicates of exactly this mean and sample standard deviation."""
    steps = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    return stats(*(mean + sd * steps / steps.std(ddof=1)))


DENSE, LOW = around(0.975), around(0.91, 0.01)
CASES = {
    "both controls below": ({"ticket": around(0.974), "reinit": LOW, "random": LOW}, None, "winning"),
    "reinit matches too": ({"ticket": around(0.974), "reinit": around(0.974), "random": LOW}, None, "matching but not"),
    "random matches too": ({"ticket": around(0.974), "reinit": LOW, "random": DENSE}, None, "matching but not special"),
    "clearly above a control that matches": (
        {"ticket": around(0.977), "reinit": around(0.972), "random": LOW}, None, "winning",
    ),
    "far below": ({"ticket": LOW, "reinit": LOW, "random": LOW}, None, "not matching"),
    "a wide tolerance": ({"ticket": LOW, "reinit": LOW, "random": LOW}, 10, "matching but not special"),
    "a narrow tolerance": ({"ticket": around(0.970), "reinit": LOW, "random": LOW}, 0.1, "not matching"),
    "matching or not": ({"ticket": around(0.968, 0.004), "reinit": LOW, "random": LOW}, None, "inconclusive"),
    "a control that scatters": (
        {"ticket": around(0.974), "reinit": LOW, "random": stats(0.90, 0.97, 0.96, 0.99, 0.93)}, None, "inconclusive",
    ),
    "no reinit": ({"ticket": around(0.974), "random": LOW}, None, "inconclusive"),
    "one replicate": ({name: stats(0.97) for name in ("dense", "ticket", "reinit", "random")}, None, "inconclusive"),
    "one replicate, far above": (
        {"dense": stats(0.8), "ticket": stats(0.9), "reinit": stats(0.5), "random": stats(0.5)}, None, "inconclusive",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case: str) -> None:
    arms, tolerance, expected = CASES[case]
    found = verdict({"dense": DENSE, **arms}, 0.05, tolerance=tolerance, test_size=400)
    assert found.text.startswith(expected), found.text


def test_a_ticket_that_sometimes_fails_to_train_is_no_winner() -> None:
    """Its mean is that of the trainings that went well; but what does not match even so, does not."""
    arms = {"dense": DENSE, **CASES["both controls below"][0]}
    assert verdict(arms, 0.05, tolerance=None, test_size=400).text.startswith("winning")
    found = verdict(arms, 0.05, tolerance=None, test_size=400, lost=2)
    assert found.text.startswith("inconclusive") and "2 of its trainings failed" in found.text
    found = verdict({**arms, "ticket": LOW}, 0.05, tolerance=None, test_size=400, lost=2)
    assert found.text.startswith("not matching")


def test_without_a_dense_network_there_is_nothing_to_match() -> None:
    found = verdict({"ticket": DENSE, "reinit": LOW}, 0.05, tolerance=None, test_size=400)
    assert found.text.startswith("inconclusive") and found.margin is None


def test_the_margin_is_what_cannot_be_told_from_nothing() -> None:
    assert margin(DENSE, 1.5, 400) == 0.015
    assert margin(DENSE, None, 400) == pytest.approx((0.975 * 0.025 / 400) ** 0.5)
    assert margin(around(0.975, 0.02), None, 400) == pytest.approx(0.02)
    assert margin(DENSE, None, None) == pytest.approx(0.002)


@pytest.mark.parametrize("shift", np.linspace(-0.02, 0.01, 13))
def test_matching_is_decided_by_one_sided_tests(shift: float) -> None:
    """Against scipy's Welch tests of ticket + margin against dense, both ways."""
    ticket, allowed = around(0.975 + shift, 0.006), 0.005
    shifted = np.array(ticket.accuracy_early.values) + allowed
    p = reference.ttest_ind(shifted, DENSE.accuracy_early.values, equal_var=False, alternative="greater").pvalue
    expected = "winning" if p < 0.05 else "not matching" if p > 0.95 else "inconclusive"
    arms = {"dense": DENSE, "ticket": ticket, "reinit": LOW, "random": LOW}
    assert verdict(arms, 0.05, tolerance=0.5, test_size=10_000).text.startswith(expected), (shift, p)


@pytest.mark.parametrize(
    ("p", "expected"), [(0.04, "winning"), (0.06, "inconclusive"), (0.94, "inconclusive"), (0.96, "not matching")]
)
def test_each_side_has_five_percent(p: float, expected: str) -> None:
    """A ticket for which scipy's one-sided Welch test of ticket + margin against dense gives just this p."""

    def excess(shift: float) -> float:
        shifted = np.array(around(0.975 + shift, 0.006).accuracy_early.values) + 0.005
        test = reference.ttest_ind(shifted, DENSE.accuracy_early.values, equal_var=False, alternative="greater")
        return float(test.pvalue) - p

    arms = {"dense": DENSE, "ticket": around(0.975 + brentq(excess, -0.03, 0.03), 0.006), "reinit": LOW, "random": LOW}
    assert verdict(arms, 0.05, tolerance=0.5, test_size=10_000).text.startswith(expected)


@pytest.mark.parametrize("distance", np.linspace(0.0005, 0.012, 9))
def test_a_control_is_beaten_by_welchs_test(distance: float) -> None:
    ticket, control = around(0.975), around(0.975 - distance, 0.006)
    values = (ticket.accuracy_early.values, control.accuracy_early.values)
    p = reference.ttest_ind(*values, equal_var=False, alternative="greater").pvalue
    arms = {"dense": DENSE, "ticket": ticket, "reinit": LOW, "random": control}
    found = verdict(arms, 0.05, tolerance=0.01, test_size=None).text
    assert found.startswith("winning") == (p < 0.025) or found.startswith("inconclusive: 5 % of"), (distance, p)
    found = verdict(arms, 0.05, tolerance=1, test_size=10_000).text
    assert found.startswith("winning") == (p < 0.025), (distance, p)


def test_no_spread_is_no_certainty() -> None:
    """Replicates that agree to the image: one image more is no victory."""
    arms = {"dense": DENSE, "ticket": stats(0.975, 0.975), "reinit": stats(0.9725, 0.9725), "random": LOW}
    assert not verdict(arms, 0.05, tolerance=None, test_size=400).text.startswith("winning")


def test_a_verdict_gives_the_figures_and_what_they_rest_on() -> None:
    arms = {"dense": DENSE, "ticket": around(0.971), "reinit": LOW, "random": LOW}
    found = verdict(arms, 0.0363, tolerance=None, test_size=400)
    assert (
        "3.63 % of the weights reach 97.10 ± 0.20 %, the dense network 97.50 ± 0.20 % (difference -0.40" in found.text
    )
    assert "reinit 91.00 ± 1.00 %" in found.text
    pairs = {(c.arm, c.other): c for c in found.comparisons}
    assert pairs.keys() == {
        *(("ticket", name) for name in ("dense", "reinit", "random")), ("reinit", "dense"), ("random", "dense"),
    }  # fmt: skip
    of_reinit = pairs["ticket", "reinit"]
    expected = reference.ttest_ind(
        arms["ticket"].accuracy_early.values, LOW.accuracy_early.values, equal_var=False
    ).confidence_interval()
    assert of_reinit.difference == pytest.approx(0.061)
    assert of_reinit.interval == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_the_replicates_that_would_decide() -> None:
    """As many as make the interval narrower than the gap, and no fewer."""
    a, b = around(0.97, 0.004), around(0.968, 0.003)
    count = replicates_needed(a, b, 0.002)
    assert count is not None
    half = {n: reference.t.ppf(0.975, 2 * n - 2) * ((0.004**2 + 0.003**2) / n) ** 0.5 for n in (count - 1, count)}
    assert half[count] < 0.002 <= half[count - 1]
    assert replicates_needed(a, b, 1e-6) is None
    arms = {"dense": DENSE, "ticket": around(0.974), "reinit": around(0.968, 0.01), "random": LOW}
    text = verdict(arms, 0.05, tolerance=None, test_size=400).text
    assert text.startswith("inconclusive") and "replicates would decide" in text


def test_the_replicates_that_would_decide_about_the_margin() -> None:
    """The ticket lies 0.7 points below dense and 0.3 above the margin, and that is the gap."""
    arms = {"dense": DENSE, "ticket": around(0.968, 0.004), "reinit": LOW, "random": LOW}
    text = verdict(arms, 0.05, tolerance=1, test_size=10_000).text
    variance = 0.002**2 + 0.004**2
    count = next(n for n in range(2, 99) if reference.t.ppf(0.975, 2 * n - 2) * (variance / n) ** 0.5 < 0.003)
    assert text.startswith("inconclusive") and f"about {count} replicates would decide" in text


def test_replicates_that_did_not_decide_are_too_few() -> None:
    """With spreads as unequal as these Welch's interval is wider than the guess, which five would be enough for."""
    arms = {"dense": DENSE, "ticket": around(0.974, 1e-5), "reinit": around(0.9672, 0.006), "random": LOW}
    assert replicates_needed(arms["ticket"], arms["reinit"], 0.0068) == 5
    text = verdict(arms, 0.05, tolerance=0.5, test_size=10_000).text
    assert text.startswith("inconclusive") and "about 6 replicates would decide" in text


# ------------------------------------------------------------------------------- where the truth is known

TRUTHS = {
    "winning": ({"ticket": -0.001, "reinit": -0.02, "random": -0.04}, {"winning"}),
    "winning at the margin": ({"ticket": -0.005, "reinit": -0.02, "random": -0.04}, {"winning", "not matching"}),
    "a random mask": ({"ticket": -0.03, "reinit": -0.03, "random": -0.03}, {"not matching"}),
    "just not matching": ({"ticket": -0.0051, "reinit": -0.03, "random": -0.03}, {"not matching"}),
    "not special": ({"ticket": 0.0, "reinit": 0.0, "random": 0.0}, {"matching but not special"}),
    "not better than reinit, which does not match": (
        {"ticket": -0.0049, "reinit": -0.0051, "random": -0.03}, {"inconclusive", "winning"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("replicates", [2, 5])
def test_false_verdicts_are_at_most_five_percent(truth: str, replicates: int) -> None:
    """400 simulated evaluations, normal replicates of unequal spread; "inconclusive" is not false."""
    means, right = TRUTHS[truth]
    dice, false, count = np.random.default_rng(replicates), 0, 400
    for _ in range(count):
        arms = {
            name: stats(*dice.normal(0.97 + mean, sd, replicates))
            for (name, mean), sd in zip({"dense": 0.0, **means}.items(), (0.002, 0.004, 0.005, 0.008), strict=True)
        }
        found = verdict(arms, 0.05, tolerance=0.5, test_size=10_000).text.split(":")[0]
        false += found not in right | {"inconclusive"}
    assert false / count <= 0.05 + 3 * (0.05 * 0.95 / count) ** 0.5, false
