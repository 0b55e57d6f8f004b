"""Each claim: what makes it hold, what refutes it, what leaves it open, and when it is not tested."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ticketfind import beside, claims
from ticketfind.claims import DOES_NOT, HOLDS, NOT_TESTED, UNDECIDED, Findings
from ticketfind.results import Evaluated, Round, Spread, Stats

JITTER = (-0.002, 0.0, 0.002, 0.001, -0.001)


def arm(accuracy: float, stop: float = 500, *, n: int = 5, wide: float = 1.0) -> Stats:
    """n replicates around an accuracy, early stops around an iteration."""
    early = Spread.of(accuracy + wide * jitter for jitter in JITTER[:n])
    return Stats(early, early, Spread.of(stop + 10_000 * wide * jitter for jitter in JITTER[:n]))


def rounds(*given: tuple[float, Stats]) -> list[Round]:
    return [Round(number, share, stats, True, 0) for number, (share, stats) in enumerate(given)]


def at(share: float, **arms: Stats) -> Evaluated:
    return Evaluated(3, share, {name.replace("__", "-").replace("_", "="): stats for name, stats in arms.items()})


DENSE = (1.0, arm(0.95))


def status(number: int, found: Findings) -> claims.Claim:
    judged = claims.of_run(found)
    assert [claim.number for claim in judged] == [*range(1, 13)]
    return judged[number - 1]


def findings(
    *pruned: tuple[float, Stats], dense: tuple[float, Stats] = DENSE, evaluated: Sequence[Evaluated] = (), **more: Any
) -> Findings:
    settings: Mapping[str, Any] = {"tolerance": 0.005, "test_size": 1000, "step": 50, "last": 1000, **more}
    return Findings(rounds(dense, *pruned), evaluated, **settings)


@pytest.mark.parametrize(
    ("number", "found", "expected"),
    [
        (1, findings((0.5, arm(0.9)), (0.2, arm(0.952, 400))), HOLDS),
        (1, findings((0.2, arm(0.93, 400))), DOES_NOT),  # below what matches
        (1, findings((0.2, arm(0.952, 900))), DOES_NOT),  # later
        (1, findings((0.2, arm(0.952, 520))), HOLDS),  # within a step of the dense network's is no later
        (1, findings((0.2, arm(0.952, 400)), (0.05, arm(0.9, 900))), HOLDS),  # the densest small part is judged
        (1, findings((0.2, arm(0.946, 400, wide=4))), UNDECIDED),
        (1, findings((0.5, arm(0.95))), NOT_TESTED),  # half of the weights are no small part
        (1, findings((0.2, arm(0.95, n=1)), dense=(1.0, arm(0.95, n=1))), NOT_TESTED),
        (2, findings((0.2, arm(0.95, 300))), HOLDS),
        (2, findings((0.2, arm(0.95, 800))), DOES_NOT),
        (2, findings((0.2, arm(0.95, 495))), UNDECIDED),
        (2, findings((0.2, arm(0.95, 1000)), dense=(1.0, arm(0.95, 1000))), NOT_TESTED),  # it was still learning
        (2, findings((0.2, arm(0.95, 300)), dense=(1.0, arm(0.95, 1000))), HOLDS),
        (3, findings((0.5, arm(0.97)), (0.1, arm(0.93))), HOLDS),
        (3, findings((0.5, arm(0.93)), (0.1, arm(0.9))), DOES_NOT),
        (3, findings((0.5, arm(0.94)), (0.1, arm(0.935, wide=10))), UNDECIDED),  # one that may not be below
        (3, findings((0.5, arm(0.951)), (0.1, arm(0.9))), UNDECIDED),
        (3, findings((0.5, arm(0.97)), (0.1, arm(0.97))), UNDECIDED),  # it does not fall yet
        (3, findings(), NOT_TESTED),
    ],
)
def test_claims_of_the_rounds(number: int, found: Findings, expected: str) -> None:
    assert status(number, found).status == expected


@pytest.mark.parametrize("why", ["it was trained elsewhere", "it goes on from trained weights"])
def test_early_stops_that_do_not_compare_are_not_compared(why: str) -> None:
    """A dense network of unknown training, learning-rate rewinding: accuracy can be judged, speed cannot."""
    found = findings((0.2, arm(0.952, 300)), apart=why)
    matches, faster = status(1, found), status(2, found)
    assert matches.status == UNDECIDED and matches.figures.endswith(f"; {why}") and "iterations" not in matches.figures
    assert (faster.status, faster.figures) == (NOT_TESTED, why)
    assert status(1, findings((0.2, arm(0.9, 300)), apart=why)).status == DOES_NOT


def test_no_tolerance_is_zero_without_a_sign() -> None:
    assert "down to 0.00 it matches" in status(1, findings((0.2, arm(0.96, 300)), tolerance=0.0)).figures
    assert "down to -0.50 it matches" in status(1, findings((0.2, arm(0.96, 300)))).figures


TICKET = arm(0.95, 400)


@pytest.mark.parametrize(
    ("number", "evaluated", "expected"),
    [
        (4, [at(0.5, ticket=TICKET, reinit=arm(0.94, 800)), at(0.1, ticket=TICKET, reinit=arm(0.9, 800))], HOLDS),
        (4, [at(0.5, ticket=TICKET, reinit=arm(0.9, 800)), at(0.1, ticket=TICKET, reinit=arm(0.94, 800))], DOES_NOT),
        (  # at 10 % a ticket learns to the end, and which is slower is asked at 50 %
            4,
            [at(0.5, ticket=TICKET, reinit=arm(0.94, 800)), at(0.1, ticket=arm(0.95, 980), reinit=arm(0.9, 900))],
            HOLDS,
        ),
        (4, [at(0.1, ticket=TICKET, reinit=arm(0.9, 800))], UNDECIDED),  # no trend from one round
        (4, [at(0.1, ticket=TICKET, reinit=arm(0.96, 400))], DOES_NOT),
        (4, [at(0.1, ticket=arm(0.95, n=1), reinit=arm(0.9, n=1))], NOT_TESTED),
        (4, [at(0.1, ticket=TICKET, reinit=arm(0.9, n=1))], NOT_TESTED),
        (4, [], NOT_TESTED),
        (5, [at(0.5, random=TICKET, reinit=TICKET), at(0.1, random=arm(0.8), reinit=arm(0.9))], HOLDS),
        (5, [at(0.1, random=arm(0.9), reinit=arm(0.9))], UNDECIDED),
        (5, [at(0.1, random=arm(0.9), reinit=arm(0.8))], DOES_NOT),
        (5, [at(0.1, ticket=TICKET)], NOT_TESTED),
        (8, [at(0.1, ticket=TICKET, dense=TICKET, one__shot=TICKET)], UNDECIDED),  # one round cannot show both ends
        (
            8,
            [at(s, ticket=TICKET, dense=TICKET, one__shot=arm(a)) for s, a in ((0.5, 0.951), (0.1, 0.9))],
            HOLDS,
        ),
        (8, [at(0.1, ticket=TICKET, dense=TICKET)], NOT_TESTED),
        (9, [at(0.1, reinit=arm(0.9), init__magnitude=arm(0.85))], HOLDS),
        (9, [at(0.1, reinit=arm(0.9), init__magnitude=arm(0.92))], DOES_NOT),
        (9, [at(0.1, reinit=arm(0.9))], NOT_TESTED),
    ],
)
def test_claims_of_the_evaluations(number: int, evaluated: Sequence[Evaluated], expected: str) -> None:
    assert status(number, findings((0.2, arm(0.95)), evaluated=evaluated)).status == expected


def noisy(half: float, three: float | None, reinit: float = 0.9) -> Evaluated:
    arms = {"ticket": TICKET, "noise=0.5": arm(half), "reinit": arm(reinit)}
    return Evaluated(3, 0.1, arms if three is None else {**arms, "noise=3": arm(three)})


@pytest.mark.parametrize(
    ("evaluated", "expected"),
    [
        (noisy(0.95, 0.93), HOLDS),
        (noisy(0.93, 0.92), DOES_NOT),  # half a sigma matters
        (noisy(0.95, 0.96), DOES_NOT),  # more costs nothing
        (noisy(0.95, 0.85), DOES_NOT),  # reinit is better than 3 sigma
        (noisy(0.95, None), UNDECIDED),
    ],
)
def test_the_claim_on_noise(evaluated: Evaluated, expected: str) -> None:
    assert status(6, findings((0.2, arm(0.95)), evaluated=[evaluated])).status == expected


def test_noise_is_judged_where_most_levels_were_tried_and_by_the_highest() -> None:
    """At 10 % half a sigma alone was tried; at 50 % one sigma costs nothing, three do."""
    several = Evaluated(2, 0.5, {**noisy(0.95, 0.93).arms, "noise=1": arm(0.96)})
    assert status(6, findings((0.2, arm(0.95)), evaluated=[several, noisy(0.93, None)])).status == HOLDS


@pytest.mark.parametrize(
    ("movement", "expected"),
    [
        ([(0.5, 0.3), (0.51, 0.29), (0.52, 0.33)], HOLDS),
        ([(0.3, 0.5), (0.29, 0.51), (0.33, 0.52)], DOES_NOT),
        ([(0.5, 0.3), (0.3, 0.5)], UNDECIDED),
        ([(0.5, 0.3)], NOT_TESTED),
        ([], NOT_TESTED),
    ],
)
def test_the_claim_on_movement(movement: Sequence[tuple[float, float]], expected: str) -> None:
    assert status(7, findings((0.2, arm(0.95)), movement=movement)).status == expected


def test_what_is_not_tested_names_a_command() -> None:
    for claim in claims.of_run(findings((0.2, arm(0.95)))):
        if claim.status == NOT_TESTED:
            assert "ticketfind search" in claim.figures or "ticketfind eval" in claim.figures, claim


def test_figures_are_those_of_the_run() -> None:
    first = status(1, findings((0.2, arm(0.96, 400))))
    assert "at 20 % 96.00 %, dense 95.00 %: +1.00 points" in first.figures and "-100 iterations" in first.figures
    seventh = status(7, findings((0.2, arm(0.95)), movement=[(0.5, 0.25), (0.7, 0.35)]))
    assert "0.6000" in seventh.figures and "0.3000" in seventh.figures


def test_no_claim_holds_by_one_replicate() -> None:
    one = {name: arm(a, n=1) for name, a in [("ticket", 0.95), ("reinit", 0.8), ("random", 0.5), ("noise=0.5", 0.95)]}
    found = Findings(
        rounds((1.0, arm(0.95, n=1)), (0.2, arm(0.99, 100, n=1)), (0.05, arm(0.5, n=1))),
        [Evaluated(1, 0.2, one)],
        movement=[(0.5, 0.1)],
    )
    assert {claim.status for claim in claims.of_run(found)} == {NOT_TESTED}


PRUNED = (0.5, arm(0.96)), (0.2, arm(0.955))


@pytest.mark.parametrize(
    ("dropped", "plain", "expected"),
    [
        (findings((0.5, arm(0.98)), dense=(1.0, arm(0.97))), findings(*PRUNED), HOLDS),
        (findings((0.5, arm(0.98)), dense=(1.0, arm(0.94))), findings(*PRUNED), DOES_NOT),  # dropout alone hurts
        (findings((0.5, arm(0.96)), dense=(1.0, arm(0.97))), findings(*PRUNED), DOES_NOT),  # pruning hurts it
        (
            findings((0.5, arm(0.965)), dense=(1.0, arm(0.96))),
            findings((0.5, arm(0.98))),
            DOES_NOT,
        ),  # less than pruning
        (findings((0.5, arm(0.98)), dense=(1.0, arm(0.951))), findings(*PRUNED), UNDECIDED),
        (findings(), findings(*PRUNED), NOT_TESTED),
        (findings((0.5, arm(0.98, n=1)), dense=(1.0, arm(0.97, n=1))), findings(*PRUNED), NOT_TESTED),
    ],
)
def test_the_claim_on_dropout(dropped: Findings, plain: Findings, expected: str) -> None:
    claim = beside.dropout_adds_up(dropped, plain, 0.5)
    assert (claim.number, claim.text, claim.status) == (11, claims.TEXTS[11], expected)


def test_choosing_the_best_of_many_rounds_costs_confidence() -> None:
    """Welch's interval by scipy, at 95 % shared out over the rounds that the two best were chosen from."""
    best, other = arm(0.963), arm(0.96)
    dropped = findings(*[(0.5**n, best if n == 1 else arm(0.9)) for n in range(1, 7)], dense=(1.0, arm(0.94)))
    plain = findings(*[(0.5**n, other if n == 1 else arm(0.9)) for n in range(1, 5)])
    values = [np.array(found.accuracy_early.values) for found in (best, other)]
    interval = stats.ttest_ind(*values, equal_var=False).confidence_interval(1 - 0.05 / 10)
    figures = beside.dropout_adds_up(dropped, plain, 0.5).figures
    assert f"(95 %: {100 * interval.low:+.2f} to {100 * interval.high:+.2f}) from the highest without" in figures


def test_the_fall_from_the_hill_is_corrected_for_the_choice_of_its_top() -> None:
    """Welch's interval by scipy, at 95 % shared out over the pruned rounds."""
    top, last = arm(0.97), arm(0.968)
    shares = [(0.5**n, top if n == 1 else last if n == 6 else arm(0.96)) for n in range(1, 7)]
    values = [np.array(found.accuracy_early.values) for found in (last, top)]
    interval = stats.ttest_ind(*values, equal_var=False).confidence_interval(1 - 0.05 / 6)
    figures = status(3, findings(*shares)).figures
    assert f"(95 %: {100 * interval.low:+.2f} to {100 * interval.high:+.2f}) from there" in figures
