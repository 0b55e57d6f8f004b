"""One training step of an arm, or of several arms stacked into one: losses, gradients, update, masks.

Legend: r arms in a lane; b examples in an arm's batch. Knows tensors, whatever device they are on.
"""

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ticketfind.batches import Batch, map_inputs
from ticketfind.masks import Masks, masked
from ticketfind.outputs import Inputs, OutputFn, call
from ticketfind.prunable import aliases
from ticketfind.recipe import Train
from ticketfind.updates import Update

T = TypeVar("T")
State = Mapping[str, Tensor]
"""Every parameter and buffer by its state-dict key."""
Loss = Callable[[State, Inputs, Tensor], Tensor]
"""(parameters and buffers, inputs, targets) -> mean loss of a batch, a scalar."""
Context = Callable[[], AbstractContextManager[object]]
"""What networks are called in: nothing special, or a precision."""


@dataclass(frozen=True)
class Extra:
    """What a training does beside training, for the mask that is drawn from it."""

    paths: bool = False
    """Sum up how far each weight goes, from step to step."""
    tightens: bool = False
    """Its masks may lose weights on the way."""


NO_EXTRA = Extra()


def learning_rate(how: Train, iteration: int) -> float:
    """The learning rate of an iteration (from 0): linear warmup, then the schedule."""
    warmup, total = int(how.warmup), int(how.iterations)
    if iteration < warmup:
        return how.lr * (iteration + 1) / warmup
    if how.schedule == "cosine":
        return how.lr * 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / max(1, total - warmup)))
    return float(how.lr * 0.1 ** sum(iteration >= int(milestone) for milestone in how.milestones))


@torch.no_grad()
def put(model: nn.Module, start: State, masks: Masks) -> None:
    """Put `start` under `masks` into `model`; of tied parameters the one that has the mask counts."""
    state, tied = model.state_dict(), aliases(model)
    for name, value in masked(start, masks).items():
        if name not in tied:
            state[name].copy_(value)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a network by its name, tied ones once."""
    return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}


def replaced_buffers(model: nn.Module, inputs: Inputs) -> list[str]:
    """Names of the buffers that the network replaces when it is called, rather than change them in place."""
    model = copy.deepcopy(model).train()
    before = dict(model.named_buffers())
    with torch.no_grad():
        call(model, inputs)
    after = dict(model.named_buffers())
    return [name for name in before if after.get(name) is not before[name]]


def functional(model: nn.Module, loss: OutputFn) -> Loss:
    """`loss` of `model` as a function of its parameters and buffers; what it does to its buffers stays done."""

    def compute(state: State, inputs: Inputs, targets: Tensor) -> Tensor:
        return loss(_called(model, state, inputs), targets)

    return compute


def _called(model: nn.Module, state: State, inputs: Inputs) -> Any:
    args, named = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    return functional_call(model, dict(state), args, named)


class Member(Protocol):
    """What trains one arm, or several as one. Pruned weights are exactly zero at all times."""

    arms: int

    def step(self, batch: Batch, lr: float | Tensor) -> Tensor:
        """One iteration, of a batch with r * b examples, those of the first arm first; the r losses."""

    def ready(self, to_train: bool) -> None:
        """Before steps, or before calling `networks`."""

    def networks(self) -> list[Callable[[Inputs], Any]]:
        """Each arm's network as a function of its inputs."""

    def states(self) -> list[dict[str, Tensor]]:
        """A copy of every parameter and buffer of each arm."""

    def everything(self) -> list[Tensor]:
        """Every tensor that a step changes: weights, buffers, and the optimizer's own."""

    def paths(self) -> list[dict[str, Tensor]]:
        """Of each arm, by trained parameter: the sum of |w_t - w_(t-1)| so far; copies."""

    def tighten(self, masks: Sequence[Masks]) -> None:
        """Go on under masks that keep less, one for each arm: what is pruned has no moments; paths begin anew."""


class Lane:
    """One arm's training under way."""

    arms = 1

    def __init__(
        self,
        model: nn.Module,
        start: State,
        masks: Masks,
        how: Train,
        loss: OutputFn,
        *,
        compiled: Loss | None = None,
        context: Context = nullcontext,
        channels_last: bool = False,
        extra: Extra = NO_EXTRA,
    ) -> None:
        """Put `start` under `masks` into `model`, which the lane owns from here on; fresh optimizer state.

        compiled: computes the loss of a network such as `model`, in place of calling it.
        """
        self._model, self._loss, self._compiled, self._context = model, loss, compiled, context
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            model.to(memory_format=torch.channels_last)
        put(model, start, masks)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._tensors, self._trained = {**tensors(model), **named}, [*named]
        pruning = [_pruning(name, masks, whole=extra.tightens) for name in named]
        self._update = Update([*named.values()], pruning, how, arms=None, paths=extra.paths)

    def step(self, batch: Batch, lr: float | Tensor) -> Tensor:
        inputs, targets = self._laid_out(batch[0]), batch[1]
        with self._context():
            if self._compiled is None:
                loss = self._loss(call(self._model, inputs), targets)
            else:
                loss = self._compiled(self._tensors, inputs, targets)
        self._update(loss, lr)
        return loss.detach().view(1)

    def ready(self, to_train: bool) -> None:
        self._model.train(to_train)

    def networks(self) -> list[Callable[[Inputs], Any]]:
        return [lambda inputs: call(self._model, self._laid_out(inputs))]

    def states(self) -> list[dict[str, Tensor]]:
        return [_state(self._model)]

    def everything(self) -> list[Tensor]:
        return [*tensors(self._model).values(), *self._update.everything()]

    def paths(self) -> list[dict[str, Tensor]]:
        return [{name: path.clone() for name, path in zip(self._trained, self._update.paths, strict=True)}]

    def tighten(self, masks: Sequence[Masks]) -> None:
        self._update.tighten([masks[0].get(name) for name in self._trained])

    def _laid_out(self, inputs: Inputs) -> Inputs:
        if self._format is torch.contiguous_format:
            return inputs
        return map_inputs(lambda t: t.contiguous(memory_format=self._format) if t.ndim == 4 else t, inputs)


class Stack:
    """Several arms' trainings as one: each parameter and buffer has a leading axis r, and vmap runs the network.

    The arms' numbers do not mix, and are those of lanes of their own but for rounding. What the network draws at
    random (dropout) is drawn for each arm, but not what a lane of its own would draw.
    """

    def __init__(
        self,
        model: nn.Module,
        starts: Sequence[tuple[State, Masks]],
        how: Train,
        loss: OutputFn,
        *,
        context: Context = nullcontext,
        extra: Extra = NO_EXTRA,
    ) -> None:
        """`model` is the stack's own from here on, for its architecture."""
        self._model, self._context, self.arms = model, context, len(starts)
        parts = []
        for start, masks in starts:
            put(model, start, masks)
            parts.append({name: t.clone() for name, t in tensors(model).items()})
        self._tensors = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        trained = self._trained = [name for name, p in model.named_parameters() if p.requires_grad]
        leaves = [self._tensors[name].requires_grad_() for name in trained]
        pruned = [_stacked_pruning(name, [masks for _, masks in starts], whole=extra.tightens) for name in trained]
        self._update = Update(leaves, pruned, how, arms=self.arms, paths=extra.paths)
        self._losses = vmap(functional(model, loss), randomness="different")

    def step(self, batch: Batch, lr: float | Tensor) -> Tensor:
        each = map_inputs(self._by_arm, batch[0])
        with self._context():
            losses: Tensor = self._losses(self._tensors, each, self._by_arm(batch[1]))
        self._update(losses.sum(), lr)
        return losses.detach()

    def _by_arm(self, t: Tensor) -> Tensor:
        return t.view(self.arms, len(t) // self.arms, *t.shape[1:])

    def ready(self, to_train: bool) -> None:
        self._model.train(to_train)

    def networks(self) -> list[Callable[[Inputs], Any]]:
        parts = [{name: t[arm] for name, t in self._tensors.items()} for arm in range(self.arms)]
        return [functools.partial(_called, self._model, part) for part in parts]

    def states(self) -> list[dict[str, Tensor]]:
        return [self._state(arm) for arm in range(self.arms)]

    def _state(self, arm: int) -> dict[str, Tensor]:
        for name, t in tensors(self._model).items():
            t.copy_(self._tensors[name][arm].detach())
        return _state(self._model)

    def everything(self) -> list[Tensor]:
        return [*(t.detach() for t in self._tensors.values()), *self._update.everything()]

    def paths(self) -> list[dict[str, Tensor]]:
        named = [*zip(self._trained, self._update.paths, strict=True)]
        return [{name: path[arm].clone() for name, path in named} for arm in range(self.arms)]

    def tighten(self, masks: Sequence[Masks]) -> None:
        self._update.tighten([_stacked_pruning(name, masks, whole=True) for name in self._trained])


def _state(model: nn.Module) -> dict[str, Tensor]:
    found = model.state_dict()
    return {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in found.items()
        if isinstance(value, Tensor)
    }


def _pruning(name: str, masks: Masks, *, whole: bool = False) -> Tensor | None:
    """A parameter's mask; None where it has none, or prunes nothing (but with `whole`)."""
    mask = masks.get(name)
    return None if mask is None or (bool(mask.all()) and not whole) else mask


def _stacked_pruning(name: str, masks: Sequence[Masks], *, whole: bool = False) -> Tensor | None:
    """The same of several arms, stacked."""
    found = [_pruning(name, each, whole=whole) for each in masks]
    some = next((mask for mask in found if mask is not None), None)
    return None if some is None else torch.stack([torch.ones_like(some) if m is None else m for m in found])
