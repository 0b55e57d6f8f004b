"""Whether what comes out of a pruned network still depends on what goes in."""

import copy

import torch
from torch import Tensor

from ticketfind import TicketfindError, lanes
from ticketfind.arms import State, Task
from ticketfind.masks import Masks
from ticketfind.outputs import call, predictions


@torch.no_grad()
def is_disconnected(task: Task, start: State, masks: Masks) -> bool:
    """True if no input can change the masked network's output, whatever its remaining weights.

    A layer may start at zero, so equal outputs under `start` do not say it. Then positive weights, which no rectifier
    cuts off, are tried in their place, and believed where the whole network with such weights does tell inputs apart.
    Without data, with a single test example or without predictions in the output, it cannot be told: False.
    """
    if task.data is None or len(task.data.test) < 2:
        return False
    model = copy.deepcopy(task.model).eval()
    inputs, _ = task.data.example(64)

    def tells_apart(state: State, under: Masks) -> bool:
        lanes.put(model, state, under)
        outputs = predictions(call(model, inputs))
        return not bool((outputs == outputs[:1]).all())

    try:
        predictions(call(model, inputs))
    except TicketfindError:  # an output for a loss of the user's own
        return False

    if tells_apart(start, masks):
        return False
    generator = torch.Generator().manual_seed(0)
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    positive = {name: _positive(value, generator) if name in trained else value for name, value in start.items()}
    return tells_apart(positive, {}) and not tells_apart(positive, masks)


def _positive(value: Tensor, generator: torch.Generator) -> Tensor:
    """Positive weights in place of `value`, so large that a unit's output is about the mean of its inputs.

    Larger ones would overflow in a deep network, or saturate; both would hide what the input says.
    """
    inputs = value[0].numel() if value.ndim > 1 and len(value) else 1
    return ((0.5 + torch.rand(value.shape, generator=generator)) / max(1, inputs)).to(value)
