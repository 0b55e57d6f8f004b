"""Training loops that are not ticketfind's: a function of the user's trains one arm, and what came of it is checked.

It is a `arms.Trainer`, as a command is (`commands`), so that searches and evaluations use it as they use
ticketfind's own training.
"""

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ticketfind import TicketfindError, lanes, masks
from ticketfind.arms import Arm, Outcome, State, Task, Trainer, Work
from ticketfind.batches import derived_seed, seeded
from ticketfind.results import Measured
from ticketfind.ticket import hold

METRICS = ("accuracy", "accuracy_early", "early_stop", "validation_loss", "test_size")
"""What a training of one's own tells; all but the first may be left out (docs/guide.md)."""
_COUNTS = {"early_stop": 0, "test_size": 1}
"""Those that are whole numbers, and the least that they can be."""


def checked_outcome(metrics: Any, arm: Arm, final: State, kept: State | None, steps: int) -> Outcome:
    """What was trained, checked. steps: iterations, for an early stop that the metrics do not tell."""
    numbers = _numbers(metrics, arm)
    for name, weight in (*final.items(), *(kept or {}).items()):
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise TicketfindError(f"{arm.name}: {name} is not finite after the training; try a lower learning rate")
    revived = masks.nonzero_outside(arm.masks, final)
    if revived:
        raise TicketfindError(
            f"{arm.name}: expected pruned weights to be zero after the training, found others in"
            f" {', '.join(revived[:3])}; call hold(optimizer) before training (in a program: ticketfind.hold)"
        )
    measured = Measured(
        early_stop=int(numbers.get("early_stop", steps)),
        accuracy_early=numbers.get("accuracy_early", numbers["accuracy"]),
        accuracy_end=numbers["accuracy"],
        validation_loss=numbers.get("validation_loss"),
    )
    size = numbers.get("test_size")
    return Outcome(None, (), final, kept, measured, None if size is None else int(size))


def _numbers(metrics: Any, arm: Arm) -> dict[str, float]:
    """The metrics that were told. Raises TicketfindError for what is no metric."""
    if not isinstance(metrics, Mapping) or metrics.get("accuracy") is None:
        names = ", ".join(map(str, metrics)) or "nothing" if isinstance(metrics, Mapping) else repr(metrics)[:80]
        raise TicketfindError(f"{arm.name}: metrics: expected a dict with accuracy (of the test set), found {names}")
    numbers = {}
    for key in METRICS:
        value = metrics.get(key)
        if value is None:
            continue
        with suppress(AttributeError, TypeError, ValueError, RuntimeError):  # a tensor or array that holds one number
            value = value.item()
        number = math.nan
        if isinstance(value, Real) and not isinstance(value, bool):
            with suppress(OverflowError):
                number = float(value)
        least = _COUNTS.get(key)
        if not math.isfinite(number) or (least is not None and (number < least or not number.is_integer())):
            kind = "a finite number" if least is None else f"a whole number from {least}"
            raise TicketfindError(f"{arm.name}: metrics: {key}: expected {kind}, found {repr(value)[:80]}")
        numbers[key] = number
    return numbers


def fitting(found: Mapping[str, Tensor], arm: Arm, what: str) -> State:
    """The entries of `found` for those that the arm started with, in their types; more are passed over.

    Raises TicketfindError, `what` before it, that names those that are missing or have another shape.
    """
    faults = [f"{name} (none)" for name in arm.start if name not in found]
    faults += [
        f"{name} {tuple(found[name].shape)} in place of {tuple(start.shape)}"
        for name, start in arm.start.items()
        if name in found and found[name].shape != start.shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise TicketfindError(
            f"{arm.name}: {what}: expected the names and shapes that the training started with,"
            f" found {', '.join(faults[:5])}{more}"
        )
    return {name: found[name].to(start.dtype) for name, start in arm.start.items()}


# ------------------------------------------------------------------------------------------- a function


class Hold:
    """What a trainer calls with its optimizer: ``hold(optimizer)`` keeps pruned weights at exactly zero.

    It counts the optimizer's steps, which are the iterations, and notes the weights of the one to rewind to. Of several
    optimizers the one that is furthest counts; one that is held later goes on from there.
    """

    def __init__(self, model: nn.Module, arm: Arm, work: Work) -> None:
        self.steps = arm.first
        self.kept = _state(model) if work.keep_at == arm.first else None
        self._model, self._arm, self._work = model, arm, work
        self._held: list[Optimizer] = []
        self._to_tell = max(1, int(work.how.iterations) - arm.first)

    def __call__(self, optimizer: Optimizer) -> None:
        """Hold the weights that `optimizer` trains."""
        if not isinstance(optimizer, Optimizer):
            raise TicketfindError(
                f"{self._arm.name}: hold: expected a torch.optim.Optimizer, found {type(optimizer).__name__}"
            )
        own = {id(parameter) for parameter in self._model.parameters()}
        if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise TicketfindError(
                f"{self._arm.name}: hold: expected an optimizer of the model's parameters, found none of them in it;"
                " train the model that the function was given, in place"
            )
        if any(optimizer is other for other in self._held):
            return
        self._held.append(optimizer)
        hold(self._model, optimizer, self._arm.masks)
        steps = self.steps

        def count(*_: Any) -> None:
            nonlocal steps
            steps += 1
            if steps > self.steps:
                self.steps = steps
                self._tell(1)
            if steps == self.steps == self._work.keep_at:
                self.kept = _state(self._model)

        optimizer.register_step_post_hook(count)

    def finish(self) -> None:
        """The function is done. Raises TicketfindError where it has not trained as it was to."""
        at = self._work.keep_at
        if not self._held:
            raise TicketfindError(
                f"{self._arm.name}: expected the trainer to call hold(optimizer) before it trains, found no call"
            )
        if self.steps == self._arm.first:
            raise TicketfindError(f"{self._arm.name}: expected steps of the optimizer that is held, found none")
        if at is not None and self.kept is None:
            raise TicketfindError(
                f"{self._arm.name}: prune.rewind: expected {at} optimizer steps under hold(optimizer),"
                f" found {self.steps}"
            )
        self._tell(self._to_tell)

    def _tell(self, iterations: int) -> None:
        """Of no more than the training was announced to have."""
        iterations = min(iterations, self._to_tell)
        self._to_tell -= iterations
        self._work.tick(iterations)


def _state(model: nn.Module) -> State:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def by_function(function: Callable[..., Any]) -> Trainer:
    """A trainer out of ``fn(model, hold, arm) -> metrics``.

    model: in place, under its mask, on the device; trained in place. hold: see `Hold`. arm: see `arms.Arm` (seed,
    round, replicate, first iteration). metrics: a dict, see METRICS. What the function draws from torch's, numpy's and
    Python's generators, on the processor and on the device, follows from the arm's seed.
    """

    def train(task: Task, arm: Arm, work: Work) -> Outcome:
        model = copy.deepcopy(task.model)
        lanes.put(model, arm.start, arm.masks)
        model.train()
        with seeded(derived_seed(arm.seed, "draws"), task.device), torch.enable_grad():
            held = Hold(model, arm, work)
            try:
                metrics = function(model, held, arm)
            except SystemExit as error:
                raise TicketfindError(f"{arm.name}: the trainer ended the program: sys.exit({error.code!r})") from error
        held.finish()

        def weights(state: State) -> State:
            return {name: value.to(task.device) for name, value in fitting(state, arm, "the trained model").items()}

        kept = None if held.kept is None else weights(held.kept)
        return checked_outcome(metrics, arm, weights(_state(model)), kept, held.steps)

    return train
