"""What no state dict holds starts afresh in every training too."""

import dataclasses

import pytest
import torch
from torch import nn

from ticketfind import models
from ticketfind.arms import Arm
from ticketfind.connection import is_disconnected
from ticketfind.devices import Way
from ticketfind.train import fit


class Counting(nn.Module):
    """Its outputs depend on a buffer that is not saved, and on plain Python state."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.calls = 0

    def forward(self, x):
        if self.training:
            self.seen += 1
            self.calls += 1
        return self.fc(x.flatten(1)) * (1 + 0.1 * self.seen + 0.1 * self.calls)


@pytest.mark.parametrize("way", ["eager", "processes"])
def test_the_second_arm_is_as_if_it_were_the_first(way, make_task, make_train):
    task = make_task()
    torch.manual_seed(0)
    model = Counting()
    model.fc = nn.Linear(task.data.train.inputs.flatten(1).shape[1], task.data.classes)
    task = dataclasses.replace(task, model=model)
    start = models.state_of(model)
    (_, one), (_, other) = fit([Arm(name, start, {}, 3) for name in "ab"], task, make_train(), way=Way(way, at_once=8))
    assert one.points == other.points
    assert model.calls == 0


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Sigmoid])
def test_a_saturating_net_is_not_called_disconnected(activation, make_task):
    """Positive weights saturate it: equal outputs then say nothing."""
    task = make_task()
    width = task.data.train.inputs.flatten(1).shape[1]
    first = [nn.Flatten(), nn.Linear(width, 400), activation()]
    layers = [nn.Linear(400, 400), activation(), nn.Linear(400, 400), activation(), nn.Linear(400, 3)]
    task = dataclasses.replace(task, model=nn.Sequential(*first, *layers))
    start = models.state_of(task.model)
    assert not is_disconnected(task, start, {})
    start["7.weight"].zero_()  # a last layer that starts at zero
    assert not is_disconnected(task, start, {})
    emptied = {"3.weight": torch.zeros(400, 400, dtype=torch.bool)}
    if activation is nn.ReLU:
        assert is_disconnected(task, start, emptied)
