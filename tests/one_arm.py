"""One arm's training, step by step, and what tests train on."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ticketfind import engine
from ticketfind.batches import Batch, Examples, Feed
from ticketfind.engine import Lockstep
from ticketfind.lanes import Lane
from ticketfind.outputs import OutputFn
from ticketfind.recipe import Train

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.5},
    "sgd-momentum-decay": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
    "adam": {"optimizer": "adam", "lr": 1e-2},
    "adam-decay": {"optimizer": "adam", "lr": 1e-2, "weight_decay": 1e-2},
    "adamw": {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"schedule": "constant"},
    "warmup": {"schedule": "constant", "warmup": 5},
    "cosine": {"schedule": "cosine"},
    "warmup-cosine": {"schedule": "cosine", "warmup": 6},
    "step": {"schedule": "step", "milestones": [10, 21]},
    "warmup-step": {"schedule": "step", "warmup": 4, "milestones": [10, 21]},
}


class OneArm:
    """A lane, and what the engine does with it."""

    def __init__(
        self,
        model: nn.Module,
        start: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        how: Train,
        loss: OutputFn,
        seed: int = 0,
    ) -> None:
        self._lane, self._how = Lane(model, start, dict(masks), how, loss), how
        torch.manual_seed(seed)

    def advance(self, batches: Iterable[Batch], first: int) -> list[float]:
        """Train on `batches`, the first of which is iteration `first`; the losses."""
        batches = list(batches)
        (losses,) = Lockstep([self._lane], [Feed.of(batches)], self._how, first).advance(len(batches))
        return losses

    def measure(self, examples: Examples, functions: Sequence[OutputFn], batch_size: int) -> list[float]:
        """The mean of each function over all examples."""
        (means,) = Lockstep([self._lane], [], self._how).measure(examples, functions, batch_size).tolist()
        return list(means)

    def state(self) -> dict[str, Tensor]:
        """A copy of every parameter and buffer."""
        return self._lane.states()[0]


def random_batches(count: int, size: int = 16, shape: Sequence[int] = (12,)) -> list[tuple[Tensor, Tensor]]:
    """Noise in four classes."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, *shape, generator=generator), torch.randint(0, 4, (size,), generator=generator))
        for _ in range(count)
    ]


def random_masks(model: nn.Module, keep: float = 0.3, seed: int = 2) -> dict[str, Tensor]:
    """Of every trained tensor of two dimensions or more, about this share is kept."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1 and p.requires_grad}
    return {name: torch.rand(p.shape, generator=generator) < keep for name, p in weights.items()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def begin_as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[Lockstep]:
    """Have trainings begin as on a CUDA device, and do step by step what there would be replayed; those begun."""
    real, begun = engine.begin, []

    def begin(*args: Any, **settings: Any) -> Lockstep:
        begun.append(real(*args, **{**settings, "device": torch.device("cuda")}))
        return begun[-1]

    monkeypatch.setattr(engine, "begin", begin)
    return begun


def nothing(_: int) -> None:
    """A tick for nobody."""
