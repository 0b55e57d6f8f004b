"""What goes into a network and what comes out: calling it, its predictions, the default loss and metric.

Legend: b examples in a batch; targets [b], or [b, ...] where every place (pixel, token) has its own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ticketfind import TicketfindError

Inputs = Tensor | dict[str, Tensor]
"""[b, ...], or several such tensors by the names of the network's arguments."""
OutputFn = Callable[[Any, Tensor], Tensor]
"""(what the network returned, targets [b, ...]) -> mean over the batch, a scalar."""

IGNORED = -100
"""The label that neither loss nor metric counts, as in PyTorch's cross-entropy."""


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The network's output; a dict of inputs is passed by name."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def predictions(outputs: Any) -> Tensor:
    """The tensor of predictions in what a network returned.

    A tensor itself; `.logits` or the entry "logits" or "out"; the first of a tuple; the only tensor of a dict.
    Raises TicketfindError where there is none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(logits := getattr(outputs, "logits", None), Tensor):
        return logits
    if isinstance(outputs, Mapping):
        tensors = {key: value for key, value in outputs.items() if isinstance(value, Tensor)}
        for key in ("logits", "out", *(tensors if len(tensors) == 1 else ())):
            if key in tensors:
                return tensors[key]
        found = ", ".join(map(str, outputs)) or "none"
        raise TicketfindError(
            f"model: expected logits or out in the dict that it returns, found {found};"
            " give --loss and --metric, which are called with the whole output"
        )
    if isinstance(outputs, (tuple, list)) and outputs:
        if outputs[0] is None or (isinstance(outputs[0], Tensor) and not outputs[0].ndim):
            raise TicketfindError(
                f"model: expected predictions first in the {type(outputs).__name__} that it returns, found"
                f" {'nothing' if outputs[0] is None else 'a single number'}; give --loss and --metric, which are called"
                " with the whole output"
            )
        return predictions(outputs[0])
    raise TicketfindError(
        f"model: expected a tensor, a tuple or dict of them, or an object with .logits as its output,"
        f" found {type(outputs).__name__}; give --loss and --metric, which are called with the output as it is"
    )


def tensors_in(outputs: Any) -> Iterator[Tensor]:
    """Every tensor in what a network returns, not its predictions alone."""
    if isinstance(outputs, Tensor):
        yield outputs
        return
    if is_dataclass(outputs) or isinstance(getattr(outputs, "logits", None), Tensor):
        outputs = outputs if isinstance(outputs, Mapping) else vars(outputs)
    parts = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, (tuple, list)) else ()
    for part in parts:
        yield from tensors_in(part)


def own_loss(outputs: Any) -> Tensor | None:
    """The loss that a network returned along with its predictions, if it did."""
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return found if isinstance(found, Tensor) else None


def cross_entropy(outputs: Any, targets: Tensor, class_axis: int | None = None) -> Tensor:
    """The network's own loss where it returned one, else the mean cross-entropy of its predictions.

    Predictions [b, classes] with targets [b]; [b, classes, ...] (class_axis 1) or [b, ..., classes] (-1) with targets
    [b, ...]. class_axis: None for what `find_class_axis` says.
    """
    own = own_loss(outputs)
    if own is not None:
        return own
    scores = predictions(outputs)
    if targets.ndim == 1:
        return F.cross_entropy(scores, targets)
    axis = find_class_axis(outputs, targets) if class_axis is None else class_axis
    flat, labels = scores.movedim(axis, -1).flatten(0, -2), targets.flatten()
    counted = (labels != IGNORED).sum().clamp(min=1)  # a batch may hold nothing that counts
    return F.cross_entropy(flat, labels, ignore_index=IGNORED, reduction="sum") / counted


def accuracy(outputs: Any, targets: Tensor, class_axis: int | None = None) -> Tensor:
    """Share of the targets (but those that are IGNORED) that have the highest prediction; shapes as above."""
    axis = find_class_axis(outputs, targets) if class_axis is None else class_axis
    right = predictions(outputs).argmax(axis) == targets
    return right.double().sum() / (targets != IGNORED).sum().clamp(min=1)


def find_class_axis(outputs: Any, targets: Tensor) -> int:
    """Which axis of the predictions the classes are on: 1, as in PyTorch's losses, or the last, -1.

    Where shapes allow both, `.logits` and an entry "logits" have them last. Raises TicketfindError where shapes do not
    go together, or do not tell.
    """
    scores = predictions(outputs)
    fits = scores.ndim == targets.ndim + 1 and scores.shape[:1] == targets.shape[:1]
    first, last = fits and scores.shape[2:] == targets.shape[1:], fits and scores.shape[:-1] == targets.shape
    if first and last and scores.ndim > 2 and not _has_logits(outputs):
        raise TicketfindError(
            f"model: outputs of shape {list(scores.shape)} for targets of shape {list(targets.shape)} do not tell which"
            " axis the classes are on; give --loss and --metric, or return an object with .logits (classes last)"
        )
    if not first and not last:
        raise TicketfindError(
            f"model: expected a prediction for each class and target, found outputs of shape {list(scores.shape)} for"
            f" targets of shape {list(targets.shape)}; give --loss and --metric"
        )
    return -1 if last and (not first or scores.ndim > 2) else 1


def _has_logits(outputs: Any) -> bool:
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return isinstance(named, Tensor)


def counted(targets: Tensor) -> Tensor | int:
    """How many targets a mean over a batch counts: labels other than IGNORED, else examples."""
    return len(targets) if targets.is_floating_point() else (targets != IGNORED).sum()
