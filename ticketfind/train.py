"""Training arms and measuring them: schedule of evaluations, early stop, metrics. Knows no rounds and no disk."""

import copy
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ticketfind import TicketfindError, engine
from ticketfind.batches import Data, Order, derived_seed
from ticketfind.engine import Tick
from ticketfind.masks import Masks
from ticketfind.outputs import OutputFn, accuracy, call, cross_entropy, predictions
from ticketfind.recipe import Train
from ticketfind.results import Measured
from ticketfind.specs import one_line

State = dict[str, Tensor]
"""Every parameter and buffer by its state-dict key."""


@dataclass(frozen=True)
class Task:
    """What is trained: a network, its data, loss and metric, all on one device."""

    model: nn.Module
    """The architecture; its weights are overwritten by each arm's."""
    data: Data | None
    """None where the training is the user's own, and reads its own."""
    device: torch.device
    fresh: Callable[[int], State]
    """seed -> a fresh initialization, on the CPU."""
    given: State = field(default_factory=dict)
    """Weights from a checkpoint, which go over the fresh ones."""
    given_dtype: str | None = None
    """The types that the checkpoint had them in; they are trained in the model's."""
    trained: State = field(default_factory=dict)
    """Weights after dense training, which stand for that training."""
    loss: OutputFn = cross_entropy
    metric: OutputFn = accuracy
    trainer: "Trainer | None" = None
    """Trains an arm in place of ticketfind."""

    def start(self, seed: int) -> State:
        """Weights and buffers at iteration 0 of the replicate with this seed."""
        return {**self.fresh(seed), **self.given}


@dataclass(frozen=True)
class Arm:
    """One training to be run."""

    name: str
    """For messages: "round 3, replicate 0"."""
    start: State
    """Weights and buffers at iteration `first`; pruned positions are set to zero."""
    masks: Masks
    """Empty for a dense training."""
    seed: int
    """Of the data order and of what the network draws (dropout)."""
    first: int = 0
    """Iteration at which the training starts; data order and schedule go on from there."""
    round: int = 0
    """Prunings that the masks have behind them; with `replicate` for a trainer of the user's own."""
    replicate: int = 0


@dataclass(frozen=True)
class Point:
    """One evaluation."""

    iteration: int
    train_loss: float | None
    """Mean over the iterations since the last evaluation; None where there were none."""
    validation_loss: float
    validation_accuracy: float
    test_accuracy: float


@dataclass(frozen=True)
class Outcome:
    """A finished training."""

    points: tuple[Point, ...]
    final: State
    """Weights and buffers after the last iteration."""
    kept: State | None
    """Those at the iteration that `fit` was told to keep."""
    measured: Measured
    test_size: int | None
    """Examples in the test set, where they are known."""


def measured(points: Sequence[Point]) -> Measured:
    """In four numbers; early stop is the first minimum of the validation loss."""
    best = min(points, key=lambda point: point.validation_loss)
    return Measured(
        early_stop=best.iteration,
        accuracy_early=best.test_accuracy,
        accuracy_end=points[-1].test_accuracy,
        validation_loss=best.validation_loss,
    )


@dataclass(frozen=True)
class Work:
    """What a training of one arm is told beside the arm."""

    how: Train
    keep_at: int | None
    """Iteration whose weights are kept in the outcome."""
    tick: Tick
    """Told of the iterations done."""
    folder: Path | None
    """Where an outside program's files go."""


Trainer = Callable[[Task, Arm, Work], Outcome]
"""Trains one arm."""


def fit(
    arms: Sequence[Arm],
    task: Task,
    how: Train,
    *,
    way: str,
    keep_at: int | None = None,
    tick: Tick = lambda n: None,
    folder: Path | None = None,
) -> Generator[tuple[Arm, Outcome], None, None]:
    """Train every arm to ``how.iterations``; each with its outcome, in order, as it is finished.

    way: how the arms share the device, as `engine.choose` says; the numbers do not depend on it beyond rounding.
    keep_at: iteration whose weights are kept in the outcome. tick: told of the iterations done. folder: for the files
    of an outside program that trains.
    Raises TicketfindError, naming the arm, where a loss is no longer finite (the iteration too) or the training fails.
    """

    def train(index: int, tick: Tick) -> Outcome:
        with _faults_of(arms[index].name, how):
            return (task.trainer or _train)(task, arms[index], Work(how, keep_at, tick, folder))

    yield from zip(arms, engine.each(way, len(arms), train, tick), strict=True)


@contextmanager
def _faults_of(name: str, how: Train) -> Iterator[None]:
    """Whatever goes wrong inside is told in one line that says in which training."""
    try:
        yield
    except engine.Diverged as error:
        raise TicketfindError(
            f"{name}: the loss is not finite at iteration {error.iteration}; try a lower --lr (now {how.lr:g}), or look"
            " at the data (values that are no good, a batch in which no label counts)"
        ) from None
    except TicketfindError:
        raise
    except Exception as error:
        raise TicketfindError(f"{name}: training failed: {one_line(error)}") from error


def judge(arms: Iterable[Arm], task: Task, how: Train) -> Generator[tuple[Arm, Outcome], None, None]:
    """Every arm with the outcome that `task.trained`, weights from elsewhere, stand for; measured, not trained."""
    for arm in arms:
        with _faults_of(f"{arm.name}, from model.trained", how):
            lane = engine.Lane(copy.deepcopy(task.model), {**arm.start, **task.trained}, arm.masks, how, task.loss, 0)
            point = _point(lane, task, how, int(how.iterations), None)
        yield arm, Outcome((point,), lane.state(), arm.start, measured([point]), _test_size(task))


def _train(task: Task, arm: Arm, work: Work) -> Outcome:
    how, keep_at, data = work.how, work.keep_at, task.data
    assert data is not None
    total, every = int(how.iterations), int(how.eval_every)
    measured_at = {*range(every, total, every), total}
    stops = sorted(stop for stop in measured_at | {keep_at or 0} if stop > arm.first)
    cuda = [task.device] if task.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        model = copy.deepcopy(task.model)  # what is in no state dict starts afresh too
        lane = engine.Lane(model, arm.start, arm.masks, how, task.loss, derived_seed(arm.seed, "draws"))
        kept = lane.state() if keep_at == arm.first else None
        points: list[Point] = []
        losses: list[float] = []
        batches = data.training(Order(arm.seed, how.batch_size, arm.first, total))
        at = arm.first
        for stop in stops:
            losses += lane.advance(itertools.islice(batches, stop - at), at, work.tick)
            at = stop
            if at == keep_at:
                kept = lane.state()
            if at in measured_at:
                points.append(_point(lane, task, how, at, sum(losses) / len(losses)))
                losses = []
        return Outcome(tuple(points), lane.state(), kept, measured(points), _test_size(task))


def _point(lane: engine.Lane, task: Task, how: Train, iteration: int, train_loss: float | None) -> Point:
    assert task.data is not None
    validation = lane.measure(task.data.validation, (task.loss, task.metric), how.batch_size)
    test = lane.measure(task.data.test, (task.metric,), how.batch_size)
    if not all(map(math.isfinite, (*validation, *test))):
        raise engine.Diverged(iteration)
    return Point(iteration, train_loss, *validation, *test)


def step_seconds(task: Task, how: Train, steps: int = 5) -> list[float]:
    """The time that each of the first `steps` iterations of a dense training takes, its batch's reading included."""
    assert task.data is not None
    seconds = []
    cuda = [task.device] if task.device.type == "cuda" else []
    with _faults_of("the first steps", how), torch.random.fork_rng(devices=cuda):
        lane = engine.Lane(copy.deepcopy(task.model), task.start(0), {}, how, task.loss, 0)
        batches = task.data.training(Order(0, how.batch_size, 0, steps))
        for iteration in range(steps):
            began = time.perf_counter()
            lane.advance([next(batches)], iteration, lambda n: None)
            seconds.append(time.perf_counter() - began)
    return seconds


def _test_size(task: Task) -> int | None:
    return None if task.data is None else len(task.data.test)


@torch.no_grad()
def is_disconnected(task: Task, start: State, masks: Masks) -> bool:
    """True if no input can change the masked network's output, whatever its remaining weights.

    A layer may start at zero, so equal outputs under `start` do not say it. Then positive weights, which no rectifier
    cuts off, are tried in their place, and believed where the whole network with such weights does tell inputs apart.
    Without data, with a single test example or without predictions in the output, it cannot be told: False.
    """
    if task.data is None or len(task.data.test) < 2:
        return False
    model = copy.deepcopy(task.model).eval()
    inputs, _ = task.data.example(64)

    def tells_apart(state: State, under: Masks) -> bool:
        engine.put(model, state, under)
        outputs = predictions(call(model, inputs))
        return not bool((outputs == outputs[:1]).all())

    try:
        predictions(call(model, inputs))
    except TicketfindError:  # an output for a loss of the user's own
        return False

    if tells_apart(start, masks):
        return False
    generator = torch.Generator().manual_seed(0)
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    positive = {
        name: (0.1 + 0.1 * torch.rand(value.shape, generator=generator)).to(value) if name in trained else value
        for name, value in start.items()
    }
    return tells_apart(positive, {}) and not tells_apart(positive, masks)
