"""A training loop of one's own, which ticketfind calls for every training of a search: --trainer own_loop.py:train.

    ticketfind search --model docs/examples/own_loop.py:Net --trainer docs/examples/own_loop.py:train \
        --rewind 50it --rounds 8 --replicates 5

Data, loss, schedule and evaluation are this file's; ticketfind prunes and rewinds between the calls.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

STEPS, BATCH = 600, 64


class Net(nn.Module):
    """[b, 2] -> [b, 3]."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, x):
        return self.layers(x)


def spirals(count, seed):
    """Three spiral arms with some noise: points [count, 2] and the arm of each [count]."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    radius = torch.rand(count, generator=generator)
    angle = 4 * radius + 2 * math.pi / 3 * targets + 0.25 * torch.randn(count, generator=generator)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1), targets


TRAIN, VALIDATION, TEST = spirals(3000, seed=0), spirals(600, seed=1), spirals(1200, seed=2)


def train(model, hold, arm):
    """Train `model` in place, from its weights as they are; arm.first is above 0 after rewinding to a later step."""
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True)
    hold(optimizer)  # pruned weights stay exactly zero, and the steps are counted
    best = (math.inf, 0, 0.0)  # validation loss, step, test accuracy
    for step in range(arm.first, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * min(1, (step + 1) / 50) * (1 - step / STEPS)
        generator = torch.Generator().manual_seed(arm.seed * STEPS + step)  # the same batch at this step in every round
        batch = torch.randint(len(TRAIN[1]), (BATCH,), generator=generator)
        inputs, targets = (part[batch].to(device) for part in TRAIN)
        loss = F.cross_entropy(model(inputs), targets, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            validation_loss, _ = measure(model, VALIDATION)
            _, accuracy = measure(model, TEST)
            best = min(best, (validation_loss, step + 1, accuracy))
    return {
        "accuracy": accuracy,  # the only one that must be there
        "accuracy_early": best[2],
        "early_stop": best[1],
        "validation_loss": best[0],
        "test_size": len(TEST[1]),
    }


@torch.no_grad()
def measure(model, examples):
    """Mean loss and accuracy."""
    device = next(model.parameters()).device
    inputs, targets = (part.to(device) for part in examples)
    model.eval()
    outputs = model(inputs)
    model.train()
    return F.cross_entropy(outputs, targets).item(), (outputs.argmax(1) == targets).double().mean().item()
