"""ticketfind finds lottery tickets (arXiv 1803.03635) in any PyTorch model and hands them over as a file.

    ticket = ticketfind.load_ticket("ticket.safetensors")
    ticket.apply(model)                # initial weights in, pruned weights zero
    ticket.hold(model, optimizer)      # keeps them zero in your own training loop

``ticketfind.hold(model, optimizer, masks)`` does the same under masks from elsewhere, such as the file that a search
hands to a training program (--train-command); of a wrapped model it takes the inner one: ``hold(ddp.module, ...)``.

``ticketfind.load_shrunk(file, model)`` makes a model the smaller one that ``ticketfind export --shrink`` has written.

Importing this package imports nothing heavy: torch comes with the first use of a name below.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ticketfind.shrink import load_shrunk
    from ticketfind.ticket import Ticket, hold, load_ticket

__version__ = "0.1.0"
__all__ = ["Ticket", "TicketfindError", "__version__", "hold", "load_shrunk", "load_ticket"]


class TicketfindError(Exception):
    """A fault that the user can mend; its text names the thing, what was expected, found, and what to do."""


def __getattr__(name: str) -> Any:
    if name in ("Ticket", "hold", "load_ticket"):
        from ticketfind import ticket

        return getattr(ticket, name)
    if name == "load_shrunk":
        from ticketfind.shrink import load_shrunk

        return load_shrunk
    raise AttributeError(f"module 'ticketfind' has no attribute {name!r}")
