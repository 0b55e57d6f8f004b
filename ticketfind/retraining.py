"""Does a ticket reach what its search claims? It is trained once more, as the search had trained it."""

import math
from dataclasses import dataclass
from pathlib import Path

from ticketfind import TicketfindError, experiments, results, student
from ticketfind.arms import Arm, Task
from ticketfind.course import Failed
from ticketfind.devices import EAGER, Way
from ticketfind.forks import Tick
from ticketfind.recipe import Train
from ticketfind.ticket import Ticket
from ticketfind.train import fit


@dataclass(frozen=True)
class Retraining:
    """A ticket trained once more, as the search had trained it, beside what the search claims."""

    accuracy: float
    """At early stop, a fraction."""
    claimed: results.Spread
    """That of the search's replicates."""
    low: float
    high: float
    """Where one more training is to be expected, with 95 %."""

    @property
    def is_inside(self) -> bool:
        """Whether the claim holds."""
        return self.low <= self.accuracy <= self.high


def retrain(
    ticket: Ticket,
    task: Task,
    how: Train,
    *,
    way: Way = EAGER,
    tick: Tick = lambda n: None,
    folder: Path | None = None,
) -> Retraining:
    """Train `ticket` with the seed that the search had for it, and compare with the accuracy that it claims.

    The interval is that of one further observation beside n (Student): mean ± t * sd * sqrt(1 + 1/n); with one, or
    without any spread, that of a proportion over the test set; one test example at the least.
    Raises TicketfindError where the ticket claims nothing, does not fit the task's model, or fails to train.
    """
    claimed = _claimed(ticket)
    arm = Arm(
        "the ticket", ticket.init, ticket.masks, ticket.first_seed, ticket.about.iteration, ticket.about.round,
        ticket.about.replicate,
    )  # fmt: skip
    experiments.check(ticket, task, how)
    ((_, outcome),) = fit([arm], task, how, way=way, tick=tick, folder=folder)
    if isinstance(outcome, Failed):
        raise TicketfindError(f"the ticket failed to train: {outcome.reason}")
    least = 1 / outcome.test_size if outcome.test_size else 1e-6
    n, p = len(claimed.values), min(max(claimed.mean, 0.0), 1.0)
    if claimed.sd:
        width = student.quantile(0.975, n - 1) * claimed.sd * math.sqrt(1 + 1 / n)
    else:
        width = 1.96 * math.sqrt(p * (1 - p) * least)
    width = max(width, least) + 1e-9
    accuracy = outcome.measured.accuracy_early
    return Retraining(accuracy, claimed, claimed.mean - width, claimed.mean + width)


def _claimed(ticket: Ticket) -> results.Spread:
    claims = ticket.about.claims.get("ticket")
    early = claims.get("accuracy_early") if isinstance(claims, dict) else None
    values = early.get("values") if isinstance(early, dict) else None
    if not isinstance(values, list) or not values or not all(isinstance(v, float) for v in values):
        raise TicketfindError("ticket metadata claims: expected the accuracies that the search measured, found none")
    return results.Spread.of(values)
