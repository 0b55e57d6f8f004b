"""How much the masks of tickets agree: two tickets, or the replicates of two runs pair by pair."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ticketfind import TicketfindError, masks, transfer
from ticketfind.ticket import Ticket


@dataclass(frozen=True)
class Difference:
    """How much two tickets agree."""

    same_masks: bool
    same_init: bool
    """Every initial weight and buffer equal, bit for bit, but for those of `left_out`."""
    tensors: dict[str, masks.Overlap]
    left_out: tuple[str, ...] = ()
    """Parameters of an output layer, for other numbers of classes: nothing to compare."""

    @property
    def total(self) -> masks.Overlap:
        """All tensors as one."""
        return masks.total(self.tensors.values())

    @property
    def is_none(self) -> bool:
        """Whether the two are the same ticket."""
        return self.same_masks and self.same_init and not self.left_out


def difference(a: Ticket, b: Ticket) -> Difference:
    """Compare two tickets. Raises TicketfindError where they are of different networks."""
    left_out = transfer.head(a.init, b.init)
    one, other = ({name: mask for name, mask in t.masks.items() if name not in left_out} for t in (a, b))
    overlaps = masks.compare(one, other)
    if not overlaps:
        raise TicketfindError("masks of different networks: all are of output layers for different numbers of classes")
    tied = {**b.about.aliases, **a.about.aliases}

    def is_same(name: str) -> bool:
        ours, theirs = a.init[name], b.init[name]
        masked = tied.get(name, name)
        if masked in a.masks and not (a.complete and b.complete):  # a compact ticket holds what its mask keeps
            both = a.masks[masked] & b.masks[masked]
            ours, theirs = ours[both], theirs[both]
        return torch.equal(ours, theirs)

    same_init = a.init.keys() == b.init.keys() and all(is_same(name) for name in a.init if name not in left_out)
    same_masks = all(torch.equal(one[name], other[name]) for name in one)
    return Difference(same_masks, same_init, overlaps, tuple(left_out))


@dataclass(frozen=True)
class Between:
    """Replicates of two runs, or of one, compared pair by pair."""

    same_init: tuple[masks.Overlap, ...]
    """All tensors as one, of each pair with the same initial weights: another data order, or other data."""
    other_init: tuple[masks.Overlap, ...]
    """Of each pair with different ones."""


def between(a: Sequence[Ticket], b: Sequence[Ticket] | None = None) -> Between:
    """Compare each ticket of `a` with each of `b`; without `b` those of `a` with one another.

    Raises TicketfindError where they are of different networks.
    """
    pairs: Iterable[tuple[Ticket, Ticket]] = itertools.combinations(a, 2) if b is None else itertools.product(a, b)
    found = [difference(one, other) for one, other in pairs]
    return Between(
        tuple(each.total for each in found if each.same_init), tuple(each.total for each in found if not each.same_init)
    )
