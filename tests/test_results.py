import dataclasses
import json
import math

import numpy as np
import pytest

from ticketfind import results
from ticketfind.results import Measured, Spread, Stats


def measured(early, end=None, loss=0.1, stop=100):
    return Measured(
        early_stop=stop, accuracy_early=early, accuracy_end=early if end is None else end, validation_loss=loss
    )


def stats(*accuracies):
    return Stats.of([measured(a) for a in accuracies])


def test_spread_is_mean_and_sample_standard_deviation():
    values = [0.9, 0.95, 0.93]
    found = Spread.of(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    assert found.values == tuple(values)
    assert Spread.of([0.9]) == Spread(0.9, None, (0.9,))


def around(mean, sd):
    """The 95 % interval of two values: t is 12.706 with one degree of freedom."""
    half = 12.7062047 * sd / 2**0.5
    return {"interval": pytest.approx([mean - half, mean + half])}


def test_stats_sum_up_each_quantity_and_are_plain_json():
    found = Stats.of([measured(0.5, end=0.4, stop=100), measured(0.7, end=0.6, stop=300)])
    assert json.loads(json.dumps(found.json())) == {
        "accuracy_early": {
            "mean": pytest.approx(0.6),
            "sd": pytest.approx(0.02**0.5),
            **around(0.6, 0.02**0.5),
            "values": [0.5, 0.7],
        },
        "accuracy_end": {
            "mean": pytest.approx(0.5),
            "sd": pytest.approx(0.02**0.5),
            **around(0.5, 0.02**0.5),
            "values": [0.4, 0.6],
        },
        "early_stop": {"mean": 200, "sd": pytest.approx(20_000**0.5), **around(200, 20_000**0.5), "values": [100, 300]},
        "replicates": 2,
    }


@pytest.mark.parametrize(
    ("dense", "given", "expected"),
    [
        ((0.9, 0.8), None, math.sqrt(0.005)),  # one standard deviation of the dense replicates
        ((0.9, 0.8), 1.5, 0.015),  # percentage points
        ((0.9, 0.8), 0.0, 0.0),
        ((0.9,), None, math.sqrt(0.9 * 0.1 / 400)),  # one standard error of a proportion
        ((0.9, 0.9), None, math.sqrt(0.9 * 0.1 / 400)),  # nor any spread: as with one replicate
        ((1.0,), None, 0.0),
        ((7.5,), None, 0.0),  # a metric that is no proportion
    ],
)
def test_tolerance(dense, given, expected):
    assert results.tolerance(stats(*dense), given, test_size=400) == pytest.approx(expected)


def test_means_that_are_equal_but_for_rounding_match():
    """0.8 - 0.1 is more than 0.7 in floating point."""
    assert results.is_matching(stats(0.7), stats(0.8), 0.1)
    assert not results.is_matching(stats(0.7 - 1e-6), stats(0.8), 0.1)


@pytest.mark.parametrize(("accuracy", "expected"), [(0.95, True), (0.875, True), (0.874, False)])
def test_matching_is_the_mean_within_the_tolerance(accuracy, expected):
    assert results.is_matching(stats(accuracy), stats(1.0), 0.125) is expected


def test_several_trainings_of_a_replicate_count_as_their_mean():
    found = results.average([measured(0.5, 0.4, 1.0, 100), measured(0.7, 0.5, 3.0, 300)])
    assert dataclasses.astuple(found) == pytest.approx((200, 0.6, 0.45, 2.0))
    assert results.average([measured(0.5, loss=1.0), measured(0.7, loss=None)]).validation_loss is None


@pytest.mark.parametrize(("accuracy", "expected"), [(0.1, True), (0.1299, True), (0.1301, False)])
def test_chance_is_left_behind_by_two_standard_errors(accuracy, expected):
    """One standard error of 10 % over 400 examples is 1.5 points."""
    assert results.is_chance(Stats.of([measured(accuracy, end=0.12)]), 0.1, 400) is expected
    assert results.is_chance(stats(0.1), 0.1, None) and not results.is_chance(stats(0.1001), 0.1, None)


def log(rounds):
    """Log lines of {round: [(accuracy, validation loss) of each replicate]}."""
    return [
        {
            "round": number,
            "replicate": replicate,
            "remaining": 0.8**number,
            "test_size": 400,
            "early_stop": 100,
            "accuracy_early": accuracy,
            "accuracy_end": 0.0,
            "validation_loss": loss,
            "curve": {},
        }
        for number, replicates in rounds.items()
        for replicate, (accuracy, loss) in enumerate(replicates)
    ]


def test_rounds_of_a_log():
    lines = log({0: [(0.90, 2), (0.92, 1)], 1: [(0.95, 1), (0.91, 2)], 2: [(0.80, 3), (0.82, 2)]})
    rounds = results.rounds_of(reversed(lines), replicates=2, given_tolerance=None)  # whatever the order of the lines
    assert [r.round for r in rounds] == [0, 1, 2]
    assert [r.remaining for r in rounds] == [1.0, 0.8, 0.8**2]
    assert [r.matching for r in rounds] == [True, True, False]
    assert [r.stats.accuracy_early.values for r in rounds] == [(0.90, 0.92), (0.95, 0.91), (0.80, 0.82)]


def test_the_best_replicate_is_chosen_without_the_test_set():
    (dense,) = results.rounds_of(log({0: [(0.99, 2.0), (0.5, 1.0)]}), replicates=2, given_tolerance=None)
    assert dense.best_replicate == 1
    (dense,) = results.rounds_of(log({0: [(0.5, 1.0), (0.99, 1.0)]}), replicates=2, given_tolerance=None)
    assert dense.best_replicate == 0  # the first of equals


def test_a_replicate_that_fails_is_missing_from_its_round_on():
    lines = log({0: [(0.8, 1), (0.9, 1), (1.0, 1)], 1: [(0.0, 0), (0.7, 1), (0.9, 1)], 2: [(0, 0), (0.6, 1), (0.7, 1)]})
    lines = [line for line in lines if line["round"] == 0 or line["replicate"] > 0]
    lines.append({"round": 1, "replicate": 0, "failed": "the loss is not finite"})
    rounds = results.rounds_of(lines, replicates=3, given_tolerance=None)
    assert [r.stats.accuracy_early.values for r in rounds] == [(0.8, 0.9, 1.0), (0.7, 0.9), (0.6, 0.7)]
    assert [r.replicates for r in rounds] == [(0, 1, 2), (1, 2), (1, 2)]
    assert [dict(r.failed) for r in rounds] == [{}, {0: "the loss is not finite"}, {}]
    assert [r.matching for r in rounds] == [True, True, False]  # by the spread of all three dense replicates, 0.1


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], []),
        (log({0: [(0.9, 1)]}), []),  # one replicate of two
        (log({0: [(0.9, 1), (0.9, 1)], 1: [(0.9, 1)]}), [0]),
        (log({0: [(0.9, 1), (0.9, 1)], 2: [(0.9, 1), (0.9, 1)]}), [0, 2]),  # a round that is not measured
        (log({0: [(0.9, 1), (0.9, 1)], 1: [(0.9, 1)], 2: [(0.9, 1), (0.9, 1)]}), [0, 2]),  # or not yet
        (log({1: [(0.9, 1), (0.9, 1)]}), []),  # without a dense one
    ],
)
def test_only_rounds_with_all_their_replicates_count(lines, expected):
    assert [r.round for r in results.rounds_of(lines, replicates=2, given_tolerance=None)] == expected


@pytest.mark.parametrize(
    ("accuracies", "winner"),
    [
        ([0.9, 0.95, 0.91, 0.5], 2),
        ([0.9, 0.5, 0.91, 0.5], 2),  # after a round that does not match
        ([0.9, 0.5, 0.4], None),
        ([0.9], None),  # the dense network is no ticket
    ],
)
def test_the_winner_is_the_sparsest_matching_round(accuracies, winner):
    lines = log({number: [(accuracy, 1)] for number, accuracy in enumerate(accuracies)})
    found = results.winner_of(results.rounds_of(lines, replicates=1, given_tolerance=0.5))
    assert (found and found.round) == winner


def test_a_round_as_json():
    (dense,) = results.rounds_of(log({0: [(0.9, 1)]}), replicates=1, given_tolerance=None)
    assert dense.json() == {"round": 0, "remaining": 1.0, "matching": True, "failed": {}, **stats(0.9).json()} | {
        "accuracy_end": {"mean": 0.0, "sd": None, "interval": None, "values": (0.0,)}
    }
