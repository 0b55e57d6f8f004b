"""What a command's TICKET or RUN argument stands for."""

from pathlib import Path
from typing import TYPE_CHECKING

from ticketfind import TicketfindError

if TYPE_CHECKING:
    from ticketfind.rundir import RunDir
    from ticketfind.ticket import Ticket


def run_at(path: Path | None) -> "RunDir | None":
    """The run at `path`, the latest for None; None where `path` is a file."""
    from ticketfind import rundir

    if path is None:
        return rundir.latest()
    if path.is_dir():
        run = rundir.RunDir(path)
        run.recipe()
        return run
    if not path.exists():
        raise TicketfindError(f"{path}: expected a ticket file or a run directory, found nothing of that name")
    return None


def ticket_at(path: Path | None, round: int | None, replicate: int | None) -> "tuple[Ticket, str]":
    """The ticket in a file or of a run, and a name for what is made of it."""
    from ticketfind import contents
    from ticketfind.ticket import load_ticket

    run = run_at(path)
    if run is not None:
        chosen = contents.chosen(run, round)
        which = chosen.replicate if replicate is None else replicate
        return contents.load(run, chosen.round, which), run.path.name
    assert path is not None
    if round is not None or replicate is not None:
        raise TicketfindError(f"{path}: is one ticket; --round and --replicate are for run directories")
    return load_ticket(path), path.stem
