"""What holds in every round of a search, whatever the model and the optimizer; checked while it runs, and by `verify`.

Each check names the parameters in which it fails, and what is wrong with them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ticketfind import TicketfindError, masks
from ticketfind.masks import Masks


class Violated(TicketfindError):
    """An invariant does not hold: a fault of ticketfind, of the machine, or of files that were changed."""

    @classmethod
    def of(cls, where: str, faults: list[str]) -> "Violated":
        """In one line, with what is wrong where."""
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        return cls(
            f"{where}: {'; '.join(faults[:3])}{more}; this must never be: a fault of ticketfind or of the machine,"
            " please report it"
        )


def of_start(found: Mapping[str, Tensor], start: Mapping[str, Tensor], mask: Masks) -> list[str]:
    """What a network holds before its first iteration: the rewind point bit for bit, pruned weights zero."""
    expected = masks.masked(start, mask)
    return [
        f"{name} does not begin at the rewind point"
        for name, value in found.items()
        if name in expected and not is_same(value, expected[name].to(value.dtype))
    ]


def of_training(final: Mapping[str, Tensor], mask: Masks) -> list[str]:
    """What a training leaves: pruned weights exactly zero."""
    return [f"{name} has pruned weights that are not zero" for name in masks.nonzero_outside(mask, final)]


def of_pruning(new: Masks, old: Masks, kept: int, groups: Sequence[masks.Group] = (), round: int = 0) -> list[str]:
    """What a pruning draws: nothing that was pruned comes back, and exactly as many weights are kept as planned, in
    each block of an N:M pattern too (groups, round: what is pruned, for which round)."""
    faults = [f"{name} has a pruned weight that came back" for name in new if not masks.nested_in(new[name], old[name])]
    if masks.count(new) != kept:
        faults.append(f"{masks.count(new)} weights are kept, {kept} were planned")
    return faults + [f"{name} keeps other numbers in its blocks" for name in masks.off_pattern(new, groups, round)]


def is_same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bits(a), _bits(b.to(a.device)))


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)
