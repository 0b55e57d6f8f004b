"""Rows h to k of docs/performance.md, on a CUDA device: python tests/benchmarks/gpu.py [BLOCKS]

Synthetic data on the device, a mask on 20 % of the weights; nothing is read from disk. Each row's cases in turn, BLOCKS
times (5): minimum, median, maximum, and the median of the blocks' ratios. What a training costs once (copies, a
recording, a compilation) is taken off.

  h  lenet-300-100 on 28x28 images, batch 60, Adam: microseconds per iteration and arm, 10 arms
  i  lenet-300-100 as above, and resnet-20 on 32x32 images, batch 128, SGD: 10 arms in all over 1 arm
  j  resnet-20 as above, 1 arm: graph over eager
  k  timm's resnet50 on 224x224 images, batch 256, SGD, bf16, channels last: masked images a second over those of the
     plain loop without a mask, with the same settings and its data on the device, too
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ticketfind import bench, layers, models
from ticketfind.arms import Task
from ticketfind.batches import Batch, Data, Split
from ticketfind.bench import Case, Timing
from ticketfind.devices import EAGER, Way
from ticketfind.recipe import Train

SECONDS = 1.0
ADAM = {"optimizer": "adam", "lr": 1.2e-3, "weight_decay": 0}
SGD = {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}


def made(
    spec: str, shape: Sequence[int], batch: int, settings: dict[str, Any], device: torch.device, classes: int = 10
) -> tuple[Task, Train]:
    """A network and noise for four batches, all of it on the device."""
    draw = torch.Generator(device).manual_seed(0)
    inputs = torch.rand(4 * batch, *shape, generator=draw, device=device)
    split = Split(inputs, torch.randint(classes, (4 * batch,), generator=draw, device=device))
    few = Split(inputs[:batch], split.targets[:batch])
    source = models.source(spec, {}, example=inputs[:2].cpu(), outputs=classes)
    task = Task(source.new(0).to(device), Data(split, few, few), device, lambda seed: models.state_of(source.new(seed)))
    rest = {"iterations": 1, "batch_size": batch, "schedule": "constant", "warmup": 0, "eval_every": 1}
    asked = layers.from_layers({"train": {**rest, **settings}})
    return task, asked.resolved(train_size=4 * batch, validation=batch, device=device.type).train


def resident_loop(task: Task, how: Train, base: Way) -> Case:
    """The plain loop, dense, whose batches are gathered on the device."""
    assert task.data is not None and isinstance(task.data.train, Split)
    split = task.data.train

    def loader() -> Iterator[Batch]:
        for indices in torch.randperm(len(split), device=split.targets.device).split(how.batch_size):
            yield split.batch(indices)

    return Case("plain, dense, resident", "plain", 1, bench.plain_loop(task, loader, how, {}, base))


def timed(title: str, cases: Sequence[Case], blocks: int) -> dict[tuple[str, str, int], Timing]:
    """What each case took, by name, way and arms; printed, as are the reasons of those that cannot be timed."""
    print(f"\n{title}")
    found = bench.measure(cases, blocks=blocks, seconds=SECONDS)
    for timing in found:
        case, us = timing.case, [1000 * ms for ms in timing.ms]
        spread = f"{min(us):.1f} / {1000 * timing.median:.1f} / {max(us):.1f}"
        print(f"  {case.name:22} {case.way:8} {case.arms:2} arms  {spread} us per iteration and arm")
    for note in dict.fromkeys(note for case in cases for note in case.notes):
        print(f"  {note}")
    torch.cuda.empty_cache()
    return {(timing.case.name, timing.case.way, timing.case.arms): timing for timing in found}


def row(letter: str, text: str, value: float | None, reach: str) -> None:
    """One figure of the table."""
    print(f"{letter}  {text}: {'not timed' if value is None else f'{value:.2f}'} (reach {reach})")


def small(letter: str, spec: str, shape: Sequence[int], batch: int, settings: dict[str, Any], blocks: int) -> None:
    """Rows h, i and j, as far as they are about this network."""
    task, how = made(spec, shape, batch, settings, torch.device("cuda"))
    cases = bench.cases(task, how, base=EAGER, ways=["graph", "stacked", "compile"], arms=[10])
    found = timed(f"{spec}, {'x'.join(map(str, shape))}, batch {batch}, {how.optimizer}, fp32", cases, blocks)
    one = found.get(("masked", "graph", 1))
    for way in ("graph", "stacked"):
        ten = found.get(("masked", way, 10))
        if letter == "h":
            row("h", f"{spec}, 10 arms, {way}, us", ten and 1000 * ten.median, "<= 20, moonshot <= 8")
        ratio = 10 * ten.over(one) if ten and one else None
        row("i", f"{spec}, 10 arms {way} / 1 arm graph", ratio, "<= 2, moonshot <= 1.3")
    if letter == "j":
        eager = found.get(("masked", "eager", 1))
        row("j", f"{spec}, graph / eager", one.over(eager) if one and eager else None, "<= 0.35, moonshot <= 0.2")


def large(spec: str, shape: Sequence[int], batch: int, blocks: int, device: torch.device) -> None:
    """Row k."""
    task, how = made(spec, shape, batch, SGD, device, classes=1000)
    base = Way(precision="bf16", channels_last=True)
    plain = resident_loop(task, how, base)
    ours = [
        case for case in bench.cases(task, how, base=base, ways=["graph", "compile"], arms=[]) if case.way != "plain"
    ]
    title = f"{spec}, {'x'.join(map(str, shape))}, batch {batch}, {how.optimizer}, bf16, channels last"
    found = timed(title, [plain, *ours], blocks)
    theirs = found["plain, dense, resident", "plain", 1]
    print(f"  plain, dense: {1000 * batch / theirs.median:.0f} images/s")
    for way in ("graph", "compile"):
        mine = found.get(("masked", way, 1))
        if mine:
            print(f"  ours, masked, {way}: {1000 * batch / mine.median:.0f} images/s")
        row("k", f"{spec}, masked {way} / dense plain", theirs.over(mine) if mine else None, ">= 1.0, moonshot >= 1.15")


def main(blocks: int) -> int:
    """Print every row; the exit code."""
    if not torch.cuda.is_available():
        print("gpu.py: needs a CUDA device; torch finds none here", file=sys.stderr)
        return 1
    name, version = torch.cuda.get_device_name(), torch.version.cuda
    print(f"{name}, torch {torch.__version__}, CUDA {version}, {blocks} blocks of {SECONDS} s")
    small("h", "lenet-300-100", (1, 28, 28), 60, ADAM, blocks)
    small("j", "resnet-20", (3, 32, 32), 128, SGD, blocks)
    large("timm:resnet50", (3, 224, 224), 256, blocks, torch.device("cuda"))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
