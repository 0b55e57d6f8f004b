"""What a run holds: its finished rounds, and the tickets of any of them."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ticketfind import TicketfindError, __version__, results
from ticketfind.provenance import Provenance
from ticketfind.recipe import Recipe
from ticketfind.rundir import RunDir
from ticketfind.tensorfile import read_tensors
from ticketfind.ticket import Ticket, read_start


def finished_rounds(run: RunDir, recipe: Recipe | None = None) -> list[results.Round]:
    """The finished rounds of a run, in order."""
    recipe = recipe or run.recipe()
    return results.rounds_of(run.log(), replicates=recipe.run.replicates, given_tolerance=recipe.run.tolerance)


def load(run: RunDir, round: int, replicate: int) -> Ticket:
    """The ticket of one round and replicate, trained or not. Raises TicketfindError where the run does not hold it."""
    recipe = run.recipe()
    rounds = finished_rounds(run, recipe)
    measured = {finished.round: finished for finished in rounds}
    there = _replicates(run, recipe, rounds, round)
    if replicate not in there:
        raise TicketfindError(f"{run.path}: replicate: expected one of {', '.join(map(str, there))}, found {replicate}")
    mask, _ = read_tensors(run.mask_file(round, replicate), "mask")
    start, facts = read_start(run.start_file(replicate, round if recipe.prune.rewind == "lr" else None))
    about = Provenance(
        recipe=recipe.plain(),
        round=round,
        replicate=replicate,
        claims={name: measured[n].stats.json() for name, n in (("dense", 0), ("ticket", round)) if n in measured},
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


def _replicates(run: RunDir, recipe: Recipe, rounds: list[results.Round], round: int) -> tuple[int, ...]:
    """Those that have a ticket of a round: it was measured, or its masks are drawn and it will not be, perhaps.

    Raises TicketfindError where none has.
    """
    found = next((each.replicates for each in rounds if each.round == round), ())
    if not found and rounds and _draws_unmeasured(recipe):
        found = tuple(r for r in rounds[0].replicates if run.mask_file(round, r).exists())
    if round >= 1 and found:
        return found
    known = {each.round for each in rounds if each.round}
    if rounds and _draws_unmeasured(recipe):
        known |= {number for number, replicate in run.masks() if replicate in rounds[0].replicates}
    numbers = [str(number) for number in sorted(known)]
    whole = len(numbers) > 1 and numbers == [str(n) for n in range(1, len(numbers) + 1)]
    there = f"1 to {len(numbers)}" if whole else " or ".join(numbers)
    there = there or "a finished pruned round, of which the run has none"
    raise TicketfindError(f"{run.path}: round: expected {there}, found {round}")


def _draws_unmeasured(recipe: Recipe) -> bool:
    """Whether masks are drawn that are not measured: from weights that are trained already, for themselves, or
    several from one training."""
    prune = recipe.prune
    one_shot = recipe.model.trained is not None and prune.rounds == 1
    return one_shot or prune.draws_apart or prune.ahead != (1,)


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
    if round is None and len(rounds) == 1 and recipe.model.trained and recipe.prune.rounds == 1:
        round = 1  # drawn, and not trained
    if round is not None:
        best = next((each.best_replicate for each in rounds if each.round == round), None)
        return Choice(round, _replicates(run, recipe, rounds, round)[0] if best is None or round == 0 else best)
    winner = results.winner_of(rounds)
    if winner is None:
        finished = f"{len(rounds)} finished rounds" if rounds else "no finished round"
        raise TicketfindError(f"{run.path}: expected a winner, found no matching one in {finished}; name a --round")
    return Choice(winner.round, winner.best_replicate)


def tickets(run: RunDir, round: int | None) -> list[Ticket]:
    """The tickets of every replicate of a round (the winner's where None)."""
    number, recipe = chosen(run, round).round, run.recipe()
    there = _replicates(run, recipe, finished_rounds(run, recipe), number)
    return [load(run, number, replicate) for replicate in there]


def nearest_round(run: RunDir, remaining: float) -> int:
    """The pruned round of a run whose weights remaining are nearest to this fraction, by their ratio.

    Raises TicketfindError where the run has none.
    """
    rounds = finished_rounds(run)
    if len(rounds) < 2:
        return chosen(run, None).round
    return min(rounds[1:], key=lambda found: _ratio(found.remaining, remaining)).round


def _ratio(a: float, b: float) -> float:
    """How far two fractions are apart, by the logarithm of their ratio; nothing is as far from something as can be."""
    return abs(math.log(a / b)) if a and b else 0.0 if a == b else math.inf
