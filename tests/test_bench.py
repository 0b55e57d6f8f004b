"""The benchmark times what it says: its cases train, and the plain loop trains as ticketfind does. No timings here."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from one_arm import OneArm

from ticketfind import TicketfindError, bench
from ticketfind.arms import Task
from ticketfind.batches import Order
from ticketfind.devices import EAGER
from ticketfind.outputs import cross_entropy
from ticketfind.recipe import Train


@pytest.mark.parametrize(
    "optimizer", [{"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adam"}, {"optimizer": "adamw"}]
)
def test_the_plain_loop_trains_as_a_lane_does(
    optimizer: dict, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """The same batches under the same mask: the same losses, so that the two may be compared in time."""
    task, how = make_task("normed"), make_train(**{"lr": 0.01, "weight_decay": 1e-2, **optimizer})
    kept, order = bench.mask_of(task), Order(3, 16, 0, 12)
    losses: list[float] = []

    def noted(outputs, targets):
        losses.append(cross_entropy(outputs, targets).item())
        return cross_entropy(outputs, targets)

    start = {name: value.clone() for name, value in task.model.state_dict().items()}
    run = bench.plain_loop(replace(task, loss=noted), lambda: task.data.train.batches(order), how, kept)
    run(12)
    lane = OneArm(task.model, start, kept, how, cross_entropy, 0)
    expected = lane.advance(task.data.train.batches(order), 0)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert len(losses) == 12


def test_cases_and_their_measures(make_task: Callable[..., Task], make_train: Callable[..., Train]) -> None:
    cases = bench.cases(make_task(), make_train(), base=EAGER, ways=["eager", "processes"], arms=(1, 2))
    found = [(case.name, case.way, case.arms) for case in cases]
    assert found[:4] == [("plain", "plain", 1), ("dense", "eager", 1), ("masked", "eager", 1), ("masked", "eager", 2)]
    assert found[4:] in ([], [("masked", "processes", 2)])
    ticks: list[int] = []
    timings = bench.measure(cases, blocks=2, seconds=0.01, tick=ticks.append)
    assert [timing.case for timing in timings] == cases and sum(ticks) == 2 * len(cases)
    assert all(len(timing.ms) == 2 and min(timing.ms) > 0 for timing in timings)


def test_a_busy_machine_makes_no_time_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([2.0, 3.0, 5.0, 1.0])  # with and without the iterations that are timed, twice
    monkeypatch.setattr(bench, "_seconds", lambda case, iterations: next(seconds))
    monkeypatch.setattr(bench, "_iterations", lambda case, seconds: 8)
    (timing,) = bench.measure([bench.Case("plain", "plain", 2, lambda n: None)], blocks=1, seconds=1)
    assert timing.ms == (1000 * 4.0 / 8 / 2,)


def test_a_mask_keeps_a_fifth(make_task: Callable[..., Task]) -> None:
    kept = bench.mask_of(make_task())
    assert sum(int(mask.sum()) for mask in kept.values()) / 432 == pytest.approx(bench.KEPT, abs=0.06)


def test_ratios_are_of_blocks_that_were_timed_in_turn() -> None:
    case = bench.Case("plain", "plain", 1, lambda n: None)
    slow, fast = bench.Timing(case, (2.0, 40.0, 4.0)), bench.Timing(case, (1.0, 10.0, 2.0))
    assert slow.over(fast) == 2 and slow.median == 4


def test_data_that_is_not_resident_is_refused(make_task: Callable[..., Task], make_train: Callable[..., Train]) -> None:
    with pytest.raises(TicketfindError, match="bench: expected resident data of one input tensor"):
        bench.cases(make_task(data=None), make_train(), base=EAGER, ways=["eager"], arms=(5,))
