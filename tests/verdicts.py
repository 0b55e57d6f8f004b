"""Evaluate tickets whose worth is known, over and over: how many verdicts are false?

    python tests/verdicts.py --simulations 200

Small networks on clusters, trained for real, five replicates with two trials each, as bare `eval` does. Planted:

- a winning ticket: mask and weights of a network that was trained to the end on other examples. The training is too
  short for anything else to get there.
- a random mask passed off as one that pruning has found.
- a ticket that is nothing special: a random mask that keeps nearly all weights.

What is true of each kind is decided by the means over all simulations, and the mean margin. "inconclusive" is not
false, and is counted too.
"""

import argparse
import collections
import multiprocessing
import statistics
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ticketfind import masks
from ticketfind.arms import Arm, Outcome, State, Task
from ticketfind.batches import Data, Split
from ticketfind.experiments import Design, Evaluation, evaluate
from ticketfind.layers import from_layers
from ticketfind.masks import Masks
from ticketfind.recipe import Train
from ticketfind.ticket import Provenance, Ticket
from ticketfind.train import fit

REPLICATES, TRIALS = 5, 2
KINDS = ("planted", "a random mask", "nothing special")


class Net(nn.Module):
    """[b, 20] -> [b, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(20, 40), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


def fresh(seed: int) -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: value.detach().clone() for name, value in Net().state_dict().items()}


def split(size: int, seed: int) -> Split:
    """Clusters in two places for each class, with noise."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(10, 20, generator=generator)
    generator.manual_seed(seed)
    places = torch.randint(10, (size,), generator=generator)
    return Split(centers[places] + 1.1 * torch.randn(size, 20, generator=generator), places % 5)


def recipe(iterations: int) -> Train:
    keys = {"iterations": iterations, "batch_size": 32, "optimizer": "adam", "lr": 2e-3, "weight_decay": 0,
            "schedule": "constant", "warmup": 0, "eval_every": max(10, iterations // 4)}  # fmt: skip
    return from_layers({"train": keys}).resolved(train_size=1000, validation=200, device="cpu").train


def task_of(seed: int) -> Task:
    data = Data(split(1000, 10 * seed + 1), split(200, 10 * seed + 2), split(1000, 10 * seed + 3))
    return Task(model=Net(), data=data, device=torch.device("cpu"), fresh=fresh)


def random_masks(density: float, seed: int) -> Masks:
    shapes = {"fc1.weight": (40, 20), "fc2.weight": (5, 40)}
    whole = masks.dense(shapes)
    counted = {name: mask.flatten() for name, mask in whole.items()}
    for mask in counted.values():
        mask[int(density * mask.numel()) :] = False
    return masks.random_like({name: mask.view(shapes[name]) for name, mask in counted.items()}, seed=seed)


def ticket_of(init: State, mask: Masks, replicate: int) -> Ticket:
    sigma = {name: float(init[name].std()) for name in mask}
    about = Provenance(
        recipe={}, round=1, replicate=replicate, iteration=0, sigma=sigma, aliases={}, claims={}, versions={}
    )
    return Ticket(mask, init, about)


def planted(seed: int) -> tuple[State, Masks]:
    """A pruned solution of the problem, from examples that the evaluation does not have."""
    elsewhere, start = task_of(seed + 500_000), fresh(seed)
    mask: Masks = masks.dense({"fc1.weight": (40, 20), "fc2.weight": (5, 40)})
    groups = masks.make_groups([*mask], {"*": 0.3}, "layer")
    for _ in range(2):
        ((_, outcome),) = fit([Arm("planted", start, mask, seed)], elsewhere, recipe(200))
        assert isinstance(outcome, Outcome)
        start = outcome.final
        mask = masks.prune(mask, {name: start[name].abs() for name in mask}, groups)
    ((_, outcome),) = fit([Arm("planted", start, mask, seed)], elsewhere, recipe(200))
    assert isinstance(outcome, Outcome)
    return outcome.final, mask


def simulate(job: tuple[str, int]) -> tuple[str, Evaluation]:
    kind, number = job
    torch.set_num_threads(1)
    seeds = [100_000 + 100 * number + replicate for replicate in range(REPLICATES)]
    if kind == "planted":
        pairs, how = [planted(seed) for seed in seeds], recipe(40)
    elif kind == "a random mask":
        pairs, how = [(fresh(seed), random_masks(0.08, seed)) for seed in seeds], recipe(100)
    else:
        pairs, how = [(fresh(seed), random_masks(0.95, seed)) for seed in seeds], recipe(100)
    tickets = [ticket_of(init, mask, replicate) for replicate, (init, mask) in enumerate(pairs)]
    design = Design(tickets=tickets, trials=TRIALS)
    return kind, evaluate(design, task_of(number), how, first_seed=seeds[0] + 50)


def truth(found: list[Evaluation]) -> set[str]:
    """The answers that are right, by the means over all simulations."""
    mean = {name: statistics.fmean(e.arms[name].accuracy_early.mean for e in found) for name in found[0].arms}
    margin = statistics.fmean(e.verdict.margin or 0.0 for e in found)
    print("  " + ", ".join(f"{name} {100 * value:.2f}" for name, value in mean.items()), f"margin {100 * margin:.2f}")
    if mean["ticket"] < mean["dense"] - margin:
        return {"not matching"}
    right = set()
    least = 0.0005  # closer than this, over hundreds of simulations, is equal
    if all(mean["ticket"] > mean[name] + least for name in ("reinit", "random")):
        right.add("winning")
    if any(mean[name] >= mean["dense"] - margin for name in ("reinit", "random")):
        right.add("matching but not special")
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    began, worst = time.monotonic(), 0.0
    with multiprocessing.get_context("spawn").Pool(asked.processes) as pool:
        for kind in KINDS:
            jobs = [(kind, number) for number in range(asked.simulations)]
            found = [evaluation for _, evaluation in pool.imap_unordered(simulate, jobs, chunksize=4)]
            print(f"{kind}:")
            right = truth(found)
            counts = collections.Counter(evaluation.verdict.text.split(":")[0] for evaluation in found)
            false = sum(count for answer, count in counts.items() if answer not in right | {"inconclusive"})
            worst = max(worst, false / len(found))
            print(f"  right: {' or '.join(sorted(right))}; given: {dict(counts.most_common())}")
            print(f"  false: {false} of {len(found)} ({false / len(found):.1%})", flush=True)
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if worst > 0.05 else 0


if __name__ == "__main__":
    sys.exit(main())
