"""What goes into a network and what comes out: calling it, its predictions, the default loss and metric.

Legend: b examples in a batch; targets [b], or [b, ...] where every place (pixel, token) has its own.
"""

from collections.abc import Callable, Mapping
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
        return predictions(outputs[0])
    raise TicketfindError(
        f"model: expected a tensor, a tuple or dict of them, or an object with .logits as its output,"
        f" found {type(outputs).__name__}; give --loss and --metric, which are called with the output as it is"
    )


def own_loss(outputs: Any) -> Tensor | None:
    """The loss that a network returned along with its predictions, if it did."""
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return found if isinstance(found, Tensor) else None


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """The network's own loss where it returned one, else the mean cross-entropy of its predictions.

    Predictions [b, classes] with targets [b]; [b, classes, ...] or [b, ..., classes] with targets [b, ...].
    """
    own = own_loss(outputs)
    if own is not None:
        return own
    scores = predictions(outputs)
    if targets.ndim == 1:
        return F.cross_entropy(scores, targets)
    flat, labels = classes_last(scores, targets).flatten(0, -2), targets.flatten()
    counted = (labels != IGNORED).sum().clamp(min=1)  # a batch may hold nothing that counts
    return F.cross_entropy(flat, labels, ignore_index=IGNORED, reduction="sum") / counted


def accuracy(outputs: Any, targets: Tensor) -> Tensor:
    """Share of the targets (but those that are IGNORED) that have the highest prediction; shapes as above."""
    right = classes_last(predictions(outputs), targets).argmax(-1) == targets
    return right.double().sum() / (targets != IGNORED).sum().clamp(min=1)


def classes_last(scores: Tensor, targets: Tensor) -> Tensor:
    """Predictions as [b, ..., classes]; the classes are axis 1, as in PyTorch's losses, wherever shapes allow that.

    Raises TicketfindError where the shapes do not go together.
    """
    if scores.ndim == targets.ndim + 1 and scores.shape[:1] == targets.shape[:1]:
        if scores.shape[2:] == targets.shape[1:]:
            return scores.movedim(1, -1)
        if scores.shape[:-1] == targets.shape:
            return scores
    raise TicketfindError(
        f"model: expected a prediction for each class and target, found outputs of shape {tuple(scores.shape)} for"
        f" targets of shape {tuple(targets.shape)}; give --loss and --metric"
    )


def counted(targets: Tensor) -> Tensor | int:
    """How many targets a mean over a batch counts: labels other than IGNORED, else examples."""
    return len(targets) if targets.is_floating_point() else (targets != IGNORED).sum()
