"""ticketfind finds lottery tickets (arXiv 1803.03635) in any PyTorch model and hands them over as a file.

    ticket = ticketfind.load_ticket("ticket.safetensors")
    ticket.apply(model)                # initial weights in, pruned weights zero
    ticket.hold(model, optimizer)      # keeps them zero in your own training loop

Importing this package imports nothing heavy: torch comes with the first use of a name below.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ticketfind.ticket import Ticket, load_ticket

__version__ = "0.1.0"
__all__ = ["Ticket", "TicketfindError", "__version__", "load_ticket"]


class TicketfindError(Exception):
    """A fault that the user can mend; its text names the thing, what was expected, found, and what to do."""


def __getattr__(name: str) -> Any:
    if name in ("Ticket", "load_ticket"):
        from ticketfind import ticket

        return getattr(ticket, name)
    raise AttributeError(f"module 'ticketfind' has no attribute {name!r}")
