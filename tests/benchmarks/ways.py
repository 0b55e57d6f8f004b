"""Time the ways of training several arms on a CPU: python tests/benchmarks/ways.py [BLOCKS]

For each network, "eager" (one after another, all cores) and "processes" (side by side, one core each) in turn, as many
times as BLOCKS says; prints milliseconds per arm and iteration (minimum, median, maximum) and the ratio of medians.
"""

import statistics
import sys
import time

import torch

from ticketfind import forks, layers, models, recipe, train
from ticketfind.batches import Data, Split
from ticketfind.devices import Way

CASES = (  # network, input shape, batch, iterations, arms
    ("lenet-300-100", (1, 8, 8), 60, 500, 5),
    ("lenet-300-100", (1, 28, 28), 60, 300, 3),
    ("lenet-300-100", (1, 28, 28), 60, 300, 5),
    ("resnet-20", (3, 32, 32), 128, 4, 2),
    ("resnet-20", (3, 32, 32), 128, 4, 3),
    ("conv-2", (1, 28, 28), 60, 8, 2),
    ("conv-2", (1, 28, 28), 60, 8, 3),
)


def seconds(task: train.Task, how: recipe.Train, arms: list[train.Arm], way: str) -> float:
    """Wall time of training every arm."""
    began = time.perf_counter()
    for _ in train.fit(arms, task, how, way=Way(way, at_once=len(arms))):
        pass
    return time.perf_counter() - began


def main(blocks: int) -> None:
    """Print a row for each case."""
    print(f"torch {torch.__version__}, {forks.cores()} cores, {torch.get_num_threads()} threads, {blocks} blocks")
    for spec, shape, batch, iterations, count in CASES:
        draw = torch.Generator().manual_seed(0)
        sizes = {"train": 10 * batch, "validation": batch, "test": batch}
        splits = {
            part: Split(torch.rand(n, *shape, generator=draw), torch.randint(10, (n,), generator=draw))
            for part, n in sizes.items()
        }
        source = models.source(spec, {}, example=splits["train"].inputs[:2], outputs=10)
        task = train.Task(
            source.new(0), Data(**splits), torch.device("cpu"), lambda seed, s=source: models.state_of(s.new(seed))
        )
        settings = {"iterations": iterations, "batch_size": batch, "optimizer": "adam", "schedule": "constant"}
        asked = layers.from_layers({"train": {**settings, "warmup": 0, "eval_every": iterations, "weight_decay": 0}})
        how = asked.resolved(train_size=sizes["train"], validation=batch, device="cpu").train
        arms = [train.Arm(f"arm {seed}", task.start(seed), {}, seed) for seed in range(count)]
        taken: dict[str, list[float]] = {"eager": [], "processes": []}
        for block in range(blocks + 1):
            for way, found in taken.items():
                one = 1000 * seconds(task, how, arms, way) / count / iterations
                if block:  # the first warms up
                    found.append(one)
        cells = [f"{way} {min(t):.2f} {statistics.median(t):.2f} {max(t):.2f}" for way, t in taken.items()]
        ratio = statistics.median(taken["eager"]) / statistics.median(taken["processes"])
        print(
            f"{spec} {'x'.join(map(str, shape))} batch {batch}, {count} arms: {', '.join(cells)} ms; ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
