"""How far arms that are trained in step have come; put into a snapshot, and taken up from one.

Knows what a training consists of between two iterations, and nothing of files.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ticketfind.engine import Lockstep


@dataclass(frozen=True)
class Point:
    """One evaluation."""

    iteration: int
    train_loss: float | None
    """Mean over the iterations since the last evaluation; None where there were none."""
    validation_loss: float
    validation_accuracy: float
    test_accuracy: float


@dataclass(frozen=True)
class Failed:
    """A training that was ended early: its numbers were no longer finite."""

    iteration: int
    reason: str
    left: int = 0
    """Iterations that it was to have and did not come to; of arms in step, those that none of them came to."""


@dataclass(frozen=True)
class Snapshot:
    """Arms under way, in step with one another, as they are between two iterations."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """What can be said in JSON."""


@dataclass(frozen=True)
class Drawn:
    """The state of every random generator that a training on a device draws from."""

    python: Any
    numpy: Any
    devices: Mapping[str, Tensor]
    """PyTorch's, by the kind of device."""

    @classmethod
    def so_far(cls, device: torch.device) -> "Drawn":
        """As they are now."""
        import numpy

        kind, keys, *rest = numpy.random.get_state()
        states = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        return cls(random.getstate(), [kind, numpy.asarray(keys).tolist(), *rest], states)

    @classmethod
    def of(cls, found: Snapshot, device: torch.device) -> "Drawn":
        """Those in a snapshot. Raises KeyError, TypeError or ValueError where one is missing."""
        version, state, gauss = found.facts["drawn"]["python"]
        kind, keys, place, *rest = found.facts["drawn"]["numpy"]
        states = {kind: found.tensors[f"drawn/{kind}"] for kind in {"cpu", device.type}}
        return cls((version, tuple(state), gauss), (kind, keys, place, *rest), states)

    def go_on(self, device: torch.device) -> None:
        """Draw from here. Raises TypeError, ValueError or RuntimeError for a state that is none."""
        import numpy

        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        torch.set_rng_state(self.devices["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(self.devices["cuda"], device)


@dataclass
class Course:
    """Arms in step, between two iterations, but for their weights. Lists have an entry for each arm."""

    at: int
    """Iterations done; the next one to do."""
    began: list[str]
    """Digests of what they began with."""
    points: list[list[Point]]
    losses: list[list[float]]
    """Of the iterations since the last evaluation."""
    failed: list[Failed | None]
    kept: list[dict[str, Tensor]] = field(default_factory=list)
    """Weights and buffers at the iteration that is kept; empty before it."""
    drawn: "Drawn | None" = None
    """The random generators as they were before the evaluation under way, which is done again; None outside of one."""

    @classmethod
    def new(cls, at: int, began: Sequence[str]) -> "Course":
        """Nothing done yet."""
        return cls(at, [*began], [[] for _ in began], [[] for _ in began], [None for _ in began])

    def is_measured(self, stop: int) -> bool:
        """Whether there was an evaluation at iteration `stop`, or a later one."""
        return any(points and points[-1].iteration >= stop for points in self.points)

    @property
    def is_over(self) -> bool:
        """Whether every arm has failed."""
        return all(self.failed)


def snapshot(course: Course, training: Lockstep, device: torch.device) -> Snapshot:
    """A copy, on the CPU, of everything that the rest of a training depends on."""
    drawn = course.drawn or Drawn.so_far(device)
    tensors = {f"training/{number}": _copied(tensor) for number, tensor in enumerate(training.everything())}
    for arm, state in enumerate(course.kept):
        tensors |= {f"kept/{arm}/{name}": _copied(value) for name, value in state.items()}
    tensors["losses"] = torch.tensor(course.losses, dtype=torch.float64)
    tensors |= {f"drawn/{kind}": state for kind, state in drawn.devices.items()}
    facts = {
        "at": course.at,
        "began": course.began,
        "points": [[asdict(point) for point in points] for points in course.points],
        "failed": [None if failed is None else asdict(failed) for failed in course.failed],
        "drawn": {"python": drawn.python, "numpy": drawn.numpy},
    }
    return Snapshot(tensors, facts)


def course_of(found: Snapshot, arms: int, first: int, total: int) -> Course:
    """The course in a snapshot of `arms` that are trained from iteration `first` to `total`.

    Raises KeyError, TypeError, ValueError or OverflowError for what is none.
    """
    facts = found.facts
    course = Course(
        at=int(facts["at"]),
        began=[str(digest) for digest in facts["began"]],
        points=[[_point(point) for point in points] for points in facts["points"]],
        losses=found.tensors["losses"].tolist(),
        failed=[None if f is None else Failed(int(f["iteration"]), str(f["reason"])) for f in facts["failed"]],
    )
    lists = (course.began, course.points, course.losses, course.failed)
    if any(len(each) != arms for each in lists) or found.tensors["losses"].ndim != 2 or not first <= course.at <= total:
        raise ValueError("it is of other trainings")
    kept: dict[int, dict[str, Tensor]] = {}
    for name, tensor in found.tensors.items():
        if name.startswith("kept/"):
            _, arm, key = name.split("/", 2)
            kept.setdefault(int(arm), {})[key] = tensor
    course.kept = [kept[arm] for arm in range(len(kept))]
    if len(kept) not in (0, arms):
        raise ValueError("it has kept weights of other trainings")
    return course


def _point(said: Mapping[str, Any]) -> Point:
    train_loss = None if said["train_loss"] is None else float(said["train_loss"])
    measured = (float(said[key]) for key in ("validation_loss", "validation_accuracy", "test_accuracy"))
    return Point(int(said["iteration"]), train_loss, *measured)


@torch.no_grad()
def take_up(found: Snapshot, training: Lockstep, device: torch.device) -> None:
    """Put a snapshot's tensors into a training that has just begun, and go on drawing where it was.

    Raises KeyError, TypeError, ValueError or RuntimeError for a snapshot of another training.
    """
    tensors, drawn = training.everything(), Drawn.of(found, device)
    kept = [found.tensors[f"training/{number}"] for number in range(len(tensors))]
    if [(t.shape, t.dtype) for t in kept] != [(t.shape, t.dtype) for t in tensors]:
        raise ValueError("it has other tensors than this training")
    drawn.go_on(device)
    for tensor, value in zip(tensors, kept, strict=True):
        tensor.copy_(value)


def _copied(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
