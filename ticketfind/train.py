"""Training arms and measuring them: schedule of evaluations, early stop, metrics. Knows no rounds and no disk."""

import copy
import hashlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ticketfind import TicketfindError, engine
from ticketfind.data import Data
from ticketfind.engine import LossFn, Tick
from ticketfind.masks import Masks
from ticketfind.recipe import Train
from ticketfind.results import Measured

State = dict[str, Tensor]
"""Every parameter and buffer by its state-dict key."""


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A seed for one purpose, unrelated to the seeds of others and of neighboring numbers."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy; outputs [b, classes], targets [b]."""
    return F.cross_entropy(outputs, targets)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of examples whose highest output is the target; outputs [b, classes], targets [b]."""
    return (outputs.argmax(-1) == targets).double().mean()


@dataclass(frozen=True)
class Task:
    """What is trained: a network, its data, loss and metric, all on one device."""

    model: nn.Module
    """The architecture; its weights are overwritten by each arm's."""
    data: Data
    device: torch.device
    fresh: Callable[[int], State]
    """seed -> a fresh initialization, on the CPU."""
    given: State = field(default_factory=dict)
    """Weights from a checkpoint, which go over the fresh ones."""
    loss: LossFn = cross_entropy
    metric: LossFn = accuracy

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


@dataclass(frozen=True)
class Point:
    """One evaluation."""

    iteration: int
    train_loss: float
    """Mean over the iterations since the last evaluation."""
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

    @property
    def measured(self) -> Measured:
        """In four numbers; early stop is the first minimum of the validation loss."""
        best = min(self.points, key=lambda point: point.validation_loss)
        return Measured(
            early_stop=best.iteration,
            accuracy_early=best.test_accuracy,
            accuracy_end=self.points[-1].test_accuracy,
            validation_loss=best.validation_loss,
        )


def fit(
    arms: Sequence[Arm],
    task: Task,
    how: Train,
    *,
    way: str,
    keep_at: int | None = None,
    tick: Tick = lambda n: None,
) -> Generator[tuple[Arm, Outcome], None, None]:
    """Train every arm to ``how.iterations``; each with its outcome, in order, as it is finished.

    way: how the arms share the device, as `engine.choose` says; the numbers do not depend on it beyond rounding.
    keep_at: iteration whose weights are kept in the outcome. tick: told of the iterations done.
    Raises TicketfindError, naming the arm, where a loss is no longer finite (the iteration too) or the training fails.
    """

    def train(index: int, tick: Tick) -> Outcome:
        try:
            return _fit_one(arms[index], task, how, keep_at, tick)
        except engine.Diverged as error:
            raise TicketfindError(
                f"{arms[index].name}: the loss is not finite at iteration {error.iteration};"
                f" try a lower --lr (now {how.lr:g}), or look at the data"
            ) from None
        except TicketfindError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            raise TicketfindError(f"{arms[index].name}: training failed: {type(error).__name__}: {text}") from error

    yield from zip(arms, engine.each(way, len(arms), train, tick), strict=True)


def _fit_one(arm: Arm, task: Task, how: Train, keep_at: int | None, tick: Tick) -> Outcome:
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
        at = arm.first
        for stop in stops:
            order = batch_indices(len(task.data.train), how.batch_size, arm.seed, at, stop).to(task.device)
            losses += lane.advance((task.data.train.batch(indices) for indices in order), at, tick)
            at = stop
            if at == keep_at:
                kept = lane.state()
            if at in measured_at:
                validation = lane.measure(task.data.validation, (task.loss, task.metric), how.batch_size)
                test = lane.measure(task.data.test, (task.metric,), how.batch_size)
                if not all(map(math.isfinite, (*validation, *test))):
                    raise engine.Diverged(at)
                points.append(Point(at, sum(losses) / len(losses), *validation, *test))
                losses = []
        return Outcome(tuple(points), lane.state(), kept)


@torch.no_grad()
def is_disconnected(task: Task, start: State, masks: Masks) -> bool:
    """True if no input can change the masked network's output, whatever its remaining weights.

    A layer may start at zero, so equal outputs under `start` do not say it. Then positive weights, which no rectifier
    cuts off, are tried in their place, and believed where the whole network with such weights does tell inputs apart.
    """
    model = copy.deepcopy(task.model).eval()
    inputs = task.data.test.inputs[:64]

    def tells_apart(state: State, under: Masks) -> bool:
        engine.put(model, state, under)
        outputs = model(inputs)
        return not bool((outputs == outputs[:1]).all())

    if tells_apart(start, masks):
        return False
    generator = torch.Generator().manual_seed(0)
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    positive = {
        name: (0.1 + 0.1 * torch.rand(value.shape, generator=generator)).to(value) if name in trained else value
        for name, value in start.items()
    }
    return tells_apart(positive, {}) and not tells_apart(positive, masks)


def batch_indices(examples: int, batch_size: int, seed: int, start: int, stop: int) -> Tensor:
    """The examples of iterations `start` to `stop` (exclusive): int64 [stop - start, batch_size].

    Iteration i takes places i * batch_size and following of an endless sequence of shuffled epochs, each a function
    of `seed` and its number: a training can start anywhere in it, and every batch is full.
    """
    begin, end = start * batch_size, stop * batch_size
    epochs = range(begin // examples, -(-end // examples))
    sequence = torch.cat(
        [
            torch.randperm(examples, generator=torch.Generator().manual_seed(derived_seed(seed, "order", epoch)))
            for epoch in epochs
        ]
    )
    offset = epochs.start * examples
    return sequence[begin - offset : end - offset].view(stop - start, batch_size)
