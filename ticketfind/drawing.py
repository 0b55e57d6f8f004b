"""How the next mask is drawn from a training: scored and pruned, at its end or on its way.

Legend: n weights kept before, k after.
"""

import copy
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.func import functional_call

from ticketfind import TicketfindError, masks, scores
from ticketfind.arms import Arm, Look, Note, Outcome, State, Task, Watched
from ticketfind.batches import Order, derived_seed, map_inputs, tensors_of
from ticketfind.course import Failed
from ticketfind.devices import Way
from ticketfind.forks import Tick
from ticketfind.lanes import functional, tensors
from ticketfind.masks import Group, Masks, Weights
from ticketfind.outputs import predictions
from ticketfind.readers import Duration
from ticketfind.recipe import Prune, Train
from ticketfind.scores import Score, Seen
from ticketfind.train import fit

EXAMPLES = 1000
"""Training examples, at the least, that a score before training looks at; in batches as the training's."""


@dataclass(frozen=True)
class Drawing:
    """What draws the masks of a search."""

    score: Score
    task: Task
    how: Train
    groups: Sequence[Group]
    shapes: Mapping[str, tuple[int, ...]]
    """Of the parameters that are scored."""

    def of_training(
        self, arm: Arm, initial: State, trained: State, path: State | None, *, rounds: int = 1
    ) -> list[Masks]:
        """The masks of the next rounds, on the CPU: exactly n - round(n * p) of each group in each, nested.

        initial: at the rewind point. path: as `scores.Seen` has it. Raises TicketfindError where the score fails.
        """
        seen, found = self.seen(arm, initial, trained, path), []
        for _ in range(rounds):
            seen = replace(seen, masks=self.pruned(seen, masks.targets(seen.masks, self.groups), arm))
            found.append(_here(seen.masks, "cpu"))
        return found

    def pruned(self, seen: Seen, counts: Sequence[int], arm: Arm) -> Masks:
        """Masks with so many weights of each group left, in as many steps as the score takes; on the device."""
        start = [masks.kept_in(seen.masks, group) for group in self.groups]
        steps = 1 if any(group.steps for group in self.groups) else self.score.steps  # a pattern has no counts between
        for step in range(1, steps + 1):
            seed = derived_seed(arm.seed, "score", arm.round, *([step] if steps > 1 else []))
            found = scores.scored(self.score, seen, seed=seed)
            left = masks.on_the_way(start, counts, step / steps)
            seen = replace(seen, masks=masks.prune(seen.masks, found, self.groups, left))
        return seen.masks

    def seen(self, arm: Arm, initial: State, trained: State, path: State | None) -> Seen:
        """What the score looks at, on the device."""
        device = self.task.device
        return Seen(
            trained=self._scored(trained),
            initial=self._scored(initial),
            masks=_here(arm.masks or masks.dense(self.shapes), device),
            path=None if path is None else self._scored({**self._unmoved(path), **path}),
            network=_Network(self.task, self.how, arm, initial) if self.score.needs_network else None,
        )

    def _scored(self, state: State) -> Weights:
        return {name: state[name].to(self.task.device) for name in self.shapes}

    def _unmoved(self, path: State) -> State:
        """What is frozen has no path."""
        return {name: torch.zeros(shape) for name, shape in self.shapes.items() if name not in path}

    def trainings(
        self,
        arms: Sequence[Arm],
        initial: Callable[[Arm], State],
        settings: Prune,
        *,
        way: Way,
        tick: Tick,
        skip: Tick,
        note: Note,
    ) -> Generator[tuple[Arm, Outcome | Failed], None, None]:
        """Train `arms` for their next masks alone, each with its outcome.

        initial: arm -> the weights at the rewind point. With `settings.every` they are pruned on the way, and the
        outcome's masks are the next ones; with `settings.mask_stop` they end once their next mask has settled.
        """
        how = _for_mask(self.how, settings)
        if isinstance(settings.every, Duration):
            tightening = Tightening(self, int(settings.every), int(how.iterations))
            watched = Watched(every=int(settings.every), tighter=tightening)
        elif settings.mask_stop is not None:
            settled = Settled(self, initial, settings.mask_stop)
            watched = Watched(every=int(how.eval_every), enough=settled)
        else:
            watched = Watched()
        return fit(
            arms, self.task, how, way=way, tick=tick, skip=skip, note=note, paths=self.score.needs_path,
            watched=watched,
        )  # fmt: skip


def _for_mask(how: Train, settings: Prune) -> Train:
    """How a training goes that is there for a mask alone: as the rest, after the rewind point, of a whole one that ends
    with it (cosine and milestones drawn together, the warmup as it is), at its own learning rate."""
    first, total = int(settings.rewind) if isinstance(settings.rewind, Duration) else 0, int(how.iterations)
    end = total if settings.mask_iterations is None else first + int(settings.mask_iterations)
    milestones = tuple(Duration(round(int(milestone) * end / total)) for milestone in how.milestones)
    return replace(how, iterations=Duration(end), milestones=milestones, lr=settings.mask_lr or how.lr)


def _here(found: Masks, device: torch.device | str) -> Masks:
    return {name: mask.to(device) for name, mask in found.items()}


@dataclass
class Settled:
    """Tells when the mask that a training would draw has stopped changing (after PrAC, arXiv 2106.03225)."""

    drawing: Drawing
    initial: Callable[[Arm], State]
    threshold: float
    """Agreement (Cohen's kappa, over the weights that the training's mask keeps) of the masks of two looks in a row."""
    _before: dict[int, Masks] = field(default_factory=dict)
    """The mask of the look before, by replicate."""
    _initial: dict[int, State] = field(default_factory=dict)
    """What `initial` has given."""

    def __call__(self, arm: Arm, look: Look) -> bool:
        """Whether the training may end."""
        if arm.replicate not in self._initial:
            self._initial[arm.replicate] = self.initial(arm)
        seen = self.drawing.seen(arm, self._initial[arm.replicate], look.state, look.path)
        now = self.drawing.pruned(seen, masks.targets(seen.masks, self.drawing.groups), arm)
        before, self._before[arm.replicate] = self._before.get(arm.replicate), now
        return before is not None and masks.agreement_within(before, now, seen.masks) >= self.threshold


@dataclass
class Tightening:
    """Prunes a training on its way, every so many iterations, in equal shares down to the next round's count.

    Scores see what the weights have done since the last pruning: `initial` are the weights then, `path` has begun anew.
    """

    drawing: Drawing
    every: int
    total: int
    """Iteration that the training ends with."""
    _since: dict[int, State] = field(default_factory=dict)
    """The weights after the last pruning, by replicate; as the other two."""
    _now: dict[int, Masks] = field(default_factory=dict)

    def __call__(self, arm: Arm, look: Look) -> Masks:
        """The masks to go on with."""
        groups = self.drawing.groups
        since = self._since.get(arm.replicate, arm.start)
        seen = self.drawing.seen(arm, since, look.state, look.path)
        start, end = [masks.kept_in(seen.masks, group) for group in groups], masks.targets(seen.masks, groups)
        share = (look.at - arm.first) // self.every / ((self.total - arm.first) // self.every)
        now = self._now.get(arm.replicate, seen.masks)
        new = self.drawing.pruned(replace(seen, masks=now), masks.on_the_way(start, end, share), arm)
        self._now[arm.replicate] = new
        self._since[arm.replicate] = masks.masked(look.state, new)
        return new


class _Network:
    """`scores.Network` of a task, at the rewind point of an arm."""

    def __init__(self, task: Task, how: Train, arm: Arm, initial: State) -> None:
        if task.data is None:
            raise TicketfindError("prune.score: expected data that ticketfind reads itself, found none")
        self._task, self._how, self._seed = task, how, derived_seed(arm.seed, "score", arm.round)
        self._state = {name: initial[name].to(task.device) for name in tensors(task.model) if name in initial}

    def losses(self) -> Iterator[Callable[[Weights], Tensor]]:
        count = math.ceil(EXAMPLES / self._how.batch_size)
        assert self._task.data is not None
        feed = self._task.data.training(Order(self._seed, self._how.batch_size, 0, count))
        loss = functional(copy.deepcopy(self._task.model).train(), self._task.loss)
        for inputs, targets in itertools.islice(feed, count):

            def of(weights: Weights, inputs=inputs, targets=targets) -> Tensor:  # type: ignore[no-untyped-def]
                buffers = {name: value.clone() for name, value in self._state.items() if name not in weights}
                return loss({**buffers, **weights}, inputs, targets)

            yield of

    def flow(self, weights: Weights) -> Tensor:
        assert self._task.data is not None
        inputs, _ = self._task.data.example(1)
        if not all(t.is_floating_point() for t in tensors_of(inputs)):
            raise TicketfindError("synflow: expected inputs that can be ones, found whole numbers (tokens?)")
        model = copy.deepcopy(self._task.model).double().eval()
        rest = {name: _magnitude(value) for name, value in self._state.items() if name not in weights}
        ones = map_inputs(lambda t: torch.ones_like(t, dtype=torch.float64), inputs)
        args, named = ((), ones) if isinstance(ones, dict) else ((ones,), {})
        state = {**rest, **{name: weight.abs() for name, weight in weights.items()}}
        return predictions(functional_call(model, state, args, named)).sum()


def _magnitude(value: Tensor) -> Tensor:
    return value.abs().double() if value.is_floating_point() else value
