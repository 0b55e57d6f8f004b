"""Accuracy under attack: test inputs changed a little, so that a trained network takes them for something else."""

import copy
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ticketfind import TicketfindError
from ticketfind.arms import Note, State, Task
from ticketfind.batches import Order, chunk_size
from ticketfind.examples import TARGET_KEYS
from ticketfind.forks import Tick
from ticketfind.outputs import call, predictions
from ticketfind.results import Spread
from ticketfind.specs import one_line
from ticketfind.verdict import Comparison

CLEAN = "clean"
"""What accuracy without an attack, on the same examples, is called."""
STEPS = 40
STEP = 0.1
"""Of pgd: iterations, and the size of one as a share of epsilon."""
_BATCH = 250
"""Examples that are attacked at once, at most."""
_CHANNELS = 4
"""Up to which the second axis of four is taken for an image's channels."""


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


@dataclass(frozen=True)
class Prepared:
    """Attacks made ready."""

    examples: int
    """Test examples that are attacked, the same for all networks."""
    inputs: tuple[float, float]
    """The lowest and the highest of their inputs: epsilon is in these units."""
    iterations: int
    """What to attack one network takes, counted as iterations of a training with as many examples."""
    measure: Callable[[State], dict[str, float]]
    """From trained weights to accuracies (fractions) on these examples: CLEAN, and under each attack by its name."""


class _Scores(nn.Module):
    """A network as attacks take one: inputs [b, ...] -> scores [b, classes]."""

    def __init__(self, net: nn.Module, name: str | None, tick: Tick) -> None:
        """name: of the argument that the inputs are passed by. tick: as `prepare` has it."""
        super().__init__()
        self.net, self.name, self.tick = net, name, tick
        self.is_recurrent = any(isinstance(module, nn.RNNBase) for module in net.modules())

    def forward(self, inputs: Tensor) -> Tensor:
        self.tick(0)
        # cuDNN's recurrent layers have gradients in training mode only
        with torch.backends.cudnn.flags(enabled=False) if self.is_recurrent else nullcontext():
            return predictions(call(self.net, inputs if self.name is None else {self.name: inputs})).float()


def prepare(
    task: Task,
    attacks: Sequence[Attack],
    most: int,
    *,
    batch_size: int = _BATCH,
    note: Note = lambda text: None,
    tick: Tick = lambda n: None,
) -> Prepared:
    """Attacks of networks, all on the same test examples: `most` of them, drawn once, or all if there are fewer.

    Attacked inputs stay within the range of these examples' inputs, which `note` is told. batch_size: of the training,
    which has fitted into memory. tick: told of iterations done, and at every call of a network; may raise, to end it
    all. Raises TicketfindError where the library that attacks is not installed, and where
    these are no inputs, labels and network that it could attack.
    """
    _check_library()
    name, inputs, targets = _examples(task, most)
    net = copy.deepcopy(task.model).requires_grad_(False)
    scores = _Scores(net, name, tick).eval()
    x, y = inputs.cpu().numpy(), targets.cpu().numpy()
    size = min(_BATCH, chunk_size(batch_size, inputs))
    with _in_one_line():  # before anything is trained, and with few examples
        victim = _victim(scores, inputs, targets)
        _method(Attack("fgsm", 1.0), victim, size).generate(x[:2], y[:2])
    low, high = float(x.min()), float(x.max())
    note(f"attacked are {len(y)} test examples, inputs from {low:.4g} to {high:.4g}; epsilon is in these units")

    def accuracy(given: Tensor) -> float:
        parts = zip(torch.split(given, size), torch.split(targets, size), strict=True)
        with torch.no_grad():
            return sum(int((scores(part).argmax(1) == label).sum()) for part, label in parts) / len(targets)

    def attacked(attack: Attack) -> Tensor:
        if not attack.epsilon:  # nothing is allowed, which the library refuses
            return inputs
        found, method = [], _method(attack, victim, size)
        for first in range(0, len(y), size):
            part = slice(first, first + size)
            found.append(torch.from_numpy(method.generate(x[part], y[part])))
            scores.tick(_iterations(attack, len(found[-1]), batch_size))
        return torch.cat(found).to(inputs.device)

    def measure(trained: State) -> dict[str, float]:
        net.load_state_dict(trained, strict=False)
        with _in_one_line():
            return {CLEAN: accuracy(inputs), **{str(attack): accuracy(attacked(attack)) for attack in attacks}}

    parts = [min(size, len(y) - first) for first in range(0, len(y), size)]
    iterations = sum(_iterations(attack, part, batch_size) for attack in attacks for part in parts if attack.epsilon)
    return Prepared(len(y), (low, high), iterations, measure)


def _iterations(attack: Attack, examples: int, batch_size: int) -> int:
    return (STEPS if attack.kind == "pgd" else 1) * math.ceil(examples / batch_size)


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Whatever goes wrong inside is told in one line."""
    try:
        yield
    except TicketfindError:
        raise
    except Exception as error:
        raise TicketfindError(f"attack: the network cannot be attacked: {one_line(error)}") from error


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


def _victim(scores: nn.Module, inputs: Tensor, targets: Tensor) -> Any:
    """The network as the library takes it. Raises TicketfindError unless it gives a score for each class."""
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        shape = tuple(scores(inputs[:2]).shape)
    classes = max(2, int(targets.max()) + 1)
    if len(shape) != 2 or shape[1] < classes:
        raise TicketfindError(
            f"attack: expected a score for each of {classes} classes ([b, classes]), found outputs of {list(shape)}"
        )
    victim = PyTorchClassifier(
        scores,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(inputs.shape[1:]),
        nb_classes=shape[1],
        clip_values=_range(inputs),
        device_type="gpu" if inputs.device.type == "cuda" else "cpu",
    )
    victim.is_rnn = False  # or a recurrent network is attacked, and then left, in training mode: dropout between layers
    return victim


def _range(inputs: Tensor) -> tuple[Any, Any]:
    """The lowest and the highest input, of images channel by channel (normalized, each has its own): NumPy arrays."""
    is_image = inputs.ndim == 4 and inputs.shape[1] <= _CHANNELS
    over = (0, 2, 3) if is_image else tuple(range(inputs.ndim))
    low, high = inputs.amin(over, keepdim=True)[0], inputs.amax(over, keepdim=True)[0]
    high = torch.maximum(high, low.nextafter(low + 1))  # the library refuses a range of a single number
    return low.cpu().numpy(), high.cpu().numpy()


def _method(attack: Attack, victim: Any, batch_size: int) -> Any:
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch

    common = {"eps": attack.epsilon, "batch_size": batch_size}
    if attack.kind == "fgsm":
        return FastGradientMethod(victim, **common)
    step = STEP * attack.epsilon
    return ProjectedGradientDescentPyTorch(victim, **common, eps_step=step, max_iter=STEPS, verbose=False)


def _examples(task: Task, most: int) -> tuple[str | None, Tensor, Tensor]:
    """Test examples, the same for all networks: the inputs' name where they have one, float32 [n, ...], labels [n]."""
    if task.data is None:
        raise TicketfindError("attack: expected test data, found none; the program that trains has them")
    count = min(most, len(task.data.test))
    given, targets = next(iter(task.data.test.batches(Order(seed=0, batch_size=count, first=0, stop=1))))
    named = {} if isinstance(given, Tensor) else {key: given[key] for key in given if key not in TARGET_KEYS}
    name, inputs = next(iter(named.items())) if len(named) == 1 else (None, given)
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        found = f"{inputs.dtype}" if isinstance(inputs, Tensor) else f"{', '.join(inputs)} by name"
        raise TicketfindError(f"attack: expected inputs that are one tensor of real numbers, found {found}")
    if targets.is_floating_point() or targets.ndim != 1 or int(targets.min()) < 0:
        lowest = "" if targets.is_floating_point() else f", {int(targets.min())} the lowest"
        raise TicketfindError(
            "attack: expected one class label for each example,"
            f" found {targets.dtype} of shape {list(targets.shape)}{lowest}"
        )
    return name, inputs.to(task.device, torch.float32), targets.to(task.device)
