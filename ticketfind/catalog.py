"""The shipped recipes: what each is made for, and what it costs."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from ticketfind import assemble, devices, layers, models, nets
from ticketfind.arms import Task
from ticketfind.batches import Data, Split, tensors_of
from ticketfind.plan import Plan, make_plan
from ticketfind.recipe import Recipe
from ticketfind.train import step_seconds


@dataclass(frozen=True)
class Entry:
    """A recipe, counted for the data that it is made for."""

    recipe: Recipe
    """As it is written."""
    about: str
    """The comment that its file begins with."""
    text: str
    """The file."""
    shape: tuple[int, ...]
    """Of an image that it is counted for: channels, height, width."""
    plan: Plan
    step: float | None
    """Seconds of a training step on this machine, where it was measured."""

    @property
    def parameters(self) -> int:
        """Of the network, all that are trained."""
        return sum(math.prod(candidate.shape) for candidate in self.plan.candidates)

    @property
    def trainings(self) -> int:
        """Of a whole search."""
        return (len(self.plan.iterations) + len(self.plan.apart)) * self.recipe.run.replicates

    @property
    def iterations(self) -> int:
        """Of all trainings."""
        return self.plan.total * self.recipe.run.replicates

    @property
    def examples(self) -> int:
        """That all trainings see."""
        return self.iterations * self.recipe.train.batch_size

    @property
    def seconds(self) -> float | None:
        """Of all training steps, one after another, without evaluations."""
        return None if self.step is None else self.iterations * self.step


def entry(file: Path, *, timed: bool = False) -> Entry:
    """What a shipped recipe is. timed: measure a step, on random images where the data is the user's."""
    text = file.read_text(encoding="utf-8")
    recipe = layers.from_layers(layers.read_layer(file))
    if recipe.data.spec is None:
        task = _stand_in(recipe)
        resolved = recipe.resolved(train_size=None, validation=None, device="cpu")
    else:
        resolved, task = assemble.assemble(recipe)
    step = None
    if timed:
        step = statistics.median(step_seconds(task, resolved.train)[1:])
    assert task.data is not None
    (image,) = tensors_of(task.data.example(1)[0])
    return Entry(recipe, _about(text), text, tuple(image.shape[1:]), make_plan(resolved, task.model), step)


def _about(text: str) -> str:
    lines = text.splitlines()
    stop = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:stop])


def _stand_in(recipe: Recipe) -> Task:
    """The recipe's network, sized as the paper has it, with a batch or two of random images."""
    model, device = assemble.model_alone(recipe), devices.resolve_device(recipe.run.device)
    start = models.state_of(model)
    generator = torch.Generator().manual_seed(0)
    size = 2 * recipe.train.batch_size
    images = torch.rand((size, *nets.default_shape(recipe.model.spec)), generator=generator)
    split = Split(images, torch.arange(size) % 10).to(device)
    return Task(model.to(device), Data(split, split, split), device, fresh=lambda seed: start)
