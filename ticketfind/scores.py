"""What decides which weights are kept: a score for each, the highest of which are kept. Pure functions.

Two families: of the weights before and after a training (arXiv 1905.01067), and, before any training, of what the loss
or the output has to do with each weight, SNIP, GraSP and SynFlow.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ticketfind import TicketfindError
from ticketfind.batches import seeded
from ticketfind.masks import Masks, Weights


class Network(Protocol):
    """The network as functions of the weights that are scored; everything else is as before the training."""

    def losses(self) -> Iterator[Callable[[Weights], Tensor]]:
        """The mean loss over one batch of training examples after another, the same ones at every call; scalars."""

    def flow(self, weights: Weights) -> Tensor:
        """The sum of the outputs for an input of ones, every parameter at its magnitude; float64, a scalar."""


@dataclass(frozen=True)
class Seen:
    """What a score may look at. All by parameter name, in the parameters' shapes."""

    trained: Weights
    """After the training, or where it is on its way; pruned ones are zero."""
    initial: Weights
    """At the rewind point, or after the last pruning on the way; what `masks` prunes need not be zero."""
    masks: Masks
    """That it was trained under: only what these keep is ranked."""
    path: Weights | None = None
    """The sum of |w_t - w_(t-1)| over the iterations since, for a score that asks for it."""
    network: Network | None = None
    """For a score that asks for it."""


Function = Callable[[Seen], Weights]


@dataclass(frozen=True)
class Score:
    """A function that scores weights, and what it takes to call it."""

    function: Function
    needs_path: bool = False
    needs_network: bool = False
    steps: int = 1
    """Prunings in which a round's weights go, each scored anew; their counts fall exponentially."""


def by_function(function: Callable[[Weights, Weights], Weights]) -> Score:
    """A score out of a user's (trained, initial) -> scores."""
    return Score(lambda seen: function(seen.trained, seen.initial))


# ------------------------------------------------------------------ of the weights before and after a training


def _magnitude(seen: Seen) -> Weights:
    """|w_final|, the paper's criterion (arXiv 1803.03635, section 2); large_final in arXiv 1905.01067."""
    return {name: w.abs() for name, w in seen.trained.items()}


def _small_final(seen: Seen) -> Weights:
    """-|w_final| (arXiv 1905.01067, figure 3), as the next five."""
    return {name: -w.abs() for name, w in seen.trained.items()}


def _large_init(seen: Seen) -> Weights:
    """|w_initial|."""
    return {name: seen.initial[name].abs() for name in seen.trained}


def _small_init(seen: Seen) -> Weights:
    """-|w_initial|."""
    return {name: -seen.initial[name].abs() for name in seen.trained}


def _large_init_large_final(seen: Seen) -> Weights:
    """min(a |w_initial|, |w_final|), a for each tensor such that both prune the same share: the lower of two ranks."""
    return {name: torch.minimum(*_both_ranks(seen, name, 1)) for name in seen.trained}


def _small_init_small_final(seen: Seen) -> Weights:
    """-max(a |w_initial|, |w_final|), with the same a."""
    return {name: torch.minimum(*_both_ranks(seen, name, -1)) for name in seen.trained}


def _magnitude_increase(seen: Seen) -> Weights:
    """|w_final| - |w_initial|."""
    return {name: w.abs() - seen.initial[name].abs() for name, w in seen.trained.items()}


def _movement(seen: Seen) -> Weights:
    """|w_final - w_initial|, the net change: prunes what has changed least."""
    return {name: (w - seen.initial[name]).abs() for name, w in seen.trained.items()}


def _path_length(seen: Seen) -> Weights:
    """sum over t of |w_t - w_(t-1)|, the change from step to step: prunes what has moved about least."""
    assert seen.path is not None
    return {name: seen.path[name] for name in seen.trained}


def _random(seen: Seen) -> Weights:
    return {name: torch.rand_like(w) for name, w in seen.trained.items()}


def _both_ranks(seen: Seen, name: str, sign: int) -> tuple[Tensor, Tensor]:
    """Of the magnitudes before and after, times a sign."""
    mask = seen.masks[name]
    return _ranks(sign * seen.initial[name].abs(), mask), _ranks(sign * seen.trained[name].abs(), mask)


def _ranks(values: Tensor, mask: Tensor) -> Tensor:
    """Of what a mask keeps, the place in ascending order as a fraction in (0, 1]; 0 for the rest."""
    kept = values[mask]
    order = torch.empty(kept.numel(), dtype=torch.float64, device=values.device)
    order[kept.argsort(stable=True)] = torch.arange(1, kept.numel() + 1, dtype=torch.float64, device=values.device)
    return torch.zeros_like(values, dtype=torch.float64).masked_scatter_(mask, order / max(1, kept.numel()))


def _per_layer(function: Function) -> Function:
    """The same, divided by its mean over the layer's kept weights: for one ranking over layers of different scales."""

    def scores(seen: Seen) -> Weights:
        found = dict(function(seen))
        for name, mask in seen.masks.items():  # one tensor at a time: two scores of all would not fit
            mean = found[name][mask].mean()
            if mean > 0:
                found[name] = found[name] / mean
        return found

    return scores


# ------------------------------------------------------------------------------------------- before training


def _snip(seen: Seen) -> Weights:
    """|w dL/dw| of the initial weights under their mask (SNIP, arXiv 1810.02340, equation 6, not normalized)."""
    assert seen.network is not None
    weights = _leaves(seen)
    slopes = _gradient(seen.network, weights)
    return {name: (w.detach() * slopes[name]).abs() for name, w in weights.items()}


def _grasp(seen: Seen) -> Weights:
    """w Hg, H the Hessian and g the gradient of the loss (GraSP, arXiv 2002.07376, equation 8, whose sign is the other
    one and which keeps the lowest). Exact over the batches: the product with the mean gradient, batch by batch."""
    assert seen.network is not None
    weights = _leaves(seen)
    slopes = _gradient(seen.network, weights)
    products, leaves, batches = _sums(weights), [*weights.values()], 0
    for loss in seen.network.losses():
        with torch.enable_grad():
            own = torch.autograd.grad(loss(weights), leaves, create_graph=True, materialize_grads=True)
            along = torch.stack([(g * slopes[name]).sum() for name, g in zip(weights, own, strict=True)]).sum()
            found = torch.autograd.grad(along, leaves, materialize_grads=True)
        for name, product in zip(weights, found, strict=True):
            products[name] += product
        batches += 1
    return {name: w.detach() * products[name] / batches for name, w in weights.items()}


def _synflow(seen: Seen) -> Weights:
    """|w dR/dw|, R the sum of the outputs for an input of ones, parameters at their magnitude (SynFlow, arXiv
    2006.05467, equations 4 and 5)."""
    assert seen.network is not None
    weights = {name: w.double().requires_grad_() for name, w in _leaves(seen).items()}
    with torch.enable_grad():
        slopes = torch.autograd.grad(seen.network.flow(weights), [*weights.values()], materialize_grads=True)
    return {name: (w.detach() * slope).abs() for (name, w), slope in zip(weights.items(), slopes, strict=True)}


def _leaves(seen: Seen) -> dict[str, Tensor]:
    """The initial weights under their mask, to be differentiated by."""
    return {name: (seen.initial[name] * mask).detach().requires_grad_() for name, mask in seen.masks.items()}


def _sums(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros to add to, in float32 at least."""
    return {name: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for name, w in weights.items()}


def _gradient(network: Network, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean over the batches of dL/dw."""
    sums, batches = _sums(weights), 0
    for loss in network.losses():
        with torch.enable_grad():
            slopes = torch.autograd.grad(loss(weights), [*weights.values()], materialize_grads=True)
        for name, slope in zip(weights, slopes, strict=True):
            sums[name] += slope
        batches += 1
    return {name: total / batches for name, total in sums.items()}


# --------------------------------------------------------------------------------------------------- all

SCORES: dict[str, Score] = {
    "magnitude": Score(_magnitude),
    "small_final": Score(_small_final),
    "large_init": Score(_large_init),
    "small_init": Score(_small_init),
    "large_init_large_final": Score(_large_init_large_final),
    "small_init_small_final": Score(_small_init_small_final),
    "magnitude_increase": Score(_magnitude_increase),
    "movement": Score(_movement),
    "path_length": Score(_path_length, needs_path=True),
    "magnitude_per_layer": Score(_per_layer(_magnitude)),
    "movement_per_layer": Score(_per_layer(_movement)),
    "path_length_per_layer": Score(_per_layer(_path_length), needs_path=True),
    "random": Score(_random),
    "snip": Score(_snip, needs_network=True),
    "grasp": Score(_grasp, needs_network=True),
    "synflow": Score(_synflow, needs_network=True, steps=100),
}


def scored(score: Score, seen: Seen, *, seed: int) -> dict[str, Tensor]:
    """The scores of everything that was seen, checked; what is drawn at random follows from `seed`.

    Raises TicketfindError where a score is missing, wrongly shaped or not finite.
    """
    with seeded(seed, *{w.device for w in seen.trained.values()}), torch.no_grad():
        try:
            found = score.function(seen)
        except TicketfindError:
            raise
        except Exception as error:
            raise TicketfindError(f"score: the function failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, Mapping):
        raise TicketfindError(f"score: expected a dict of tensors by parameter, found {type(found).__name__}")
    for name, w in seen.trained.items():
        each = found.get(name)
        if not isinstance(each, Tensor) or each.shape != w.shape:
            shape = f"shape {tuple(each.shape)}" if isinstance(each, Tensor) else type(each).__name__
            raise TicketfindError(f"score of {name}: expected a tensor of shape {tuple(w.shape)}, found {shape}")
        if not bool(each.sum().isfinite()) and not bool(torch.isfinite(each).all()):  # a sum may overflow
            raise TicketfindError(f"score of {name}: expected finite numbers, found NaN or infinity")
    return {name: s.to(torch.uint8) if s.dtype == torch.bool else s for name, s in found.items()}  # for kthvalue
