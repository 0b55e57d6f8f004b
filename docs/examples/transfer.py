"""A ticket for a new task in weights that were trained elsewhere, for another one, under another head.

    python docs/examples/transfer.py                   # makes old.pt, and searches with the settings below
    python docs/examples/transfer.py --rounds 2        # with others

The old task: which of the digits 0 to 5 an image shows. The new one: which of 6 to 9, with few examples. The old
program saved its weights as many do: "module." before every name, in a container with other things.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import ticketfind

OLD = "old.pt"


class Net(nn.Module):
    """[b, 1, 8, 8] -> [b, num_classes]."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(512, num_classes)

    def forward(self, x):
        return self.head(self.body(x))


def digits(part, classes):
    """Images [n, 1, 8, 8] in 0..1 and labels, counted from 0, of some classes of the digits in ticketfind."""
    arrays = np.load(Path(ticketfind.__file__).parent / "digits.npz")
    inputs, labels = torch.from_numpy(arrays[f"x_{part}"]), torch.from_numpy(arrays[f"y_{part}"]).long()
    chosen = torch.isin(labels, torch.tensor(classes))
    return inputs[chosen].reshape(-1, 1, 8, 8) / 16, labels[chosen] - classes[0]


def new_task(examples=200):
    """(train, test) of the new task, for --data."""
    inputs, labels = digits("train", range(6, 10))
    return (inputs[:examples], labels[:examples]), digits("test", range(6, 10))


def train_elsewhere(file, iterations=300):
    """What somebody else has done: a network for the old task, in a file."""
    torch.manual_seed(0)
    model = Net(num_classes=6)
    wrapped = nn.ModuleDict({"module": model})  # the names that DistributedDataParallel gives
    inputs, labels = digits("train", range(6))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(iterations):
        batch = torch.randint(len(inputs), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()
    saved = {"step": iterations, "model": {"state_dict": wrapped.state_dict()}, "optimizer": optimizer.state_dict()}
    torch.save(saved, file)


SETTINGS = [
    "--model", f"{__file__}:Net", "--checkpoint", OLD, "--allow-mismatch", "head.*", "--rewind", "0it",
    "--data", f"{__file__}:new_task", "--out", "runs/transfer", "--iterations", "300", "--batch-size", "40",
    "--lr", "1e-3", "--prune", "0.3", "--rounds", "10", "--replicates", "5",
]  # fmt: skip

if __name__ == "__main__":
    if not Path(OLD).exists():
        train_elsewhere(OLD)
    sys.exit(subprocess.call([sys.executable, "-m", "ticketfind", "search", *SETTINGS, *sys.argv[1:]]))
