"""A whole search against the script that people write: python tests/benchmarks/whole.py FOLDER [BLOCKS]

FOLDER holds Fashion-MNIST's IDX files, plain or .gz. LeNet-300-100, batch 60, Adam: three trainings of two epochs with
two prunings between them, validation and test measured after each epoch. Processes from start to end, in turn, BLOCKS
times (5); minimum, median, maximum and the median of the blocks' ratios. "plain" is this file with another argument:
torchvision's images with ToTensor, DataLoaders without workers, torch.nn.utils.prune and torch.optim.
"""

import copy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH, EPOCHS, TRAININGS, HELD_OUT = 60, 2, 3, 5000


def plain(root: str) -> None:
    """What people write; `root` holds torchvision's folder FashionMNIST."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.nn.utils import prune
    from torch.utils.data import DataLoader, random_split
    from torchvision import datasets, transforms

    torch.manual_seed(0)
    whole = datasets.FashionMNIST(root, train=True, transform=transforms.ToTensor())
    train, validation = random_split(whole, [len(whole) - HELD_OUT, HELD_OUT])
    test = datasets.FashionMNIST(root, train=False, transform=transforms.ToTensor())
    loader = DataLoader(train, BATCH, shuffle=True)
    measured = [DataLoader(part, 256) for part in (validation, test)]
    layers = (nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10))
    model = nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    first = copy.deepcopy(model.state_dict())
    for training in range(TRAININGS):
        if training:
            for layer, fraction in zip(layers, (0.2, 0.2, 0.1), strict=True):
                prune.l1_unstructured(layer, "weight", fraction)
            with torch.no_grad():
                for number, layer in zip((1, 3, 5), layers, strict=True):
                    layer.weight_orig.copy_(first[f"{number}.weight"])
                    layer.bias.copy_(first[f"{number}.bias"])
        optimizer = torch.optim.Adam(model.parameters(), lr=1.2e-3)
        for epoch in range(EPOCHS):
            model.train()
            for inputs, targets in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
            model.eval()
            right = []
            with torch.no_grad():
                for part in measured:
                    right.append(sum(int((model(x).argmax(1) == y).sum()) for x, y in part))
            print(training, epoch, right)


def main(folder: Path, blocks: int) -> None:
    """Both in turn."""
    from plain import raw_copy

    with tempfile.TemporaryDirectory() as root:
        raw_copy(folder, Path(root))
        lengths = {"--epochs": EPOCHS, "--rounds": TRAININGS - 1, "--replicates": 1, "--set": "train.eval_every=1ep"}
        options = [str(part) for option in lengths.items() for part in option]
        search = [sys.executable, "-m", "ticketfind", "search", "lenet-300-100", "--data", str(folder), *options]
        taken: dict[str, list[float]] = {"plain": [], "ticketfind": []}
        for block in range(blocks):
            for name, found in taken.items():
                command = [sys.executable, __file__, "--plain", root]
                if name == "ticketfind":
                    command = [*search, "-q", "--out", str(Path(root) / f"run-{block}")]
                began = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                found.append(time.perf_counter() - began)
    for name, found in taken.items():
        print(f"{name:10} {min(found):.2f} / {statistics.median(found):.2f} / {max(found):.2f} s")
    ratios = [mine / theirs for mine, theirs in zip(taken["plain"], taken["ticketfind"], strict=True)]
    print(f"plain / ticketfind {statistics.median(ratios):.2f} (median of {blocks} blocks)")


if __name__ == "__main__":
    if sys.argv[1] == "--plain":
        plain(sys.argv[2])
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
