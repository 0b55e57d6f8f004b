"""What a run holds: its finished rounds, and the tickets of any of them."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ticketfind import TicketfindError, __version__, results
from ticketfind.recipe import Recipe
from ticketfind.rundir import RunDir
from ticketfind.tensorfile import read_tensors
from ticketfind.ticket import Provenance, Ticket, read_start


def finished_rounds(run: RunDir, recipe: Recipe | None = None) -> list[results.Round]:
    """The finished rounds of a run, in order."""
    recipe = recipe or run.recipe()
    return results.rounds_of(run.log(), replicates=recipe.run.replicates, given_tolerance=recipe.run.tolerance)


def load(run: RunDir, round: int, replicate: int) -> Ticket:
    """The ticket of one round and replicate, trained or not. Raises TicketfindError where the run does not hold it."""
    recipe = run.recipe()
    rounds = finished_rounds(run, recipe)
    if not 1 <= round <= max(len(rounds) - 1, _untested(recipe, rounds) or 0):
        raise _no_round(run, rounds, round)
    there = rounds[min(round, len(rounds) - 1)].replicates
    if replicate not in there:
        raise TicketfindError(f"{run.path}: replicate: expected one of {', '.join(map(str, there))}, found {replicate}")
    mask, _ = read_tensors(run.mask_file(round, replicate), "mask")
    start, facts = read_start(run.start_file(replicate, round if recipe.prune.rewind == "lr" else None))
    about = Provenance(
        recipe=recipe.plain(),
        round=round,
        replicate=replicate,
        claims={name: rounds[n].stats.json() for name, n in (("dense", 0), ("ticket", round)) if n < len(rounds)},
        versions={"ticketfind": __version__, "torch": torch.__version__, "python": platform.python_version()},
        **facts,
    )
    return Ticket(mask, start, about)


def dense_weights(run: RunDir, found: Sequence[Ticket]) -> list[dict[str, Tensor]]:
    """What the dense network of each ticket's replicate had after its training; none in a run of an earlier version."""
    there = [run.trained_file(ticket.about.replicate) for ticket in found]
    if not all(file.exists() for file in there):
        return []
    return [read_tensors(file, "trained weights")[0] for file in there]


def _no_round(run: RunDir, rounds: list[results.Round], round: int) -> TicketfindError:
    there = f"1 to {len(rounds) - 1}" if len(rounds) > 1 else "a finished pruned round, of which the run has none"
    return TicketfindError(f"{run.path}: round: expected {there}, found {round}")


def _untested(recipe: Recipe, rounds: list[results.Round]) -> int | None:
    """The round whose mask was drawn from weights that were trained already, and not trained; None before that."""
    return 1 if recipe.model.trained and recipe.prune.rounds == 1 and rounds else None


@dataclass(frozen=True)
class Choice:
    """A round of a run, and which of its replicates stands for it."""

    round: int
    replicate: int


def chosen(run: RunDir, round: int | None) -> Choice:
    """Round `round` of a run, the winner (or the one ticket that was drawn and not trained) where None.

    Raises TicketfindError where there is none.
    """
    recipe = run.recipe()
    rounds = finished_rounds(run, recipe)
    untested = _untested(recipe, rounds)
    if untested is not None and round in (None, untested):
        return Choice(untested, rounds[0].replicates[0])
    if round is not None:
        if not 1 <= round < len(rounds):
            raise _no_round(run, rounds, round)
        return Choice(round, rounds[round].best_replicate)
    winner = results.winner_of(rounds)
    if winner is None:
        finished = f"{len(rounds)} finished rounds" if rounds else "no finished round"
        raise TicketfindError(f"{run.path}: expected a winner, found no matching one in {finished}; name a --round")
    return Choice(winner.round, winner.best_replicate)


def tickets(run: RunDir, round: int | None) -> list[Ticket]:
    """The tickets of every replicate of a round (the winner's where None)."""
    number = chosen(run, round).round
    rounds = finished_rounds(run)
    return [load(run, number, replicate) for replicate in rounds[min(number, len(rounds) - 1)].replicates]


def nearest_round(run: RunDir, remaining: float) -> int:
    """The pruned round of a run whose weights remaining are nearest to this fraction, by their ratio.

    Raises TicketfindError where the run has none.
    """
    rounds = finished_rounds(run)
    if len(rounds) < 2:
        return chosen(run, None).round
    return min(rounds[1:], key=lambda found: abs(math.log(found.remaining / remaining))).round
