"""Whether a pruned network's output still depends on its input: judged without training it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ticketfind import TicketfindError, masks, prunable
from ticketfind.arms import Task
from ticketfind.connection import is_disconnected
from ticketfind.recipe import Recipe
from ticketfind.results import Round
from ticketfind.scores import by_function

MakeTask = Callable[..., Task]


class Skip(nn.Module):
    """[b, 12] -> [b, 4]; `inner` has a way around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(x + F.relu(self.inner(x)))


class StartsAtZero(nn.Module):
    """Its last layer starts at zero, as some heads do: no input changes the output before it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 4)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))


class Negative(StartsAtZero):
    """Its first layer is heard where its weights are negative, and so never with positive ones."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(-F.linear(x.abs(), self.first.weight)))


class Deep(nn.Sequential):
    """[b, 12] -> [b, 4] through 40 layers, in which sums of positive numbers would overflow."""

    def __init__(self) -> None:
        inner = [layer for _ in range(40) for layer in (nn.Linear(16, 16), nn.ReLU())]
        super().__init__(nn.Linear(12, 16), nn.ReLU(), *inner, nn.Linear(16, 4))


class Conv(nn.Module):
    """[b, 12] -> a tuple of [b, 4] and features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Linear(40, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.norm(self.conv(x.unsqueeze(1)))).flatten(1)
        return self.fc(features), features


def emptied(task: Task, *names: str) -> bool:
    """Is it cut off with these parameters empty and all others whole?"""
    shapes = {c.name: c.shape for c in prunable.candidates(task.model) if c.pruned}
    mask = masks.dense(shapes)
    for name in names:
        mask[name] = torch.zeros_like(mask[name])
    return is_disconnected(task, task.start(0), mask)


@pytest.mark.parametrize(
    ("net", "names", "expected"),
    [
        ("mlp", [], False),
        ("mlp", ["fc1.weight"], True),
        ("mlp", ["fc2.weight"], True),
        ("mlp", ["fc3.weight"], True),
        ("normed", ["fc1.weight"], True),
        (Skip, ["inner.weight"], False),
        (Skip, ["inner.weight", "last.weight"], True),
        (StartsAtZero, [], False),
        (StartsAtZero, ["first.weight"], True),
        (StartsAtZero, ["last.weight"], True),
        (Negative, [], False),
        (Deep, [], False),
        (Deep, ["40.weight"], True),
        (Conv, [], False),
        (Conv, ["conv.weight"], True),
    ],
)
def test_an_emptied_layer(net: Any, names: list[str], expected: bool, make_task: MakeTask) -> None:
    assert emptied(make_task(net), *names) is expected


def test_a_training_agrees(make_task: MakeTask) -> None:
    """What is called cut off has one output for every input, whatever is trained."""
    task = make_task("mlp")
    assert task.data is not None
    model = task.model
    with torch.no_grad():
        model.get_parameter("fc2.weight").zero_()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n != "fc2.weight"], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(task.data.test.inputs), task.data.test.targets).backward()
        optimizer.step()
    outputs = model(task.data.test.inputs)
    assert torch.equal(outputs, outputs[:1].expand_as(outputs))


def test_it_is_noticed_before_its_round_is_paid_for(
    make_task: MakeTask, make_recipe: Callable[..., Recipe], run_search: Callable[..., list[Round]], watch: Mock,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A score that empties one layer: the dense round is trained, and not an iteration more."""
    recipe = make_recipe({"prune.scope": "global", "prune.fraction": 0.5, "run.replicates": 1})

    def empties(trained: dict[str, Tensor], initial: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.full_like(w, 0.0 if name == "fc2.weight" else 1.0) for name, w in trained.items()}

    with pytest.raises(
        TicketfindError, match=r"round 1, replicate 0: no weight is left in fc2\.weight, and the output"
    ):
        run_search(recipe, make_task("mlp"), tmp_path / "run", score=by_function(empties))
    ticks = sum(call.args[0] for call in watch.tick.call_args_list)
    assert ticks == 12
    assert "no weight is left in fc2.weight" in watch.note.call_args_list[-1].args[0]
