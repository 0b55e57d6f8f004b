"""Training arms and measuring them: schedule of evaluations, early stop, metrics. Knows no rounds and no disk."""

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ticketfind import TicketfindError, devices, engine, lanes
from ticketfind.batches import Data, Order, derived_seed
from ticketfind.devices import EAGER, Way
from ticketfind.engine import Lockstep
from ticketfind.forks import Tick
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
    way: Way = EAGER,
    keep_at: int | None = None,
    tick: Tick = lambda n: None,
    note: Callable[[str], None] = lambda text: None,
    folder: Path | None = None,
) -> Generator[tuple[Arm, Outcome], None, None]:
    """Train every arm to ``how.iterations``; each with its outcome, in order, as it is finished.

    way: how the arms share the device; the numbers do not depend on it beyond rounding. keep_at: iteration whose
    weights are kept in the outcome. tick: told of the iterations done. note: told what the user should know.
    folder: for the files of an outside program that trains.
    Raises TicketfindError, naming the arm, where a loss is no longer finite (the iteration too) or the training fails.
    """
    together = [*_together(arms, way.in_step)]

    def train(index: int, tick: Tick) -> list[Outcome]:
        work = Work(how, keep_at, tick, folder)
        with _faults_of(together[index], how):
            if task.trainer is not None:
                return [task.trainer(task, arm, work) for arm in together[index]]
            return _train(task, together[index], work, way, note)

    outcomes = itertools.chain.from_iterable(engine.each(way, len(together), train, tick))
    yield from zip(arms, outcomes, strict=True)


def _together(arms: Sequence[Arm], most: int) -> Iterator[list[Arm]]:
    """The arms in their order, in groups that begin at the same iteration."""
    for _, same in itertools.groupby(arms, key=lambda arm: arm.first):
        while group := list(itertools.islice(same, most)):
            yield group


@contextmanager
def _faults_of(arms: Sequence[Arm], how: Train) -> Iterator[None]:
    """Whatever goes wrong inside is told in one line that says in which training."""
    try:
        yield
    except engine.Diverged as error:
        raise TicketfindError(
            f"{arms[error.arm].name}: the loss is not finite at iteration {error.iteration}; try a lower --lr (now"
            f" {how.lr:g}), or look at the data (values that are no good, a batch in which no label counts)"
        ) from None
    except TicketfindError:
        raise
    except Exception as error:
        names = arms[0].name if len(arms) == 1 else f"{arms[0].name} to {arms[-1].name}"
        raise TicketfindError(f"{names}: training failed: {one_line(error)}") from error


def judge(arms: Iterable[Arm], task: Task, how: Train) -> Generator[tuple[Arm, Outcome], None, None]:
    """Every arm with the outcome that `task.trained`, weights from elsewhere, stand for; measured, not trained."""
    for arm in arms:
        named = dataclasses.replace(arm, name=f"{arm.name}, from model.trained")
        with _faults_of([named], how), devices.arithmetic(EAGER, task.device, task.model):
            start = {**arm.start, **task.trained}
            training = engine.begin(EAGER, task.model, [(start, arm.masks)], list, how, task.loss, device=task.device)
            points = _points(training, task, how, int(how.iterations), [None])
            final = training.states()[0]
        yield arm, Outcome(tuple(points), final, arm.start, measured(points), _test_size(task))


def _train(
    task: Task, arms: Sequence[Arm], work: Work, way: Way, note: Callable[[str], None] = lambda text: None
) -> list[Outcome]:
    """Train arms that begin at the same iteration."""
    how, keep_at, data, first = work.how, work.keep_at, task.data, arms[0].first
    assert data is not None
    total, every = int(how.iterations), int(how.eval_every)
    measured_at = {*range(every, total, every), total}
    stops = sorted(stop for stop in measured_at | {keep_at or 0} if stop > first)
    with _own_draws(task), devices.arithmetic(way, task.device, task.model):
        training = engine.begin(
            way,
            task.model,
            [(arm.start, arm.masks) for arm in arms],
            lambda: [data.training(Order(arm.seed, how.batch_size, first, total)) for arm in arms],
            how,
            task.loss,
            device=task.device,
            seed=derived_seed(arms[0].seed, "draws"),
            first=first,
            note=note,
        )
        kept: Sequence[State | None] = training.states() if keep_at == first else [None] * len(arms)
        points: list[list[Point]] = []
        losses: list[list[float]] = [[] for _ in arms]
        for at, stop in zip([first, *stops], stops, strict=False):
            for before, new in zip(losses, training.advance(stop - at, work.tick), strict=True):
                before += new
            if stop == keep_at:
                kept = training.states()
            if stop in measured_at:
                points.append(_points(training, task, how, stop, [sum(part) / len(part) for part in losses]))
                losses = [[] for _ in arms]
        return [
            Outcome(tuple(own), final, state, measured(own), _test_size(task))
            for own, final, state in zip(zip(*points, strict=True), training.states(), kept, strict=True)
        ]


def _own_draws(task: Task) -> AbstractContextManager[None]:
    """What is drawn at random inside changes nothing outside."""
    return torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else [])


def _points(
    training: Lockstep, task: Task, how: Train, iteration: int, train_loss: Sequence[float | None]
) -> list[Point]:
    """Each arm's evaluation."""
    assert task.data is not None
    validation = training.measure(task.data.validation, (task.loss, task.metric), how.batch_size)
    test = training.measure(task.data.test, (task.metric,), how.batch_size)
    rows: list[list[float]] = torch.cat([validation, test], dim=1).tolist()
    for arm, row in enumerate(rows):
        if not all(map(math.isfinite, row)):
            raise engine.Diverged(iteration, arm)
    return [Point(iteration, loss, *row) for loss, row in zip(train_loss, rows, strict=True)]


def step_seconds(task: Task, how: Train, steps: int = 5) -> list[float]:
    """The time that each of the first `steps` iterations of a dense training takes, its batch's reading included."""
    assert task.data is not None
    data, start, seconds = task.data, Arm("the first steps", task.start(0), {}, 0), []
    with _faults_of([start], how), _own_draws(task):
        training = engine.begin(
            EAGER,
            task.model,
            [(start.start, {})],
            lambda: [data.training(Order(0, how.batch_size, 0, steps))],
            how,
            task.loss,
            device=task.device,
        )
        for _ in range(steps):
            began = time.perf_counter()
            training.advance(1, lambda n: None)
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
        lanes.put(model, state, under)
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
