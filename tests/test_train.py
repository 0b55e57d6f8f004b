"""Whole trainings against plain PyTorch: data order, evaluations, early stop, what is kept."""

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ticketfind import TicketfindError
from ticketfind.arms import Arm, Outcome, Task, measured
from ticketfind.batches import Data, Order, Split, derived_seed
from ticketfind.connection import is_disconnected
from ticketfind.course import Failed
from ticketfind.devices import EAGER
from ticketfind.outputs import accuracy, cross_entropy
from ticketfind.recipe import Train
from ticketfind.train import Point, fit


def batch_indices(examples: int, batch_size: int, seed: int, start: int, stop: int) -> Tensor:
    """The examples of iterations `start` to `stop`, int64 [stop - start, batch_size]."""
    return torch.cat(
        [torch.empty(0, batch_size, dtype=torch.int64), *Order(seed, batch_size, start, stop).indices(examples)]
    )


def fit_one(arm: Arm, task: Task, how: Train, keep_at: int | None = None) -> Outcome:
    ((_, outcome),) = fit([arm], task, how, way=EAGER, keep_at=keep_at)
    return outcome


def same(a: dict[str, Tensor] | None, b: dict[str, Tensor] | None) -> bool:
    """Equal keys, and equal bits under each."""
    return a is not None and b is not None and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------- data order


@settings(deadline=None, max_examples=60)
@given(
    examples=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    start=st.integers(0, 30),
    length=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_any_start_reads_the_same_endless_stream_of_permutations(
    examples: int, batch_size: int, start: int, length: int, seed: int
) -> None:
    stop = start + length
    from_zero = batch_indices(examples, batch_size, seed, 0, stop)
    assert from_zero.shape == (stop, batch_size) and from_zero.dtype == torch.int64  # every batch is full
    assert torch.equal(batch_indices(examples, batch_size, seed, start, stop), from_zero[start:])
    stream = from_zero.flatten().tolist()
    for begin in range(0, len(stream), examples):
        epoch = stream[begin : begin + examples]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(examples))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    epochs = [batch_indices(100, 100, seed, 0, 3) for seed in (0, 1)]
    orders = {tuple(epoch.tolist()) for stream in epochs for epoch in stream}
    assert len(orders) == 6


def test_derived_seeds_do_not_run_into_each_other() -> None:
    purposes = [("order", 1), ("order", 11), ("draws",), ("order",), ("score", 1)]
    seeds = [derived_seed(seed, *purpose) for seed in (0, 1, 11, 111) for purpose in purposes]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(3, "order", 1) == 5970557047402141468  # sha256, on every machine


# ------------------------------------------------------------------------------------- a whole training


@pytest.mark.parametrize("net", ["mlp", "normed"])
def test_fit_is_the_loop_that_people_write(
    net: str, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """Order, schedule, evaluations and metrics of a masked training from iteration 3, against plain PyTorch."""
    how = make_train(iterations=30, batch_size=20, lr=0.1, momentum=0.9, weight_decay=1e-3, eval_every=7)
    task, first = make_task(net), 3
    mask = torch.rand(16, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    start = task.start(1)
    outcome = fit_one(Arm("arm", start, {"fc1.weight": mask}, 8, first), task, how, keep_at=10)

    model = copy.deepcopy(task.model)
    model.load_state_dict(start)
    model.fc1.weight.data *= mask
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    stream = torch.cat(
        [
            torch.randperm(90, generator=torch.Generator().manual_seed(derived_seed(8, "order", epoch)))
            for epoch in range(7)
        ]
    )
    points, losses = [], []
    for iteration in range(first, 30):
        model.train()
        chosen = stream[iteration * 20 : (iteration + 1) * 20]
        loss = F.cross_entropy(model(task.data.train.inputs[chosen]), task.data.train.targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        model.fc1.weight.grad *= mask
        optimizer.step()
        model.fc1.weight.data *= mask
        losses.append(loss.item())
        done = iteration + 1
        if done == 10:
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        if done in (7, 14, 21, 28, 30):
            model.eval()
            with torch.no_grad():
                validation, test = (model(split.inputs) for split in (task.data.validation, task.data.test))
                points.append(
                    Point(
                        done,
                        sum(losses) / len(losses),
                        float(F.cross_entropy(validation, task.data.validation.targets)),
                        sum(validation.argmax(1) == task.data.validation.targets).item() / 40,
                        sum(test.argmax(1) == task.data.test.targets).item() / 60,
                    )
                )
            losses = []

    assert [dataclasses.astuple(point) for point in outcome.points] == [
        pytest.approx(dataclasses.astuple(point), abs=1e-5) for point in points
    ]
    assert outcome.kept is not None
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(outcome.final[name], expected, rtol=0, atol=2e-6, msg=name)
        torch.testing.assert_close(outcome.kept[name], kept[name], rtol=0, atol=2e-6, msg=name)
    assert outcome.points[-1].test_accuracy > 0.5  # it has learned something


@pytest.mark.parametrize("net", ["mlp", "normed"])
@pytest.mark.parametrize("k", [1, 4, 5, 11])
def test_training_restarted_from_what_was_kept_ends_in_the_same_bits(
    net: str, k: int, make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """The data order and the schedule go on from k (plain SGD has no other state)."""
    task, how = make_task(net), make_train(iterations=12, schedule="cosine", warmup=6)
    whole = fit_one(Arm("whole", task.start(2), {}, 9), task, how, keep_at=k)
    assert whole.kept is not None and not same(whole.kept, whole.final)
    rest = fit_one(Arm("rest", whole.kept, {}, 9, first=k), task, how)
    assert same(rest.final, whole.final)
    assert [p.test_accuracy for p in rest.points] == [p.test_accuracy for p in whole.points if p.iteration > k]
    assert rest.points[-1].iteration == 12


def test_keeping_at_the_start_keeps_the_start(make_task: Callable[..., Task], make_train: Callable[..., Train]) -> None:
    task = make_task("normed")
    start = task.start(2)
    outcome = fit_one(Arm("arm", start, {}, 0), task, make_train(), keep_at=0)
    assert same(outcome.kept, start)
    assert not same(outcome.final, start)
    assert fit_one(Arm("arm", start, {}, 0), task, make_train()).kept is None


def test_keeping_between_evaluations_changes_nothing_else(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    task, how = make_task("normed"), make_train(optimizer="adam", lr=1e-2)
    arm = Arm("arm", task.start(2), {}, 0)
    with_keeping, without = fit_one(arm, task, how, keep_at=6), fit_one(arm, task, how)
    assert same(with_keeping.final, without.final)
    assert with_keeping.points == without.points


@pytest.mark.parametrize(
    ("iterations", "every", "first", "expected"),
    [
        (12, 4, 0, [4, 8, 12]),
        (13, 4, 0, [4, 8, 12, 13]),
        (3, 10, 0, [3]),
        (12, 4, 4, [8, 12]),
        (12, 4, 11, [12]),
    ],
)
def test_evaluations_come_at_fixed_iterations_and_at_the_end(
    iterations: int, every: int, first: int, expected: list[int],
    make_task: Callable[..., Task], make_train: Callable[..., Train],
) -> None:  # fmt: skip
    task = make_task()
    how = make_train(iterations=iterations, eval_every=every)
    ticks: list[int] = []
    arm = Arm("arm", task.start(0), {}, 0, first)
    ((_, outcome),) = fit([arm], task, how, way=EAGER, tick=ticks.append)
    assert [point.iteration for point in outcome.points] == expected
    assert sum(ticks) == iterations - first


def test_early_stop_is_the_first_minimum_of_the_validation_loss() -> None:
    """Not the best test accuracy, and not the last of equal minima."""
    points = [(10, 0.9, 0.5), (20, 0.3, 0.7), (30, 0.3, 0.8), (40, 0.4, 0.9)]
    found = measured([Point(i, 0.0, loss, 0.0, test) for i, loss, test in points])
    assert (found.early_stop, found.accuracy_early, found.accuracy_end) == (20, 0.7, 0.9)
    assert found.validation_loss == 0.3


def test_arms_do_not_depend_on_each_other(make_task: Callable[..., Task], make_train: Callable[..., Train]) -> None:
    """One network object serves all arms: an arm ends the same alone as after others, BatchNorm included."""
    task, how = make_task("normed"), make_train(momentum=0.9)
    arms = [Arm(f"arm {seed}", task.start(seed), {}, seed) for seed in range(3)]
    together = [outcome for _, outcome in fit(arms, task, how, way=EAGER)]
    alone = fit_one(arms[2], make_task("normed"), how)
    assert same(together[2].final, alone.final)
    assert together[2].points == alone.points
    statistics = [outcome.final["norm.running_mean"] for outcome in together]
    assert not torch.equal(statistics[0], statistics[1])


def test_dropout_draws_follow_the_arms_seed_and_leave_the_users_generator_alone(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.dropout(x, 0.5, self.training))

    task = make_task(Dropping)
    alike = Split(torch.ones(90, 12), torch.zeros(90, dtype=torch.int64))  # in any order
    task = dataclasses.replace(task, data=dataclasses.replace(task.data, train=alike))
    start, before = task.start(0), torch.get_rng_state()
    one, again, other = (fit_one(Arm("arm", start, {}, seed), task, make_train()).final for seed in (1, 1, 2))
    assert same(one, again) and not same(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_validation_loss_that_is_not_finite_ends_the_training(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    """The training itself stays finite; only what is measured does not."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        value = cross_entropy(outputs, targets)
        return value if len(targets) == 16 else value * math.nan

    task = make_task(loss=loss)
    failed = fit_one(Arm("noise=2, seed 1", task.start(0), {}, 0), task, make_train())
    assert isinstance(failed, Failed) and failed.iteration == 4
    assert failed.reason.startswith(
        "the loss or metric of an evaluation is not finite at iteration 4; try a lower learning rate (now 0.1)"
    )


def test_an_error_that_is_already_ours_is_passed_on(
    make_task: Callable[..., Task], make_train: Callable[..., Train]
) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise TicketfindError("the user's own words")

    task = make_task(loss=loss)
    with pytest.raises(TicketfindError, match=r"^the user's own words$"):
        fit_one(Arm("arm", task.start(0), {}, 0), task, make_train())


# ------------------------------------------------------------------------------------------- the task


def test_given_weights_go_over_the_fresh_ones(make_task: Callable[..., Task]) -> None:
    given = {"fc1.weight": torch.full((16, 12), 0.25)}
    task = make_task(given=given)
    one, other = task.start(0), task.start(1)
    assert torch.equal(one["fc1.weight"], given["fc1.weight"])
    assert same(one, {**task.fresh(0), **given})
    assert not torch.equal(one["fc2.weight"], other["fc2.weight"])


def test_chance_is_that_of_the_test_set(make_task: Callable[..., Task]) -> None:
    task = make_task()
    parts = [Split(torch.zeros(10, 12), (torch.arange(10) >= common).long()) for common in (5, 6, 7)]
    assert dataclasses.replace(task, data=Data(*parts)).chance == 0.7
    assert dataclasses.replace(task, data=None).chance is None


def test_metrics_by_hand() -> None:
    outputs = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.5, 0.0]])
    targets = torch.tensor([0, 1, 1, 0])
    assert accuracy(outputs, targets).item() == 0.75
    by_hand = [
        math.log(1 + math.exp(-1)),
        math.log(1 + math.exp(-1)),
        math.log(1 + math.exp(3)),
        math.log(1 + math.exp(-0.5)),
    ]
    assert cross_entropy(outputs, targets).item() == pytest.approx(sum(by_hand) / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("emptied", "expected"), [([], False), (["fc1.weight"], True), (["fc3.weight"], True), (["fc2.weight"], True)]
)
def test_is_disconnected(emptied: list[str], expected: bool, make_task: Callable[..., Task]) -> None:
    task = make_task()
    start = task.start(0)
    masks = {
        name: torch.full(start[name].shape, name not in emptied) for name in ("fc1.weight", "fc2.weight", "fc3.weight")
    }
    assert is_disconnected(task, start, masks) is expected


def test_a_shortcut_keeps_the_network_connected(make_task: Callable[..., Task]) -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(12, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(x + F.relu(self.fc1(x)))

    task = make_task(Shortcut)
    empty = {"fc1.weight": torch.zeros(12, 12, dtype=torch.bool)}
    assert not is_disconnected(task, task.start(0), empty)
    assert is_disconnected(task, task.start(0), {**empty, "fc2.weight": torch.zeros(4, 12, dtype=torch.bool)})
