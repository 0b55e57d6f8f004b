"""Arms: the trainings to be run, of what, with what is told on the way and what comes of them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ticketfind import memory
from ticketfind.batches import Data, Split
from ticketfind.course import Failed, Point, Snapshot
from ticketfind.forks import Tick
from ticketfind.lanes import Extra
from ticketfind.masks import Masks
from ticketfind.outputs import OutputFn, accuracy, cross_entropy
from ticketfind.recipe import Train
from ticketfind.results import Measured

State = dict[str, Tensor]
"""Every parameter and buffer by its state-dict key."""
Note = Callable[[str], None]
"""Told what the user should know."""


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
    need: memory.Need | None = None
    """The memory that an arm's training takes, where that could be estimated."""
    loss: OutputFn = cross_entropy
    metric: OutputFn = accuracy
    trainer: "Trainer | None" = None
    """Trains an arm in place of ticketfind."""

    def start(self, seed: int) -> State:
        """Weights and buffers at iteration 0 of the replicate with this seed."""
        return {**self.fresh(seed), **self.given}

    @functools.cached_property
    def chance(self) -> float | None:
        """The accuracy of always giving the test set's most frequent label; None where the labels are not known."""
        test = None if self.data is None else self.data.test
        return test.most_frequent if isinstance(test, Split) else None


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
class Look:
    """A training on its way."""

    at: int
    """Iterations done."""
    state: State
    """Weights and buffers, on the device."""
    path: State | None
    """By trained parameter the sum of |w_t - w_(t-1)| so far, where that is gathered."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What happens on the way in a training that is there for the mask that comes of it."""

    every: int | None = None
    """Iterations between two looks; None: none."""
    enough: "Callable[[Arm, Look], bool] | None" = None
    """Whether it may end; arms in step end together."""
    tighter: "Callable[[Arm, Look], Masks] | None" = None
    """The masks that it goes on with; paths begin anew."""
    at_end: bool = True
    """Whether it is measured at its end."""


@dataclass(frozen=True)
class Outcome:
    """A finished training."""

    began: str | None
    """Digest of the weights and buffers that it began with, tied parameters once; None where nobody looked."""
    points: tuple[Point, ...]
    final: State
    """Weights and buffers after the last iteration."""
    kept: State | None
    """Those at the iteration that `fit` was told to keep."""
    numbers: Measured | None
    """How good it is; None where that was not asked."""
    test_size: int | None
    """Examples in the test set, where they are known."""
    path: State | None = None
    """By trained parameter the sum of |w_t - w_(t-1)|, where that was asked for."""
    masks: Masks | None = None
    """Those that it has gone on with on the way, on the CPU; None where they have stayed."""

    @property
    def measured(self) -> Measured:
        """The numbers of a training that was measured."""
        assert self.numbers is not None
        return self.numbers


def measured(points: Sequence[Point]) -> Measured:
    """In four numbers; early stop is the first minimum of the validation loss."""
    best = min(points, key=lambda point: point.validation_loss)
    return Measured(
        early_stop=best.iteration,
        accuracy_early=best.test_accuracy,
        accuracy_end=points[-1].test_accuracy,
        validation_loss=best.validation_loss,
    )


class Snapshots(Protocol):
    """Where trainings under way are kept, so that they can go on after their process has ended."""

    def find(self, arms: Sequence[Arm]) -> Snapshot | None:
        """What was kept last of these arms, which begin now. Raises TicketfindError where it cannot be read."""

    def offer(self, arms: Sequence[Arm], take: Callable[[], Snapshot], *, now: bool = False) -> None:
        """Keep what `take` gives, if it is time; with `now` in any case, and before this returns."""

    def settle(self) -> None:
        """Wait for what is still being kept."""


@dataclass(frozen=True)
class Work:
    """What a training of one arm is told beside the arm."""

    how: Train
    keep_at: int | None
    """Iteration whose weights are kept in the outcome."""
    tick: Tick
    """Told of the iterations done; may raise, to end the training where it is."""
    folder: Path | None
    """Where an outside program's files go."""
    snapshots: Snapshots | None = None
    until: int | None = None
    """Iteration after which it ends, though its schedule is that of a whole training; None for the whole."""
    paths: bool = False
    """Whether the outcome tells how far each weight has gone."""
    watched: Watched | None = None

    @property
    def extra(self) -> Extra:
        """What the engine does beside training."""
        return Extra(self.paths, tightens=self.watched is not None and self.watched.tighter is not None)


Trainer = Callable[[Task, Arm, Work], "Outcome | Failed"]
"""Trains one arm."""
