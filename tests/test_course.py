"""A training that was stopped, anywhere and any number of times, ends in the bits of one that was never stopped."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from one_arm import OPTIMIZERS, SCHEDULES, begin_as_on_cuda, random_masks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset, TensorDataset

from ticketfind import batches, train
from ticketfind.arms import Arm, Outcome, Task
from ticketfind.batches import Data, Order, Split
from ticketfind.course import Course, Failed, Point, Snapshot, course_of, snapshot, take_up
from ticketfind.devices import EAGER, Way
from ticketfind.engine import Lockstep
from ticketfind.examples import source_of
from ticketfind.lanes import Lane
from ticketfind.outputs import cross_entropy
from ticketfind.recipe import Train
from ticketfind.snapshots import Snapshots
from ticketfind.streams import Flow, Stream
from ticketfind.train import fit

CPU = torch.device("cpu")
MakeTask = Callable[..., Task]
MakeTrain = Callable[..., Train]
linux = pytest.mark.skipif(sys.platform != "linux", reason="arms side by side need Linux")


class Halt(BaseException):
    """As Ctrl-C ends a search."""


@pytest.fixture(autouse=True)
def _every_iteration_is_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings can be kept and ended after each iteration, and after every few examples of an evaluation."""
    monkeypatch.setattr(train, "PAUSE", 0.0)
    monkeypatch.setattr(batches, "chunk_size", lambda size, inputs: size)


# --------------------------------------------------------------------------------------- what is trained


class Restless(nn.Module):
    """[b, 12] -> [b, 4]. Dropout, BatchNorm, tied weights, a weight without a gradient, and one that has it seldom.

    It draws from torch's, numpy's and Python's generators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 16, bias=False), nn.Linear(16, 16), nn.Linear(16, 16)
        self.fc3.weight = self.fc2.weight
        self.norm, self.dropout, self.head = nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 4)
        self.unused, self.seldom = nn.Linear(3, 3), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.fc1(x)))
        if self.training:
            x = x * (1 + 0.1 * random.random()) + 0.1 * float(np.random.rand())
            if np.random.rand() < 0.4:
                x = x + self.seldom(x)
        return self.head(self.dropout(F.relu(self.fc3(F.relu(self.fc2(x))))))


class Dropping(nn.Module):
    """[b, 12] -> [b, 4], for compilers and vmap: dropout and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(F.relu(self.norm(self.fc1(x))), 0.3, self.training))


class Picture(nn.Module):
    """[b, 1, 8, 8] -> [b, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(108, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.dropout(F.relu(self.norm(self.conv(x))).flatten(1), 0.2, self.training))


class Flowing(IterableDataset[Any]):
    """40 pictures that differ from pass to pass, drawn at random."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for number in range(40):
            yield torch.randn(1, 8, 8) + self.epoch / 10 + random.random(), number % 4


def pictures(kind: str) -> Data:
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randn(50, 1, 8, 8, generator=generator), torch.arange(50) % 4)
    if kind == "flow":
        return Data(Flow(source_of(Flowing(), "data"), 40), split, split, ("flip",))
    if kind.startswith("stream"):
        source = source_of(TensorDataset(split.inputs, split.targets), "data")
        stream = Stream(source, torch.arange(50), workers=int(kind.removeprefix("stream-")))
        return Data(stream, stream, stream, ("flip", "crop"))
    return Data(split, split, split, ("flip", "crop") if kind == "augmented" else ())


def slowly(outputs: Any, targets: Tensor) -> Tensor:
    """Processes tell what they have done ten times a second."""
    time.sleep(0.03)
    return cross_entropy(outputs, targets)


def arms_of(task: Task, *firsts: int) -> list[Arm]:
    """An arm for each; the second, the fourth... are masked."""
    kept = random_masks(task.model, 0.5)
    return [
        Arm(f"arm {n}", task.start(n), kept if n % 2 else {}, n, first, replicate=n) for n, first in enumerate(firsts)
    ]


# ---------------------------------------------------------------------------------- stopping and comparing


@dataclasses.dataclass
class Trial:
    """A training that is carried out with and without interruptions."""

    task: Task
    how: Train
    arms: list[Arm]
    way: Way = EAGER
    keep_at: int | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    told: int = 0
    """Iterations, of all the processes of one that is stopped again and again."""
    kept: int = 0
    """How often it was stopped and left a snapshot."""

    def run(self, snapshots: Any = None, tick: Callable[[int], None] = lambda n: None) -> list[Outcome | Failed]:
        trained = fit(
            self.arms, self.task, self.how, way=self.way, keep_at=self.keep_at, tick=tick, note=self.notes.append,
            snapshots=snapshots,
        )  # fmt: skip
        with contextlib.closing(trained):
            return [outcome for _, outcome in trained]

    def moments(self) -> list[int]:
        """What a training that is not stopped tells, call by call: the iterations done."""
        told: list[int] = []
        self.run(tick=told.append)
        return told

    def stopped_at(self, call: int, snapshots: Any) -> None:
        """Train until something is told for the `call`-th time (from 0)."""
        calls = itertools.count()

        def tick(iterations: int) -> None:
            if next(calls) == call:
                raise Halt

        with pytest.raises(Halt):
            self.run(snapshots, tick)

    def stopped_again_and_again(self, snapshots: Callable[[], Any], iterations: int = 1) -> list[Outcome | Failed]:
        """Each process does so many iterations, until all is done."""
        total = sum(int(self.how.iterations) - arm.first for arm in self.arms)
        self.told = 0
        for _ in range(total + len(self.arms) + 1):
            left = iterations

            def tick(done: int) -> None:
                nonlocal left
                left -= done
                self.told += done
                if done and left <= 0:
                    raise Halt

            with contextlib.suppress(Halt):
                return self.run(snapshots(), tick)
            self.kept += snapshots().done(0, range(len(self.arms))) > 0
        raise AssertionError("it does not get on")


def assert_same_bits(found: Sequence[Outcome | Failed], expected: Sequence[Outcome | Failed]) -> None:
    """Everything that comes of a training, not one number of which is allowed to differ."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, Failed) or isinstance(other, Failed):
            assert one == other
            continue
        assert (one.began, one.points, one.measured) == (other.began, other.points, other.measured)
        assert (one.kept is None) == (other.kept is None)
        for state, wanted in ((one.final, other.final), (one.kept or {}, other.kept or {})):
            assert state.keys() == wanted.keys()
            for name, value in state.items():
                assert value.dtype == wanted[name].dtype and torch.equal(value, wanted[name]), name


# ------------------------------------------------------------------------------ every way, every optimizer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("net", "extra"),
    [
        ("mlp", SCHEDULES["warmup-cosine"]),
        ("tied", {"clip": 0.3, **SCHEDULES["step"]}),
        (Restless, {"clip": 1.0, **SCHEDULES["warmup"]}),
    ],
)
def test_stopped_after_every_iteration_it_ends_in_the_same_bits(
    net: Any, extra: dict[str, Any], optimizer: str, make_task: MakeTask, make_train: MakeTrain, tmp_path: Path
) -> None:
    """A dense arm, a masked one, and a masked one that begins at iteration 5, as rewound rounds do."""
    task = make_task(net)
    how = make_train(iterations=12, eval_every=5, **{**extra, **OPTIMIZERS[optimizer], "lr": 0.02})
    trial = Trial(task, how, arms_of(task, 0, 0, 5), keep_at=7)
    expected = trial.run()
    assert_same_bits(trial.stopped_again_and_again(lambda: Snapshots(tmp_path, None)), expected)
    assert trial.told == 12 + 12 + 7 == trial.kept  # nothing is done twice
    assert not trial.notes
    finals = [outcome.final for outcome in expected if isinstance(outcome, Outcome)]
    assert all(not torch.equal(finals[0][name], finals[1][name]) for name in arms_of(task, 0, 0)[1].masks)


@pytest.mark.parametrize(
    ("way", "optimizer"),
    [
        ("eager", "adamw"),
        pytest.param("processes", "sgd-momentum-decay", marks=linux),
        ("stacked", "sgd-momentum-decay"),
        ("stacked", "adamw"),
        ("graph", "sgd-momentum-decay"),
        ("graph", "adamw"),
        ("compile", "adam"),
    ],
)
def test_every_way_goes_on_in_the_same_bits(
    way: str, optimizer: str, make_task: MakeTask, make_train: MakeTrain, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """graph: its steps as on a CUDA device, one by one. compile: with the backend that generates no C++."""
    if way == "graph":
        begin_as_on_cuda(monkeypatch)
    if way == "compile":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    task = make_task(Dropping, **({"loss": slowly} if way == "processes" else {}))
    how = make_train(iterations=12, eval_every=5, clip=1.0, schedule="cosine", **{**OPTIMIZERS[optimizer], "lr": 0.02})
    trial = Trial(task, how, arms_of(task, 0, 0, 0, 5), Way(way, at_once=2), keep_at=4)
    expected = trial.run()
    assert_same_bits(trial.stopped_again_and_again(lambda: Snapshots(tmp_path, None), 3), expected)
    assert trial.kept >= 2 and (trial.told == 3 * 12 + 7 or way == "processes")
    assert not trial.notes


@pytest.mark.slow
def test_compiled_training_goes_on_in_the_same_bits(make_task: MakeTask, make_train: MakeTrain, tmp_path: Path) -> None:
    task = make_task(Dropping)
    trial = Trial(task, make_train(optimizer="adam", lr=0.02), arms_of(task, 0, 5), Way("compile"), keep_at=4)
    expected = trial.run()
    assert_same_bits(trial.stopped_again_and_again(lambda: Snapshots(tmp_path, None), 5), expected)
    assert not trial.notes


@pytest.mark.parametrize(
    ("way", "keep_at"), [("eager", None), ("eager", 0), ("eager", 5), ("stacked", 7), ("graph", 10)]
)
def test_stopped_at_any_moment_it_ends_in_the_same_bits(
    way: str, keep_at: int | None, make_task: MakeTask, make_train: MakeTrain, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """After each iteration and within each evaluation; before, at and after the iteration whose weights are kept."""
    if way == "graph":
        begin_as_on_cuda(monkeypatch)
    task = make_task(Dropping)
    how = make_train(iterations=12, eval_every=5, optimizer="adam", lr=0.02)
    arms = 1 if way == "eager" else 2
    trial = Trial(task, how, arms_of(task, 0, 0)[-arms:], Way(way, at_once=2), keep_at)
    expected, moments = trial.run(), trial.moments()
    assert sum(moments) == arms * 12 and moments.count(0) == 3 * (3 + 4)  # evaluations, chunks of their examples
    for call in range(len(moments)):
        snapshots = Snapshots(tmp_path / str(call), None)
        trial.stopped_at(call, snapshots)
        assert snapshots.done(0, range(2)) == sum(moments[: call + 1])
        assert_same_bits(trial.run(snapshots), expected)
    assert not trial.notes


def test_what_a_network_draws_in_evaluations_is_drawn_anew_when_one_is_done_again(
    make_task: MakeTask, make_train: MakeTrain, tmp_path: Path
) -> None:
    """Stopped in the middle of an evaluation, which is done again from its start: with the same draws."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.dropout(x, 0.5)) + float(np.random.rand())

    task = make_task(Noisy)
    trial = Trial(task, make_train(iterations=6, eval_every=3), arms_of(task, 0))
    expected, moments = trial.run(), trial.moments()
    for call in range(len(moments)):
        snapshots = Snapshots(tmp_path / str(call), None)
        trial.stopped_at(call, snapshots)
        assert_same_bits(trial.run(snapshots), expected)


@pytest.mark.parametrize("way", ["eager", "stacked"])
def test_where_a_training_is_kept_and_how_quick_it_is_changes_nothing(
    way: str, make_task: MakeTask, make_train: MakeTrain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Moments at each iteration or at evaluations only; and where a way cannot train several arms as one."""

    class Branching(Dropping):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else -super().forward(x)

    task = make_task(Branching)
    how = make_train(iterations=12, eval_every=6)
    trial = Trial(task, how, arms_of(task, 0, 0, 0), Way(way, at_once=3))
    expected = trial.run()
    assert_same_bits(trial.run(Snapshots(tmp_path, 1e-9)), expected)
    monkeypatch.setattr(train, "PAUSE", 1e9)
    assert_same_bits(trial.run(), expected)
    assert len(trial.notes) == (way == "stacked")


# ------------------------------------------------------------------------------------------- every kind of data


@pytest.mark.parametrize("kind", ["resident", "augmented", "stream-0", "stream-2", "flow"])
@pytest.mark.parametrize("way", ["eager", "stacked"])
def test_the_data_go_on_where_they_were(
    way: str, kind: str, make_task: MakeTask, make_train: MakeTrain, tmp_path: Path
) -> None:
    """Order, augmentation, what is drawn where examples are read; 12 iterations are several passes."""
    task = make_task(Picture, data=pictures(kind))
    how = make_train(iterations=12, eval_every=5, optimizer="adam", lr=0.02)
    trial = Trial(task, how, arms_of(task, 0, 0, 5)[:: 1 if kind in ("resident", "augmented") else 2], Way(way, 2))
    expected = trial.run()
    step = 1 if kind in ("resident", "augmented", "stream-0") else 4
    assert_same_bits(trial.stopped_again_and_again(lambda: Snapshots(tmp_path, None), step), expected)
    assert not trial.notes


# -------------------------------------------------------------------------------------- killed, not stopped


class Killed(Snapshots):
    """As where a process is killed: there is no time to keep anything more."""

    def offer(self, arms: Sequence[Arm], take: Callable[[], Snapshot], *, now: bool = False) -> None:
        if not now:
            super().offer(arms, take)


@pytest.mark.parametrize("way", ["eager", pytest.param("processes", marks=linux), "stacked"])
def test_killed_it_goes_on_from_the_last_snapshot(
    way: str, make_task: MakeTask, make_train: MakeTrain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ticketfind.snapshots.SHARE", 1e9)  # as many as there is time for
    task = make_task(Restless if way == "eager" else Dropping)
    how = make_train(iterations=40, eval_every=11, optimizer="adam", lr=0.02)
    trial = Trial(task, how, arms_of(task, 0, 0), Way(way, at_once=2), keep_at=7)
    expected = trial.run()
    for call in (1, 9, 30, 60):
        snapshots = Killed(tmp_path / str(call), 1e-9)
        if way == "processes":  # what its processes tell, and when, is up to them
            call //= 30
        trial.stopped_at(call, snapshots)
        snapshots.settle()
        assert_same_bits(trial.run(snapshots), expected)
    assert not trial.notes


# -------------------------------------------------------------------------------------- arms that fail


@pytest.mark.parametrize("way", ["eager", pytest.param("processes", marks=linux), "stacked", "graph"])
def test_an_arm_that_has_failed_stays_failed_and_the_others_go_on(
    way: str, make_task: MakeTask, make_train: MakeTrain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Arm 1 reads a number that is none at iteration 6; the stops come before and after it."""
    if way == "graph":
        begin_as_on_cuda(monkeypatch)
    task = make_task(Dropping, **({"loss": slowly} if way == "processes" else {}))
    data = task.data
    assert data is not None and isinstance(data.train, Split)
    read = [torch.cat([*Order(seed, 3, 0, 12).indices(90)]) for seed in range(3)]
    bad = next(int(i) for i in read[1][6] if i not in read[0] and i not in read[2])
    data.train.inputs[bad, 3] = math.nan
    how = make_train(iterations=12, eval_every=5, batch_size=3, lr=0.02)
    trial = Trial(task, how, arms_of(task, 0, 0, 0), Way(way, at_once=3), keep_at=9)
    expected = trial.run()
    assert isinstance(expected[1], Failed) and expected[1].iteration == 6
    assert isinstance(expected[0], Outcome) and isinstance(expected[2], Outcome)
    assert_same_bits(trial.stopped_again_and_again(lambda: Snapshots(tmp_path, None), 3), expected)
    assert trial.kept >= 2 and not trial.notes


def test_a_training_whose_arms_have_all_failed_ends_there(make_task: MakeTask, make_train: MakeTrain) -> None:
    task = make_task()
    huge = {name: value * 1e30 for name, value in task.start(0).items()}
    arms = [Arm(f"arm {n}", huge, {}, n) for n in range(2)]
    for way in (Way("stacked", at_once=2), EAGER):
        trial = Trial(task, make_train(iterations=400, eval_every=400), arms, way)
        found, moments = trial.run(), trial.moments()
        assert all(isinstance(outcome, Failed) and outcome.iteration < 3 for outcome in found)
        assert sum(moments) < 10


@pytest.mark.parametrize("way", ["eager", pytest.param("processes", marks=linux), "stacked", "graph"])
def test_final_weights_that_are_not_finite_fail_their_arm_and_are_named(
    way: str, make_task: MakeTask, make_train: MakeTrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite to the end; a weight that it does not depend on is not."""
    if way == "graph":
        begin_as_on_cuda(monkeypatch)

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.aside = nn.Linear(12, 4), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + 0 * torch.where(self.aside < 1e9, self.aside, 0.0).sum()

    task = make_task(Aside)
    arms = arms_of(task, 0, 0, 0)
    arms[1].start["aside"] = torch.tensor([1.0, math.inf])
    found = Trial(task, make_train(), arms, Way(way, at_once=3)).run()
    assert isinstance(found[1], Failed)
    assert found[1].iteration == 12 and found[1].reason.startswith("aside is not finite at iteration 12;")
    arms[1].start["aside"] = torch.ones(2)
    beside = Trial(task, make_train(), arms, Way(way, at_once=3)).run()
    assert_same_bits([found[0], found[2]], [beside[0], beside[2]])


# ---------------------------------------------------------------------------------------- the parts of it


def drawn() -> list[float]:
    """The next number of each generator."""
    return [float(torch.rand(())), float(np.random.rand()), random.random(), random.gauss(0, 1)]


@pytest.fixture
def under_way(make_task: MakeTask, make_train: MakeTrain) -> Callable[[int], Lockstep]:
    """under_way(n): a training after n iterations."""
    task = make_task(Restless)

    def begun(iterations: int) -> Lockstep:
        assert task.data is not None
        lane = Lane(
            make_task(Restless).model, task.start(0), random_masks(task.model), make_train(optimizer="adam"),
            cross_entropy,
        )  # fmt: skip
        training = Lockstep([lane], [task.data.training(Order(0, 16, 0, 12))], make_train(optimizer="adam"))
        if iterations:
            training.advance(iterations)
        return training

    return begun


def test_a_snapshot_is_a_copy_and_holds_everything(under_way: Callable[[int], Lockstep]) -> None:
    with batches.seeded(3):
        training = under_way(4)
        random.gauss(0, 1)  # it draws two, and keeps one
        course = Course(
            4, ["digest"], [[Point(2, 0.25, 0.1 + 0.2, 0.5, 0.75), Point(4, None, 1e-17, 0.0, 1.0)]],
            [[0.1, 1 / 3]], [None], training.states(),
        )  # fmt: skip
        found = snapshot(course, training, CPU)
        expected = [tensor.clone() for tensor in training.everything()]
        next_numbers = drawn()
        training.advance(2)
    assert any(not torch.equal(a, b) for a, b in zip(training.everything(), expected, strict=True))
    found = Snapshot(found.tensors, json.loads(json.dumps(found.facts)))  # as from a file
    with batches.seeded(99):
        other = under_way(0)
        take_up(found, other, CPU)
        assert all(torch.equal(a, b) for a, b in zip(other.everything(), expected, strict=True))
        assert drawn() == next_numbers
    again = course_of(found, 1, 0, 12)
    assert dataclasses.replace(again, kept=[]) == dataclasses.replace(course, kept=[])
    assert [state.keys() for state in again.kept] == [state.keys() for state in course.kept]
    assert all(torch.equal(value, course.kept[0][name]) for name, value in again.kept[0].items())


@pytest.mark.parametrize("what", ["another tensor", "another type", "one more", "one less", "no draws"])
def test_a_snapshot_of_another_training_is_refused_and_changes_nothing(
    what: str, under_way: Callable[[int], Lockstep]
) -> None:
    with batches.seeded(1):
        training = under_way(1)
        found = snapshot(Course.new(1, ["digest"]), training, CPU)
        tensors, last = dict(found.tensors), f"training/{len(training.everything()) - 1}"
        if what == "another tensor":
            tensors["training/0"] = torch.zeros(3, 3)
        elif what == "another type":
            tensors["training/0"] = tensors["training/0"].double()
        elif what == "one more":
            tensors |= {last: tensors["training/0"]}
        elif what == "one less":
            del tensors[last]
        else:
            del tensors["drawn/cpu"]
        other = under_way(3)
        before, states = [tensor.clone() for tensor in other.everything()], drawn_states()
        with pytest.raises((KeyError, ValueError)):
            take_up(Snapshot(tensors, found.facts), other, CPU)
        assert all(torch.equal(a, b) for a, b in zip(other.everything(), before, strict=True))
        assert drawn_states() == states


def drawn_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]


def test_a_course_knows_whether_it_is_measured_and_over() -> None:
    course = Course.new(3, ["a", "b"])
    assert not course.is_measured(3) and not course.is_over
    course.points[1].append(Point(5, 0.1, 0.1, 0.1, 0.1))
    assert course.is_measured(5) and course.is_measured(4) and not course.is_measured(6)
    course.failed[0] = Failed(4, "why")
    assert not course.is_over
    course.failed[1] = Failed(5, "why")
    assert course.is_over
