"""A ticket on other data than those it was found on: with another number of classes, the network's head is new."""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from ticketfind import masks
from ticketfind.ticket import Ticket


def head(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """The entries of an output layer for another number of classes: shapes that differ, in their first axis only.

    A layer's first axis is that of its outputs, and what takes them has them in its second: where nothing else differs,
    nothing takes them. None where any other entry differs, or is in one of the two only: these are other networks.
    """
    differing = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    is_head = found.keys() == wanted.keys() and all(
        found[name].ndim == wanted[name].ndim > 0 and found[name].shape[1:] == wanted[name].shape[1:]
        for name in differing
    )
    return differing if is_head else []


def onto(ticket: Ticket, fresh: Mapping[str, Tensor]) -> Ticket:
    """`ticket` in the network that `fresh` is an initialization of; the same ticket where all shapes fit, or none can.

    The head is that of `fresh` and keeps all its weights: which of them mattered for the old classes says nothing of
    the new ones. Everything else has the ticket's masks and initial weights.
    """
    new = head(ticket.init, fresh)
    kept = masks.dense({name: fresh[name].shape for name in new if name in ticket.masks})
    sigma = {name: float(fresh[name].double().std(correction=0)) for name in kept}
    return dataclasses.replace(
        ticket,
        masks={**ticket.masks, **kept},
        init={**ticket.init, **{name: fresh[name] for name in new}},
        about=dataclasses.replace(ticket.about, sigma={**ticket.about.sigma, **sigma}),
    )
