"""From which iteration on a training no longer depends on the order of its data (arXiv 1912.05671).

Two trainings that share their first k iterations, and then see the data in different orders, end in two networks W1 and
W2. The barrier is what the error rises by on the line between them (its section 2):

    sup over a in [0, 1] of E(a W1 + (1 - a) W2) - (E(W1) + E(W2)) / 2,    E the test error, at 30 evenly spaced a.

Where it is less than 2 points, the network is stable at k; subnetworks found by pruning and rewinding match the dense
network's accuracy exactly when they are stable (its section 4): so k is an iteration to rewind to.
"""

import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ticketfind import TicketfindError, masks
from ticketfind.arms import Arm, Note, State, Task
from ticketfind.batches import Order, derived_seed
from ticketfind.course import Failed
from ticketfind.devices import EAGER, Way
from ticketfind.forks import Tick
from ticketfind.lanes import put
from ticketfind.outputs import call, counted
from ticketfind.readers import duration
from ticketfind.recipe import Recipe, RecipeError, Run, Train
from ticketfind.results import Spread
from ticketfind.ticket import Ticket
from ticketfind.train import check_memory, fit

POINTS = 30
"""Places on the line, both ends included."""
STATISTICS = 2048
"""Training examples, about, that the statistics of a network on the line are taken from."""


# -------------------------------------------------------------------------------------------- the barrier


def barrier(errors: Sequence[float]) -> float:
    """How far the highest error on a line, from W2 to W1, is above the mean of those at its two ends."""
    return max(errors) - (errors[0] + errors[-1]) / 2


def between(one: State, other: State, share: float) -> State:
    """share * `one` + (1 - share) * `other`, in every parameter and floating buffer; the rest as in `one`."""
    return {
        name: torch.lerp(other[name], value, share) if value.is_floating_point() else value
        for name, value in one.items()
    }


@torch.no_grad()
def errors_between(one: State, other: State, task: Task, how: Train, tick: Tick = lambda n: None) -> list[float]:
    """The test errors of `POINTS` networks on the line from `other` to `one`.

    The running statistics of BatchNorm layers are taken anew at every point, both ends included, from training examples
    (about `STATISTICS`): mixed ones would be those of no network, and be counted as a barrier of its weights. Averages
    of networks are measured so too (arXiv 1803.05407). tick: called between points; may raise.
    """
    model, errors = copy.deepcopy(task.model), []
    for point in range(POINTS):
        put(model, between(one, other, point / (POINTS - 1)), {})
        _take_statistics(model, task, how)
        errors.append(_error(model, task, how))
        tick(0)
    return errors


def _take_statistics(model: nn.Module, task: Task, how: Train) -> None:
    """Means and variances over whole batches, each counted alike; layers that draw at random stay as in evaluation."""
    model.eval()
    norms = [layer for layer in model.modules() if isinstance(layer, _NormBase) and layer.track_running_stats]
    if not norms:
        return
    assert task.data is not None
    own = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # the mean of all batches
        layer.train()
    examples = min(STATISTICS, len(task.data.train))
    order = Order(derived_seed(0, "statistics"), how.batch_size, 0, max(1, examples // how.batch_size))
    for inputs, _ in task.data.training(order):
        call(model, inputs)
    for layer, momentum in zip(norms, own, strict=True):
        layer.momentum = momentum
    model.eval()


def _error(model: nn.Module, task: Task, how: Train) -> float:
    """1 - accuracy (or the user's metric) over the test set; 1 where it is not a number."""
    assert task.data is not None
    model.eval()
    total = weight = 0.0
    for inputs, targets in task.data.test.chunks(how.batch_size):
        if here := float(counted(targets)):
            total += here * float(task.metric(call(model, inputs), targets))
            weight += here
    value = total / weight if weight else 0.0
    return 1 - value if value == value else 1.0


# --------------------------------------------------------------------------------------------- the ladder


def ladder(total: int, first: int = 0) -> tuple[int, ...]:
    """Where to look in a training of `total` iterations that begins at `first`: there, and at 1, 2, 5, 10, 20, 50 ...

    From a two-hundredth of the training to half of it.
    """
    rungs = [digit * 10**power for power in range(len(str(total))) for digit in (1, 2, 5)]
    return (first, *(k for k in rungs if k > first and total / 200 <= k <= total / 2))


def asked_ladder(texts: Sequence[str], task: Task, how: Train) -> tuple[int, ...]:
    """The iterations that --at names. Raises RecipeError for what is none before the training's end."""
    assert task.data is not None
    total, per_epoch, rungs = int(how.iterations), len(task.data.train) / how.batch_size, set()
    for text in texts:
        try:
            k = int(duration(text).resolved(per_epoch, total))
        except ValueError as error:
            raise RecipeError(f"--at: expected {error}, found {text!r}") from error
        if k >= total:
            raise RecipeError(f"--at: expected an iteration before the training's end at {total}, found {text} = {k}")
        rungs.add(k)
    return tuple(sorted(rungs))


def next_rung(rungs: Sequence[int], stable: Mapping[int, bool]) -> int | None:
    """The rung to measure next in a bisection for the first stable one; None once it is known.

    It lies between the highest that is not stable and the lowest above it that is: what is stable at an iteration is
    taken to be so at every later one.
    """
    low = max((n for n, k in enumerate(rungs) if stable.get(k) is False), default=-1)
    high = min((n for n, k in enumerate(rungs) if n > low and stable.get(k) is True), default=len(rungs))
    return None if high - low < 2 else rungs[(low + high) // 2]


# -------------------------------------------------------------------------------------------- the finder


@dataclass(frozen=True, kw_only=True)
class Question:
    """Which network, and where it is looked at."""

    network: str
    """dense, or sparse."""
    arms: Sequence[Arm]
    """Each replicate's training as a search would run it; those of the finder begin as it does."""
    rungs: Sequence[int]
    """Iterations, in order, none before the arms begin."""
    bisected: bool
    """Whether only those are measured that a bisection comes by."""
    threshold: float
    """The barrier, a fraction, that is no longer stable."""

    @property
    def first(self) -> int:
        """The iteration that the arms begin at."""
        return self.arms[0].first

    def iterations(self, k: int, total: int) -> int:
        """Of all trainings that measure rung `k`: the beginning once, the rest twice."""
        return len(self.arms) * (k - self.first + 2 * (total - k))

    def most(self, total: int) -> int:
        """Iterations that the question takes at the most."""
        each = sorted((self.iterations(k, total) for k in self.rungs), reverse=True)
        return sum(each[: len(each).bit_length()] if self.bisected else each)


def questions(
    task: Task, recipe: Recipe, tickets: Sequence[Ticket], at: Sequence[str], points: float, note: Note
) -> list[Question]:
    """What is asked of a resolved recipe's dense network and, where there are tickets, of the sparse one under their
    masks, which begins where the tickets do.

    at: the iterations to measure; a ladder to be bisected for none. points: the threshold. note: told what is left out.
    Raises TicketfindError where the training is the user's own, or a ticket is of another network.
    """
    how, run = recipe.train, recipe.run
    if how.is_external:
        raise TicketfindError(
            "train: expected a training by ticketfind, of which every iteration is known, found your own"
        )
    total, given = int(how.iterations), asked_ladder(at, task, how)
    seeds = range(run.seed, run.seed + run.replicates)
    arms = [Arm(f"dense, replicate {r}", task.start(s), {}, s, replicate=r) for r, s in enumerate(seeds)]
    found = {"dense": arms, "sparse": [_ticket_arm(ticket, task) for ticket in tickets[: run.replicates]]}
    asked = []
    for network, arms in found.items():
        first = arms[0].first if arms else 0
        rungs = [k for k in given or ladder(total, first) if first <= k < total]
        if arms and not rungs:
            note(f"the {network} network is left out: its training goes from iteration {first} to {total}")
        elif arms:
            asked.append(Question(network=network, arms=arms, rungs=rungs, bisected=not given, threshold=points / 100))
    return asked


def trainings(run: Run) -> int:
    """How many are trained together, at the most."""
    return 2 * run.replicates


def most_iterations(asked: Sequence[Question], how: Train) -> int:
    """That all questions take, at the most."""
    return sum(question.most(int(how.iterations)) for question in asked)


def _ticket_arm(ticket: Ticket, task: Task) -> Arm:
    ticket.check_fits(task.model)
    about = ticket.about
    name = f"sparse, replicate {about.replicate}"
    return Arm(name, ticket.init, ticket.masks, ticket.first_seed, about.iteration, about.round, about.replicate)


@dataclass(frozen=True)
class Rung:
    """Pairs of trainings that share their first iterations, one pair a replicate. Fractions."""

    iteration: int
    barrier: Spread
    error: Spread
    """Test error at the ends of the line, a pair's mean each."""
    stable: bool
    """Whether the upper end of the 95 % interval for the mean barrier is below the threshold; with one pair, the
    barrier itself."""

    @classmethod
    def of(cls, iteration: int, lines: Sequence[Sequence[float]], threshold: float) -> "Rung":
        """lines: the errors on each pair's line."""
        barriers = Spread.of(map(barrier, lines))
        highest = barriers.mean if barriers.interval is None else barriers.interval[1]
        ends = Spread.of(statistics.fmean((line[0], line[-1])) for line in lines)
        return cls(iteration, barriers, ends, highest < threshold)


@dataclass(frozen=True)
class Stability:
    """What a question's answer is."""

    question: Question
    total: int
    """Iterations of a whole training."""
    remaining: float
    """Weights remaining, a fraction."""
    rungs: tuple[Rung, ...]
    """Those that were measured, in order."""
    iterations: int
    """Of all trainings that it took."""

    @property
    def earliest(self) -> int | None:
        """The earliest iteration measured from which on all measured are stable; None where the last is not."""
        found = None
        for rung in reversed(self.rungs):
            if not rung.stable:
                break
            found = rung.iteration
        return found

    @property
    def contradicting(self) -> tuple[int, ...]:
        """Iterations that are stable although a later one is not."""
        last = max((rung.iteration for rung in self.rungs if not rung.stable), default=-1)
        return tuple(rung.iteration for rung in self.rungs if rung.stable and rung.iteration < last)


def find(
    question: Question,
    task: Task,
    how: Train,
    *,
    way: Way = EAGER,
    tick: Tick = lambda n: None,
    skip: Tick = lambda n: None,
    note: Note = lambda text: None,
) -> Stability:
    """Measure the barrier at rungs of the ladder: all of them, or as a bisection goes.

    The beginning up to k is trained with the arm's own data order, the two that go on from it with orders of their own
    and a fresh optimizer, as a rewound round has it. tick: told of iterations done; may raise. skip: told of iterations
    of `question.most` that will not be done. note: told what the user should know.
    Raises TicketfindError where a training fails, or every pair of a rung has numbers that are no longer finite.
    """
    total, threshold = int(how.iterations), question.threshold
    how = replace(how, eval_every=how.iterations)  # nothing is asked before the end
    check_memory(task, how, way, 2 * len(question.arms))
    rungs: dict[int, Rung] = {}
    used, most = 0, question.most(total)

    def measure(k: int) -> None:
        nonlocal used
        used += question.iterations(k, total)
        lines = [*_lines(question, k, task, how, way, tick, skip, note)]
        rungs[k] = Rung.of(k, lines, threshold)

    if question.bisected:
        while (k := next_rung(question.rungs, {k: rung.stable for k, rung in rungs.items()})) is not None:
            measure(k)
    else:
        for k in question.rungs:
            measure(k)
    skip(most - used)
    mask = question.arms[0].masks
    return Stability(
        question, total, masks.remaining(mask) if mask else 1.0, tuple(rungs[k] for k in sorted(rungs)), used
    )


def _lines(
    question: Question, k: int, task: Task, how: Train, way: Way, tick: Tick, skip: Tick, note: Note
) -> Iterator[list[float]]:
    """The errors on the line between the two trainings of each pair that share their first k iterations."""
    pairs = [
        replace(arm, name=f"{arm.name}, {side} from {k}", start=start, seed=derived_seed(arm.seed, side), first=k)
        for arm, start in _beginnings(question, k, task, how, way, tick, skip, note)
        for side in ("one", "other")
    ]
    ends: list[State | None] = []
    with closing(fit(pairs, task, how, way=way, tick=tick, skip=skip, note=note)) as outcomes:
        for arm, outcome in outcomes:
            if isinstance(outcome, Failed):
                note(f"{arm.name}: {outcome.reason}; the pair is left out")
            ends.append(None if isinstance(outcome, Failed) else outcome.final)
    lines = 0
    for one, other in zip(ends[::2], ends[1::2], strict=True):
        if one is not None and other is not None:
            yield errors_between(one, other, task, how, tick)
            lines += 1
    if not lines:
        raise TicketfindError(f"iteration {k}: expected a pair of trainings, found that each has failed")


def _beginnings(
    question: Question, k: int, task: Task, how: Train, way: Way, tick: Tick, skip: Tick, note: Note
) -> Iterator[tuple[Arm, State]]:
    """Each arm with its weights and buffers after k iterations of the dense (or sparse) training."""
    if k == question.first:
        yield from ((arm, arm.start) for arm in question.arms)
        return
    trainings = fit(question.arms, task, how, way=way, until=k, tick=tick, skip=skip, note=note)
    with closing(trainings) as outcomes:
        for arm, outcome in outcomes:
            if isinstance(outcome, Failed):
                note(f"{arm.name}: {outcome.reason}; the pair is left out")
                skip(2 * (int(how.iterations) - k))
            else:
                yield arm, outcome.final
