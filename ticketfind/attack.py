"""Accuracy under attack: test inputs changed a little, so that a trained network takes them for something else."""

import copy
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ticketfind import TicketfindError
from ticketfind.arms import State, Task
from ticketfind.batches import Order
from ticketfind.outputs import predictions
from ticketfind.results import Spread
from ticketfind.verdict import Comparison

CLEAN = "clean"
"""What accuracy without an attack, on the same examples, is called."""
STEPS = 40
STEP = 0.1
"""Of pgd: iterations, and the size of one as a share of epsilon."""
_BATCH = 250


@dataclass(frozen=True)
class Attack:
    """A way to change an input by at most epsilon in each of its numbers (the L-infinity norm)."""

    kind: str
    """fgsm: one step of epsilon along the sign of the loss's gradient (Goodfellow et al., arXiv 1412.6572). pgd: STEPS
    such steps of STEP * epsilon, each followed by a projection to what epsilon allows (Madry et al., arXiv 1706.06083);
    from the input itself and not from a random point near it, so that nothing is drawn."""
    epsilon: float
    """In units of the network's inputs."""

    def __str__(self) -> str:
        return f"{self.kind}:{self.epsilon:g}"


@dataclass(frozen=True)
class Attacked:
    """Accuracies under one attack, of the arms of an evaluation."""

    arms: dict[str, Spread]
    """By arm; over replicates."""
    comparisons: tuple[Comparison, ...]
    """Of the ticket with every other arm."""

    @classmethod
    def of(cls, found: Mapping[str, Mapping[int, Sequence[float]]], examples: int) -> "Attacked":
        """From arm -> replicate -> accuracies of its trials, which are averaged. examples: how many were attacked."""
        arms = {
            arm: Spread.of(statistics.fmean(trials) for _, trials in sorted(by_replicate.items()))
            for arm, by_replicate in found.items()
        }
        others = [arm for arm in arms if arm != "ticket"]
        return cls(arms, tuple(Comparison.of(arms, "ticket", other, least=1 / examples) for other in others))


class _Scores(nn.Module):
    """A network as attacks take one: inputs [b, ...] -> scores [b, classes]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor) -> Tensor:
        return predictions(self.net(inputs)).float()


def prepare(task: Task, attacks: Sequence[Attack], most: int) -> Callable[[State], dict[str, float]]:
    """A function from trained weights to accuracies (fractions): CLEAN, and under each attack by its name.

    All are measured on the same test examples: `most` of them, drawn once for all networks, or all if there are fewer.
    Attacked inputs stay within the range of these examples' inputs. Raises TicketfindError where the library that
    attacks is not installed, and where these are no inputs and labels that it could attack.
    """
    _check_library()
    inputs, targets = _examples(task, most)
    net = copy.deepcopy(task.model)
    scores = _Scores(net).eval()
    victim = _victim(scores, inputs)
    x, y = inputs.cpu().numpy(), targets.cpu().numpy()

    def accuracy(given: Tensor) -> float:
        parts = zip(torch.split(given, _BATCH), torch.split(targets, _BATCH), strict=True)
        with torch.no_grad():
            return sum(int((scores(part).argmax(1) == label).sum()) for part, label in parts) / len(targets)

    def attacked(attack: Attack) -> Tensor:
        if not attack.epsilon:  # nothing is allowed, which the library refuses
            return inputs
        return torch.from_numpy(_method(attack, victim).generate(x, y)).to(inputs.device)

    def accuracies(trained: State) -> dict[str, float]:
        net.load_state_dict(trained, strict=False)
        return {CLEAN: accuracy(inputs), **{str(attack): accuracy(attacked(attack)) for attack in attacks}}

    return accuracies


def _check_library() -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import art.attacks.evasion
            import art.estimators.classification  # noqa: F401
    except ImportError:
        raise TicketfindError(
            "attack: the Adversarial Robustness Toolbox attacks and is not installed; pip install 'ticketfind[attack]'"
        ) from None


def _victim(scores: nn.Module, inputs: Tensor) -> Any:
    """The network as the library takes it. Raises TicketfindError unless it gives a score for each class."""
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        shape = tuple(scores(inputs[:2]).shape)
    if len(shape) != 2:
        raise TicketfindError(f"attack: expected a score for each class ([b, classes]), found outputs of {list(shape)}")
    return PyTorchClassifier(
        scores,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(inputs.shape[1:]),
        nb_classes=shape[1],
        clip_values=(float(inputs.min()), float(inputs.max())),
        device_type="gpu" if inputs.device.type == "cuda" else "cpu",
    )


def _method(attack: Attack, victim: Any) -> Any:
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch

    common = {"eps": attack.epsilon, "batch_size": _BATCH}
    if attack.kind == "fgsm":
        return FastGradientMethod(victim, **common)
    step = STEP * attack.epsilon
    return ProjectedGradientDescentPyTorch(victim, **common, eps_step=step, max_iter=STEPS, verbose=False)


def _examples(task: Task, most: int) -> tuple[Tensor, Tensor]:
    """Test examples, the same for all networks: float32 [n, ...] and labels [n]."""
    if task.data is None:
        raise TicketfindError("attack: expected test data, found none; the program that trains has them")
    count = min(most, len(task.data.test))
    inputs, targets = next(iter(task.data.test.batches(Order(seed=0, batch_size=count, first=0, stop=1))))
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        found = f"{inputs.dtype}" if isinstance(inputs, Tensor) else "several by name"
        raise TicketfindError(f"attack: expected inputs that are one tensor of real numbers, found {found}")
    if targets.is_floating_point() or targets.ndim != 1 or int(targets.min()) < 0:
        raise TicketfindError(
            f"attack: expected one class label for each example, found {targets.dtype} of shape {list(targets.shape)}"
        )
    return inputs.to(task.device, torch.float32), targets.to(task.device)
