"""Training steps timed on this machine: ticketfind's, in each of its ways, against the loop that people write."""

import copy
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from ticketfind import TicketfindError, devices, masks, prunable
from ticketfind.batches import Batch, Data, Split
from ticketfind.devices import Way
from ticketfind.outputs import call
from ticketfind.readers import Duration
from ticketfind.recipe import Train
from ticketfind.train import Arm, Task, fit

KEPT = 0.2
"""Share of the weights that the masks of a benchmark keep."""


@dataclass(frozen=True)
class Case:
    """One thing that is timed."""

    name: str
    """plain, dense or masked."""
    way: str
    """plain, or how the arms share the device."""
    arms: int
    run: Callable[[int], None]
    """Trains so many iterations of every arm."""


@dataclass(frozen=True)
class Timing:
    """What a case took, in milliseconds an iteration and arm, one number for each block."""

    case: Case
    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the blocks."""
        return statistics.median(self.ms)

    def over(self, other: "Timing") -> float:
        """How many times as long as `other`: the median of the blocks' own ratios, as they were timed in turn."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.ms, other.ms, strict=True))


def cases(task: Task, how: Train, *, ways: Sequence[str], arms: Sequence[int]) -> list[Case]:
    """The plain loop, one dense and one masked arm, and masked arms together in each way.

    Raises TicketfindError for data that is not resident, or no single tensor.
    """
    if task.data is None or not isinstance(task.data.train, Split) or isinstance(task.data.train.inputs, dict):
        raise TicketfindError("bench: expected resident data of one input tensor, found other data; give other --data")
    split, inputs, kept = task.data.train, task.data.train.inputs, mask_of(task)
    few = Split(*split.batch(torch.arange(min(len(split), how.batch_size), device=split.targets.device)))
    small = dataclasses.replace(task, data=Data(split, few, few))  # what is timed is training

    def ours(way: str, count: int, mask: masks.Masks) -> Callable[[int], None]:
        def run(iterations: int) -> None:
            length = dataclasses.replace(how, iterations=Duration(iterations), eval_every=Duration(iterations))
            trained = [Arm(f"arm {seed}", small.start(seed), mask, seed) for seed in range(count)]
            for _ in fit(trained, small, length, way=Way(way, at_once=count)):
                pass

        return run

    examples = TensorDataset(inputs, split.targets)
    together = [(way, count) for way in ways for count in arms if count > 1]
    return [
        Case(
            "plain", "plain", 1, plain_loop(task, lambda: DataLoader(examples, how.batch_size, shuffle=True), how, kept)
        ),
        *(Case(name, "eager", 1, ours("eager", 1, mask)) for name, mask in (("dense", {}), ("masked", kept))),
        *(Case("masked", way, count, ours(way, count, kept)) for way, count in together),
    ]


def mask_of(task: Task) -> masks.Masks:
    """A random mask that keeps the share KEPT of each prunable tensor."""
    generator = torch.Generator().manual_seed(0)
    found = [candidate for candidate in prunable.candidates(task.model) if candidate.pruned]
    return {c.name: torch.rand(c.shape, generator=generator) < KEPT for c in found}


def plain_loop(
    task: Task, loader: Callable[[], Iterable[Batch]], how: Train, kept: masks.Masks
) -> Callable[[int], None]:
    """The loop that people write: torch.nn.utils.prune, torch.optim and a DataLoader, which `loader` makes.

    Tuned as far as that goes without another design: no `.item()`, gradients set to None.
    """
    optimizers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}

    def run(iterations: int) -> None:
        model = copy.deepcopy(task.model).train()
        for name, mask in kept.items():
            place, _, attribute = name.rpartition(".")
            prune.custom_from_mask(model.get_submodule(place), attribute, mask.to(task.device))  # type: ignore[no-untyped-call]
        momentum = {"momentum": how.momentum} if how.optimizer == "sgd" else {}
        optimizer = optimizers[how.optimizer](model.parameters(), lr=how.lr, weight_decay=how.weight_decay, **momentum)
        epochs = itertools.chain.from_iterable(loader() for _ in itertools.count())
        for inputs, targets in itertools.islice(epochs, iterations):
            optimizer.zero_grad()
            loss = task.loss(call(model, inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if task.device.type == "cuda":
            torch.cuda.synchronize(task.device)

    return run


def measure(
    found: Sequence[Case], *, blocks: int, seconds: float, tick: Callable[[int], None] = lambda n: None
) -> list[Timing]:
    """Every case in turn, `blocks` times after one to warm up, each block `seconds` long or a little more.

    Side by side in one run, so that a busy machine is slow for all of them: the ratios of medians are what counts.
    tick: told of the blocks done.
    """
    iterations = [_iterations(case, seconds) for case in found]
    taken: list[list[float]] = [[] for _ in found]
    for _ in range(blocks):
        for case, count, ms in zip(found, iterations, taken, strict=True):
            began = time.perf_counter()
            case.run(count)
            ms.append(1000 * (time.perf_counter() - began) / count / case.arms)
            tick(1)
    return [Timing(case, tuple(ms)) for case, ms in zip(found, taken, strict=True)]


def _iterations(case: Case, seconds: float) -> int:
    """Iterations that take about so long, at least three, and enough that what a training costs once hardly shows.

    Tried with four times as many each time, until that takes three times as long; the first tries warm up.
    """
    count, before = 1, math.inf
    while True:
        began = time.perf_counter()
        case.run(count)
        took = time.perf_counter() - began
        if took > 2 * seconds or (took > seconds / 5 and took > 3 * before):
            return max(3, round(count * seconds / took))
        count, before = 4 * count, took


def ways(device: torch.device) -> list[str]:
    """The ways of training several arms that can be timed on `device`."""
    return ["eager", *(["processes"] if devices.can_fork(device) else [])]
