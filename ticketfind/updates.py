"""From a loss to changed weights: gradients, clipping, the optimizer, masks, and how far weights have gone."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ticketfind.recipe import Train


class Update:
    """From a loss to changed weights: gradients, clipping, optimizer, masks."""

    def __init__(
        self, leaves: Sequence[Tensor], pruning: Sequence[Tensor | None], how: Train, arms: int | None, paths: bool
    ) -> None:
        """pruning: which of a leaf's weights are kept; None for all. arms: of leaves that are stacked. paths: whether
        to sum up how far weights go."""
        self._leaves, self._how, self._arms = leaves, how, arms
        self._weights = [leaf.detach() for leaf in leaves]
        self._keep = [
            None if kept is None else torch.empty_like(weight).copy_(kept)
            for kept, weight in zip(pruning, self._weights, strict=True)
        ]
        self._optimizer = _Optimizer(self._weights, self._keep, how)
        left = [] if self._optimizer.holds_pruned else [i for i, keep in enumerate(self._keep) if keep is not None]
        self._to_mask = [self._weights[i] for i in left], [self._keep[i] for i in left]
        self._last = [weight.clone() for weight in self._weights] if paths else []
        self.paths = [_whole_zeros(weight) for weight in self._weights] if paths else []

    def __call__(self, loss: Tensor, lr: float | Tensor) -> None:
        grads = self._own(torch.autograd.grad(loss, self._leaves, allow_unused=True))
        if self._how.clip is not None:
            grads = self._clipped(grads, self._how.clip)
        self._optimizer.step(grads, lr)
        if self._to_mask[0]:
            torch._foreach_mul_(*self._to_mask)  # type: ignore[arg-type]
        if self.paths:
            moved = torch._foreach_sub(self._weights, self._last)
            torch._foreach_abs_(moved)
            torch._foreach_add_(self.paths, moved)
            torch._foreach_copy_(self._last, self._weights)

    @torch.no_grad()
    def tighten(self, pruning: Sequence[Tensor | None]) -> None:
        """Go on with fewer weights; paths begin anew. Only what was given a mask at the start may be given one."""
        for weight, keep, kept in zip(self._weights, self._keep, pruning, strict=True):
            if keep is not None and kept is not None:
                keep.copy_(kept)
                weight.mul_(keep)
        self._optimizer.forget(self._keep)
        if self.paths:
            torch._foreach_zero_(self.paths)
            torch._foreach_copy_(self._last, self._weights)

    def everything(self) -> list[Tensor]:
        """What a step changes beside the weights: the optimizer's tensors, paths."""
        return [*self._optimizer.everything(), *self.paths, *self._last]

    def _own(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients in their weights' memory layout, as ``backward`` leaves them: the fused updates rely on it."""
        dense = [g.to_dense() if g is not None and g.layout != torch.strided else g for g in grads]  # of embeddings
        return [
            g if g is None or g.stride() == w.stride() else torch.empty_like(w).copy_(g)
            for g, w in zip(dense, self._weights, strict=True)
        ]

    def _clipped(self, grads: Sequence[Tensor | None], longest: float) -> list[Tensor | None]:
        """Each arm's gradient, over all weights that it keeps, as ``torch.nn.utils.clip_grad_norm_`` shortens it."""
        kept = [g if g is None or keep is None else g * keep for g, keep in zip(grads, self._keep, strict=True)]
        norms = [g.reshape(self._arms or 1, -1).norm(dim=1) for g in kept if g is not None]
        scale = (longest / (torch.stack(norms).norm(dim=0) + 1e-6)).clamp(max=1.0)
        return [g if g is None else g * scale.view(-1, *[1] * (g.ndim - 1)) if self._arms else g * scale for g in kept]


def _whole_zeros(weight: Tensor) -> Tensor:
    """In float32 at least: a sum of many small steps does not grow in half precision."""
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


class _Optimizer:
    """PyTorch's own update rules: its fused kernels, called as functions on lists of tensors.

    As ``torch.optim``'s classes call them, but without their bookkeeping, which costs a small network a third of its
    step (and a second at start-up). A parameter without a gradient is left alone, as there.

    Adam divides by the root of the second moment. A pruned weight's is infinite: it moves by exactly zero, and stays
    zero without a mask in the step.
    """

    def __init__(self, parameters: Sequence[Tensor], keep: Sequence[Tensor | None], how: Train) -> None:
        self._parameters, self._how = parameters, how
        self._adaptive = how.optimizer != "sgd"
        self.holds_pruned = self._adaptive and all(_divides_by_infinity(p.device, p.dtype) for p in parameters)
        self._first = [torch.zeros_like(p) for p in parameters] if self._adaptive or how.momentum else []
        self._second = [torch.zeros_like(p) for p in parameters] if self._adaptive else []
        self._count = torch.zeros(len(parameters) if self._adaptive else 0, device=parameters[0].device)
        self._steps = [*self._count]
        dtypes = dict.fromkeys(p.dtype for p in parameters)
        self._groups = [[i for i, p in enumerate(parameters) if p.dtype == dtype] for dtype in dtypes]
        self.forget(keep)

    def forget(self, keep: Sequence[Tensor | None]) -> None:
        """What is pruned has no moments, or those that keep it at zero."""
        for moments, value in ((self._first, 0.0), (self._second, math.inf if self.holds_pruned else 0.0)):
            for moment, kept in zip(moments, keep, strict=False):
                if kept is not None:
                    moment.masked_fill_(kept == 0, value)

    def everything(self) -> list[Tensor]:
        """Moments and counts of steps."""
        return [*self._first, *self._second, self._count]

    def step(self, grads: Sequence[Tensor | None], lr: float | Tensor) -> None:
        if self._adaptive:
            self._count_step(grads)
        for group in self._groups:
            live = [i for i in group if grads[i] is not None]
            self._kernel(live, [g for i in live if (g := grads[i]) is not None], lr)

    def _count_step(self, grads: Sequence[Tensor | None]) -> None:
        if all(grad is not None for grad in grads):
            self._count += 1
        else:
            for step, grad in zip(self._steps, grads, strict=True):
                if grad is not None:
                    step += 1

    def _kernel(self, live: Sequence[int], grads: list[Tensor], lr: float | Tensor) -> None:
        def pick(values: Sequence[Tensor]) -> list[Tensor]:
            return [values[i] for i in live] if values else []

        how, parameters, first = self._how, pick(self._parameters), pick(self._first)
        if not self._adaptive:
            torch._fused_sgd_(
                parameters, grads, first, weight_decay=how.weight_decay, momentum=how.momentum, lr=lr,
                dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
            )  # fmt: skip
            return
        update = torch._fused_adamw_ if how.optimizer == "adamw" else torch._fused_adam_
        update(
            parameters, grads, first, pick(self._second), [], pick(self._steps), amsgrad=False, lr=lr,
            beta1=0.9, beta2=0.999, weight_decay=how.weight_decay, eps=1e-8, maximize=False,
        )  # fmt: skip


@functools.cache
def _divides_by_infinity(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's fused Adam leaves a zero weight with an infinite second moment at zero; tried, not assumed."""
    weight, grad, first = (torch.full((64,), value, device=device, dtype=dtype) for value in (0.0, 1.0, 0.0))
    second, steps = torch.full_like(weight, math.inf), torch.zeros((), device=device)
    for _ in range(2):
        steps += 1
        torch._fused_adam_(
            [weight], [grad], [first], [second], [], [steps], amsgrad=False,
            lr=0.1, beta1=0.9, beta2=0.999, weight_decay=0.1, eps=1e-8, maximize=False,
        )  # fmt: skip
    return bool((weight == 0).all())
