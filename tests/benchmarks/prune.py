"""Time one round's pruning of a ViT-B-sized network on the CPU: python tests/benchmarks/prune.py [ROUNDS]

85 million weights in 48 tensors, global scope, a fifth pruned a round: the score and its check, then the mask.
"""

import statistics
import sys
import time

import torch

from ticketfind import masks
from ticketfind.scores import SCORES, Seen, scored

LAYERS = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}


def main(rounds: int) -> None:
    """Print the seconds of each round, and their median."""
    shapes = {f"blocks.{block}.{name}": shape for block in range(12) for name, shape in LAYERS.items()}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    groups = masks.make_groups(list(weights), {"*": 0.2}, "global")
    kept, taken = masks.dense(shapes), []
    for number in range(rounds + 1):
        began = time.perf_counter()
        scores = scored(SCORES["magnitude"], Seen(weights, weights, kept), seed=0)
        after = time.perf_counter()
        kept = masks.prune(kept, scores, groups)
        ended = time.perf_counter()
        if number:  # the first warms up
            taken.append(ended - began)
            print(f"{masks.count(kept):,} left: score {after - began:.3f} s, mask {ended - after:.3f} s")
    print(f"median {statistics.median(taken):.3f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
