"""Masks: which weights are kept. Pure functions over ``dict[str, Tensor]``; nothing here knows a file or a training.

A mask is a bool tensor of its parameter's shape, True = kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ticketfind import TicketfindError, patterns, readers
from ticketfind.selection import keep_highest

Masks = dict[str, Tensor]
"""Parameter name -> bool tensor of its shape, True = kept."""
Weights = Mapping[str, Tensor]


# ---------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True)
class Group:
    """Tensors that are ranked together, and the share of their remaining weights pruned each round."""

    names: tuple[str, ...]
    fraction: float
    steps: tuple[int, ...] = ()
    """Of the one tensor of an N:M pattern: weights kept in each block, round by round (4, 3, 2). No fraction counts."""

    def kept_after(self, remaining: int, size: int) -> int:
        """Weights kept of the `remaining` ones, of `size` in all."""
        if not self.steps or not size:
            return kept_after(remaining, self.fraction)
        block = self.steps[0]
        now = remaining * block // size
        return size * next((step for step in self.steps if step < now), now) // block


def make_groups(
    names: Sequence[str], fractions: Mapping[str, float], scope: str, rounds: int | None = None
) -> list[Group]:
    """One group per tensor (scope "layer" or "N:M") or per glob ("global"); for each tensor the last glob that matches.

    Tensors with fraction 0, or with no glob, are in no group: they stay whole. rounds: of a pattern.
    """
    members: dict[str, list[str]] = {}
    for name in names:
        matching = [glob for glob in fractions if fnmatchcase(name, glob)]
        if matching and fractions[matching[-1]] > 0:
            members.setdefault(matching[-1], []).append(name)
    if scope == "global":
        return [Group(tuple(inside), fractions[glob]) for glob, inside in members.items()]
    by_name = {name: fractions[glob] for glob, inside in members.items() for name in inside}
    pattern = readers.pattern(scope)
    steps = () if pattern is None else patterns.steps(*pattern, rounds)
    return [Group((name,), by_name[name], steps) for name in names if name in by_name]


def kept_after(remaining: int, fraction: float) -> int:
    """Weights kept of `remaining`, exactly ``n - round(n * p)``."""
    return remaining - round(remaining * fraction)


def plan(sizes: Mapping[str, int], groups: Sequence[Group], rounds: int | None, until: float | None) -> list[int]:
    """Weights kept in each round, round 0 (all of them) first; the counts are known before any training.

    Stops after `rounds` prunings, or with the first round at or below the fraction `until`, or when no weight
    would be pruned any more. sizes: weights in each prunable tensor.
    """
    total = sum(sizes.values())
    left = in_groups = [sum(sizes[name] for name in group.names) for group in groups]
    whole = total - sum(left)
    kept = [total]
    while (rounds is None or len(kept) <= rounds) and (until is None or kept[-1] / max(total, 1) > until):
        left = [group.kept_after(n, size) for n, size, group in zip(left, in_groups, groups, strict=True)]
        if whole + sum(left) == kept[-1]:
            break
        kept.append(whole + sum(left))
    return kept


# --------------------------------------------------------------------------------------------- pruning


def prune(masks: Masks, scores: Weights, groups: Sequence[Group], counts: Sequence[int] | None = None) -> Masks:
    """New masks with exactly ``n - round(n * p)`` of each group's n remaining weights, the highest scores.

    counts: how many to keep of each group instead. Ties go to the weight that comes first (tensors in the group's
    order, weights in row-major order), so that a mask is a function of the scores alone. Masks only ever lose weights.
    Shapes: as the parameters'.
    """
    new = dict(masks)
    for group, count in zip(groups, counts or targets(masks, groups), strict=True):
        kept = _highest(group, [scores[name] for name in group.names], [masks[name] for name in group.names], count)
        new.update(zip(group.names, kept, strict=True))
    return new


def targets(masks: Masks, groups: Sequence[Group]) -> list[int]:
    """How many weights of each group the next round keeps."""
    sizes = [sum(masks[name].numel() for name in group.names) for group in groups]
    return [group.kept_after(kept_in(masks, group), size) for group, size in zip(groups, sizes, strict=True)]


def kept_in(masks: Masks, group: Group) -> int:
    """Weights kept in a group."""
    return sum(int(masks[name].sum()) for name in group.names)


def on_the_way(start: Sequence[int], end: Sequence[int], share: float) -> list[int]:
    """Counts from `start` to `end`, group by group, after a share (0 to 1) of the way: n * (k / n) ** share."""
    return [round(n * (k / n) ** share) if 0 < share < 1 and n else k for n, k in zip(start, end, strict=True)]


def _highest(group: Group, scores: Sequence[Tensor], among: Sequence[Tensor], k: int) -> list[Tensor]:
    """The k highest of a group, in each block alike where it has a pattern."""
    if not group.steps or not patterns.fits(among[0].shape, group.steps[0]):
        return keep_highest(scores, among, k)
    block = group.steps[0]
    return [patterns.keep_highest(scores[0], among[0], k * block // among[0].numel(), block)]


def dense(shapes: Mapping[str, Sequence[int]]) -> Masks:
    """Masks that keep everything."""
    return {name: torch.ones(tuple(shape), dtype=torch.bool) for name, shape in shapes.items()}


def random_like(masks: Masks, *, seed: int, groups: Sequence[Group] = ()) -> Masks:
    """Random masks that keep as many weights of each tensor as `masks` do (the control of the paper's figure 4).

    groups: those of a pattern have as many in each block, so that the pattern is no part of what is compared.
    """
    generator = torch.Generator().manual_seed(seed)
    patterned = {group.names[0]: group for group in groups if group.steps}
    drawn = {}
    for name, mask in masks.items():
        if name in patterned:
            scores = torch.rand(mask.shape, generator=generator)
            (drawn[name],) = _highest(patterned[name], [scores], [torch.ones_like(mask)], int(mask.sum()))
            continue
        order = torch.randperm(mask.numel(), generator=generator)
        flat = torch.zeros(mask.numel(), dtype=torch.bool)
        flat[order[: int(mask.sum())]] = True
        drawn[name] = flat.view(mask.shape)
    return drawn


def magnitude_like(masks: Masks, weights: Weights, groups: Sequence[Group]) -> Masks:
    """Masks that keep as many weights of each group as `masks` do: those of the highest magnitude in `weights`."""
    drawn = dict(masks)
    for group in groups:
        scores = [weights[name].abs() for name in group.names]
        kept = _highest(group, scores, [torch.ones_like(masks[name]) for name in group.names], kept_in(masks, group))
        drawn.update(zip(group.names, kept, strict=True))
    return drawn


def remaining(masks: Masks) -> float:
    """Weights remaining, as a fraction of the prunable weights."""
    return count(masks) / sum(mask.numel() for mask in masks.values())


def count(masks: Masks) -> int:
    """Weights kept, over all tensors."""
    return sum(int(mask.sum()) for mask in masks.values())


def nested_in(inner: Tensor, outer: Tensor) -> bool:
    """True if the mask `inner` keeps nothing that `outer` has pruned."""
    return not bool((inner & ~outer).any())


def off_pattern(masks: Masks, groups: Sequence[Group], round: int) -> list[str]:
    """Names of the tensors of an N:M pattern in which some block keeps another number than `round` has."""
    found = []
    for group in groups:
        if group.steps:
            (name,), block, expected = group.names, group.steps[0], group.steps[min(round, len(group.steps) - 1)]
            if patterns.kept_in_each(masks[name], block) != expected:
                found.append(name)
    return found


def nonzero_outside(masks: Masks, weights: Weights) -> list[str]:
    """Names of the tensors with a pruned weight that is not exactly zero."""
    return [name for name, mask in masks.items() if bool((weights[name].to(mask.device)[~mask] != 0).any())]


def masked(weights: Weights, masks: Masks) -> dict[str, Tensor]:
    """`weights` with pruned ones set to zero; entries without a mask are passed through, not copied."""
    zeroed = dict(weights)
    for name, mask in masks.items():
        weight = weights[name]
        zeroed[name] = torch.where(mask.to(weight.device), weight, torch.zeros((), dtype=weight.dtype))
    return zeroed


# ------------------------------------------------------------------------------------------ comparison


@dataclass(frozen=True)
class Overlap:
    """How much two masks agree. Counts of weights; `expected_*` are for independent masks of these densities."""

    size: int
    kept_a: int
    kept_b: int
    kept_both: int
    expected_both: float

    @property
    def jaccard(self) -> float:
        """Kept in both / kept in either; 1 where both keep nothing."""
        either = self.kept_a + self.kept_b - self.kept_both
        return self.kept_both / either if either else 1.0

    @property
    def jaccard_by_chance(self) -> float:
        """The Jaccard index at the expected overlap of independent masks of the same densities."""
        either = self.kept_a + self.kept_b - self.expected_both
        return self.expected_both / either if either else 1.0

    @property
    def agreement(self) -> float:
        """Cohen's kappa (Cohen 1960): 1 for equal masks, 0 for what chance gives, below 0 for less."""
        same = self.size - self.kept_a - self.kept_b + 2 * self.kept_both
        by_chance = self.size - self.kept_a - self.kept_b + 2 * self.expected_both
        return 1.0 if by_chance == self.size else (same - by_chance) / (self.size - by_chance)


def compare(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Overlap]:
    """The overlap of each tensor. Raises TicketfindError where names or shapes differ."""
    differing = sorted(set(a) ^ set(b))
    if differing:
        raise TicketfindError(
            f"masks of different networks: {', '.join(differing[:5])} only in one of them;"
            " where one search has left a layer whole, the other has to as well (--skip)"
        )
    overlaps = {}
    for name in a:
        x, y = a[name], b[name]
        if x.shape != y.shape:
            raise TicketfindError(f"mask of {name}: shape {tuple(x.shape)} in one, {tuple(y.shape)} in the other")
        kept_a, kept_b = int(x.sum()), int(y.sum())
        expected = kept_a * kept_b / x.numel() if x.numel() else 0.0
        overlaps[name] = Overlap(x.numel(), kept_a, kept_b, int((x & y).sum()), expected)
    return overlaps


def agreement_within(a: Masks, b: Masks, outer: Masks) -> float:
    """Cohen's kappa of two masks over the weights that `outer`, which both are nested in, keeps: 0 by chance."""
    return total(
        Overlap(size, kept_a, kept_b, int((a[name] & b[name]).sum()), kept_a * kept_b / size)
        for name, mask in outer.items()
        if (size := int(mask.sum()))
        for kept_a, kept_b in [(int(a[name].sum()), int(b[name].sum()))]
    ).agreement


def total(overlaps: Iterable[Overlap]) -> Overlap:
    """All tensors as one; the overlap by chance is that of masks with these densities tensor by tensor."""
    parts = list(overlaps)
    return Overlap(
        size=sum(part.size for part in parts),
        kept_a=sum(part.kept_a for part in parts),
        kept_b=sum(part.kept_b for part in parts),
        kept_both=sum(part.kept_both for part in parts),
        expected_both=sum(part.expected_both for part in parts),
    )
