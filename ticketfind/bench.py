"""Training steps timed on this machine: ticketfind's, in each of its ways, against the loop that people write."""

import copy
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from ticketfind import TicketfindError, devices, engine, forks, masks, prunable
from ticketfind.arms import Arm, Task
from ticketfind.batches import Batch, Data, Split, map_inputs
from ticketfind.devices import EAGER, Way
from ticketfind.outputs import call
from ticketfind.readers import Duration
from ticketfind.recipe import Train
from ticketfind.train import fit

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
    once: int = 1
    """Iterations of the shortest training that prepares all that longer ones do (a recording of several steps)."""
    notes: list[str] = field(default_factory=list)
    """Why this cannot be timed, once it has been run: the way cannot train this model."""


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


def cases(task: Task, how: Train, *, base: Way, ways: Sequence[str], arms: Sequence[int]) -> list[Case]:
    """The plain loop, one dense and one masked arm, and masked arms in each way: one where that goes no faster with
    several, else as many as `arms` says.

    base: its precision and memory format are used throughout.
    Raises TicketfindError for data that is not resident, or no single tensor.
    """
    if task.data is None or not isinstance(task.data.train, Split) or isinstance(task.data.train.inputs, dict):
        raise TicketfindError("bench: expected resident data of one input tensor, found other data; give other --data")
    split, inputs, kept = task.data.train, task.data.train.inputs, mask_of(task)
    few = Split(*split.batch(torch.arange(min(len(split), how.batch_size), device=split.targets.device)))
    small = dataclasses.replace(task, data=Data(split, few, few))  # what is timed is training
    starts = [task.start(seed) for seed in range(max(arms, default=1))]

    def ours(name: str, way: str, count: int, mask: masks.Masks) -> Case:
        at_once = min(count, devices.PROCESSES_PER_CORE * forks.cores()) if way == "processes" else count
        used = dataclasses.replace(base, name=way, at_once=at_once)
        trained = [Arm(f"arm {seed}", start, mask, seed) for seed, start in enumerate(starts[:count])]
        notes: list[str] = []

        def run(iterations: int) -> None:
            length = dataclasses.replace(how, iterations=Duration(iterations), eval_every=Duration(iterations))
            for _ in fit(trained, small, length, way=used, note=notes.append):
                pass

        once = engine.UNROLLED if task.device.type == "cuda" and way != "eager" else 1
        return Case(name, way, count, run, once, notes)

    examples = TensorDataset(inputs.cpu(), split.targets.cpu())
    plain = plain_loop(task, lambda: DataLoader(examples, how.batch_size, shuffle=True), how, kept, base)
    alone = [way for way in ways if way in ("compile", "graph")]
    together = [(way, count) for way in ways if way != "compile" for count in arms if count > 1]
    return [
        Case("plain", "plain", 1, plain),
        ours("dense", "eager", 1, {}),
        ours("masked", "eager", 1, kept),
        *(ours("masked", way, 1, kept) for way in alone),
        *(ours("masked", way, count, kept) for way, count in together),
    ]


def mask_of(task: Task) -> masks.Masks:
    """A random mask that keeps the share KEPT of each prunable tensor."""
    generator = torch.Generator().manual_seed(0)
    found = [candidate for candidate in prunable.candidates(task.model) if candidate.pruned]
    return {c.name: torch.rand(c.shape, generator=generator) < KEPT for c in found}


def plain_loop(
    task: Task, loader: Callable[[], Iterable[Batch]], how: Train, kept: masks.Masks, base: Way = EAGER
) -> Callable[[int], None]:
    """The loop that people write: torch.nn.utils.prune, torch.optim and a DataLoader, which `loader` makes.

    Tuned as far as that goes without another design: no `.item()`, gradients set to None, and on CUDA the same
    precision and memory format as ours.
    """
    optimizers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    context, last = devices.autocast(base, task.device), base.channels_last and task.device.type == "cuda"
    layout = torch.channels_last if last else torch.preserve_format

    def run(iterations: int) -> None:
        model = copy.deepcopy(task.model).train()
        if last:
            model.to(memory_format=layout)
        for name, mask in kept.items():
            place, _, attribute = name.rpartition(".")
            prune.custom_from_mask(model.get_submodule(place), attribute, mask.to(task.device))  # type: ignore[no-untyped-call]
        momentum = {"momentum": how.momentum} if how.optimizer == "sgd" else {}
        optimizer = optimizers[how.optimizer](model.parameters(), lr=how.lr, weight_decay=how.weight_decay, **momentum)
        epochs = itertools.chain.from_iterable(loader() for _ in itertools.count())
        for inputs, targets in itertools.islice(epochs, iterations):
            optimizer.zero_grad()
            with context():
                there = map_inputs(lambda t: t.to(task.device, memory_format=layout, non_blocking=True), inputs)
                loss = task.loss(call(model, there), targets.to(task.device, non_blocking=True))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if task.device.type == "cuda":
            torch.cuda.synchronize(task.device)

    def as_people_run_it(iterations: int) -> None:
        with devices.arithmetic(base, task.device, task.model):
            torch.set_flush_denormal(False)
            run(iterations)

    return as_people_run_it


def measure(
    found: Sequence[Case], *, blocks: int, seconds: float, tick: Callable[[int], None] = lambda n: None
) -> list[Timing]:
    """Every case that can be timed, in turn, `blocks` times after one to warm up, each about `seconds` long.

    Side by side in one run, so that a busy machine is slow for all of them: the ratios of medians are what counts.
    What a training costs once (copies, a recording, a process) is taken off: a block's time is that of many iterations
    less that of as few as `Case.once` says. tick: told of the blocks done.
    """
    counts = [_iterations(case, seconds) for case in found]
    timed = [(case, count, list[float]()) for case, count in zip(found, counts, strict=True) if not case.notes]
    for _ in range(blocks):
        for case, count, ms in timed:
            ms.append(1000 * _seconds_more(case, count) / count / case.arms)
            tick(1)
    return [Timing(case, tuple(ms)) for case, _, ms in timed]


def _seconds(case: Case, iterations: int) -> float:
    began = time.perf_counter()
    case.run(iterations)
    return time.perf_counter() - began


def _seconds_more(case: Case, count: int) -> float:
    """What so many iterations add; timed again where a machine that is busy made the short run the longer one."""
    while True:
        more = _seconds(case, case.once + count) - _seconds(case, case.once)
        if more > 0:
            return more


def _iterations(case: Case, seconds: float) -> int:
    """Iterations that take about so long, at least three: tried with four times as many each time; warms up, too."""
    count = 1
    while not case.notes:
        once, took = _seconds(case, case.once), _seconds(case, case.once + count)
        if took - once > max(seconds / 5, once / 2) or took > 4 * seconds:
            return max(3, round(count * seconds / max(took - once, seconds / 20)))
        count *= 4
    return count


def ways(device: torch.device) -> list[str]:
    """The ways of training that can be timed on `device`."""
    if device.type == "cuda":
        return ["eager", "stacked", "graph", "compile"]
    return ["eager", *(["processes"] if devices.can_fork(device) else []), "stacked", "compile"]
