"""One function per question asked of a ticket; each returns a plain dataclass."""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from ticketfind import TicketfindError, masks, results
from ticketfind.batches import derived_seed
from ticketfind.course import Failed
from ticketfind.devices import EAGER, Way
from ticketfind.forks import Tick
from ticketfind.recipe import Train
from ticketfind.results import Stats
from ticketfind.ticket import Ticket
from ticketfind.train import Arm, State, Task, check_memory, fit


@dataclass(frozen=True)
class Evaluation:
    """A ticket beside the dense network, its noisy twins and its controls, all trained alike."""

    remaining: float
    """Weights remaining, a fraction."""
    arms: dict[str, Stats]
    """dense, ticket, noise=S, reinit, random, as far as they could be trained."""
    verdict: str
    """Begins with: winning, matching but not special, not matching, or inconclusive."""
    notes: tuple[str, ...]
    """What was left out, and why."""


def evaluate(
    tickets: Sequence[Ticket],
    task: Task,
    how: Train,
    *,
    seeds: Sequence[int],
    way: Way = EAGER,
    noise: Sequence[float] = (),
    tolerance: float | None = None,
    tick: Tick = lambda n: None,
    folder: Path | None = None,
) -> Evaluation:
    """Train `tickets`, dense, noisy and control arms, one of each for every seed, in one `fit`; compare.

    tickets: one per seed, or one for all seeds. noise: levels s; each initial weight gets Gaussian noise of standard
    deviation s * sigma, sigma that of its layer's initialization (the paper's appendix F.7), and is trained. folder:
    for the files of an outside program that trains.
    Raises TicketfindError where the ticket does not fit the task's model.
    """
    tickets = [*tickets] if len(tickets) > 1 else [*tickets] * len(seeds)
    arms, notes = _arms(tickets, task, how, seeds, noise)
    check_memory(task, how, way, len(arms))
    measured: dict[str, list[results.Measured]] = {}
    test_size = None
    trainings = fit([arm for _, arm in arms], task, how, way=way, tick=tick, note=notes.append, folder=folder)
    with closing(trainings) as trained:
        for (kind, _), (arm, outcome) in zip(arms, trained, strict=True):
            if isinstance(outcome, Failed):
                notes.append(f"{arm.name}: {outcome.reason}; it is left out")
                continue
            measured.setdefault(kind, []).append(outcome.measured)
            test_size = outcome.test_size
            for file in folder.rglob("*.safetensors") if folder else ():
                file.unlink()  # a program's weights, which have been read: those of all arms may fill a disk
    stats = {name: Stats.of(found) for name, found in measured.items()}
    if "ticket" not in stats:
        raise TicketfindError(f"every training of the ticket failed; the last: {notes[-1]}")
    if task.chance is not None and how.metric is None:
        low = [name for name, found in stats.items() if results.is_chance(found, task.chance, test_size)]
        notes += [f"{name} is at chance level ({task.chance:.1%}): nothing was learned" for name in low]
    return Evaluation(
        remaining=tickets[0].remaining,
        arms=stats,
        verdict=verdict(stats, tickets[0].remaining, tolerance=tolerance, test_size=test_size),
        notes=tuple(notes),
    )


def arm_count(seeds: int, noise: Sequence[float]) -> int:
    """Trainings of an evaluation, if none is left out."""
    return seeds * (2 + len(noise) + len(CONTROLS))


def _arms(
    tickets: Sequence[Ticket], task: Task, how: Train, seeds: Sequence[int], noise: Sequence[float]
) -> tuple[list[tuple[str, Arm]], list[str]]:
    """The arms, each with its kind (a key of `Evaluation.arms`), and notes on those left out."""
    for ticket in tickets:
        _check(ticket, task, how)
    notes = []
    fresh = _why_no_original(tickets[0])
    original = not (fresh and tickets[0].from_checkpoint)
    if fresh:
        instead = "start from a fresh initialization" if original else "are left out"
        notes.append(f"dense and random {instead}: {fresh}")
    reinit = _depends_on_seed(task, tickets[0])
    if not reinit:
        notes.append("reinit is left out: the model's factory gives the same weights whatever the seed")
    arms: list[tuple[str, Arm]] = []

    def add(kind: str, seed: int, start: State, mask: masks.Masks, first: int) -> None:
        replicate = seeds.index(seed)
        arms.append((kind, Arm(f"{kind}, seed {seed}", start, mask, seed, first, tickets[0].about.round, replicate)))

    def add_original(kind: str, ticket: Ticket, seed: int, mask: masks.Masks) -> None:
        if fresh:
            add(kind, seed, task.fresh(seed), mask, 0)
        else:
            add(kind, seed, ticket.init, mask, ticket.about.iteration)

    pairs = list(zip(tickets, seeds, strict=True))
    for ticket, seed in pairs if original else ():
        if ticket.about.iteration and not ticket.from_checkpoint:  # the whole training, as the search's round 0
            add("dense", seed, task.fresh(ticket.first_seed), {}, 0)
        else:
            add_original("dense", ticket, seed, {})
    for ticket, seed in pairs:
        add("ticket", seed, ticket.init, ticket.masks, ticket.about.iteration)
    for level in noise:
        for ticket, seed in pairs:
            add(f"noise={level:g}", seed, noisy(ticket, level, seed), ticket.masks, ticket.about.iteration)
    for ticket, seed in pairs if reinit else ():
        add("reinit", seed, task.fresh(derived_seed(seed, "reinit")), ticket.masks, 0)
    for ticket, seed in pairs if original else ():
        drawn = masks.random_like(ticket.masks, seed=derived_seed(seed, "random"))
        add_original("random", ticket, seed, drawn)
    return arms, notes


def _why_no_original(ticket: Ticket) -> str | None:
    """Why the ticket's initial weights are not those that a dense network would start from; None where they are."""
    if not ticket.complete:
        return "a compact ticket no longer holds the pruned initial weights"
    if ticket.moved:
        return "with learning-rate rewinding a ticket starts from trained weights"
    return None


def _depends_on_seed(task: Task, ticket: Ticket) -> bool:
    one, other = task.fresh(0), task.fresh(1)
    return any(not torch.equal(one[name], other[name]) for name in ticket.masks)


def noisy(ticket: Ticket, level: float, seed: int) -> State:
    """The ticket's initial weights plus Gaussian noise of `level` times sigma (the paper's appendix F.7).

    Only masked parameters are disturbed. The same seed draws the same direction for every level.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "noise"))
    state = dict(ticket.init)
    for name in ticket.masks:
        draw = torch.randn(state[name].shape, generator=generator)
        sigma = ticket.about.sigma.get(name)
        if not isinstance(sigma, (int, float)):
            raise TicketfindError(f"ticket metadata sigma: expected a number for {name}, found {sigma!r}")
        state[name] = state[name] + (level * sigma * draw).to(state[name].dtype)
    return state


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
    ticket: Ticket, task: Task, how: Train, *, tick: Tick = lambda n: None, folder: Path | None = None
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
    _check(ticket, task, how)
    ((_, outcome),) = fit([arm], task, how, tick=tick, folder=folder)
    if isinstance(outcome, Failed):
        raise TicketfindError(f"the ticket failed to train: {outcome.reason}")
    least = 1 / outcome.test_size if outcome.test_size else 1e-6
    n, p = len(claimed.values), min(max(claimed.mean, 0.0), 1.0)
    if claimed.sd:
        width = _T_975[min(n - 1, len(_T_975)) - 1] * claimed.sd * math.sqrt(1 + 1 / n)
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


def _check(ticket: Ticket, task: Task, how: Train) -> None:
    """Raise TicketfindError unless the ticket is of the task's network, and begins before the training's end."""
    ticket.check_fits(task.model)
    iterations = int(how.iterations)
    if not 0 <= ticket.about.iteration < iterations and not how.is_external:
        raise TicketfindError(
            f"ticket metadata iteration: expected 0 to {iterations - 1}, before the training's end,"
            f" found {ticket.about.iteration}"
        )


CONTROLS = ("reinit", "random")


def verdict(arms: dict[str, Stats], remaining: float, *, tolerance: float | None, test_size: int | None) -> str:
    """What the figures say, in words.

    The ticket matches where its mean test accuracy at early stop is at most the tolerance below the dense mean. It
    beats a control where the difference of means exceeds two standard errors of the difference (Welch).
    """
    ticket, dense = arms["ticket"], arms.get("dense")
    share = f"{100 * remaining:.3g} % of the weights"
    if dense is None:
        return "inconclusive: without the dense network there is nothing to match"
    figures = f"{share} reach {_percent(ticket)}, the dense network {_percent(dense)}"
    if not results.is_matching(ticket, dense, results.tolerance(dense, tolerance, test_size)):
        return f"not matching: {figures}"
    if ticket.replicates < 2:
        return (
            f"inconclusive: {figures}, in a single trial;"
            " search with more --replicates, or give the ticket file and --trials"
        )
    missing = [name for name in CONTROLS if name not in arms]
    if missing:
        return f"inconclusive: {figures}; not compared with {' and '.join(missing)}"
    controls = ", ".join(f"{name} {_percent(arms[name])}" for name in CONTROLS)
    beaten = [name for name in CONTROLS if _clearly_above(ticket, arms[name], test_size)]
    if len(beaten) == len(CONTROLS):
        return f"winning: {figures}; the controls stay below ({controls})"
    equal = [
        name
        for name in CONTROLS
        if results.is_matching(arms[name], dense, results.tolerance(dense, tolerance, test_size))
    ]
    if equal:
        verb = "does" if len(equal) == 1 else "do"
        return f"matching but not special: {figures}; so {verb} {' and '.join(equal)} ({controls})"
    unclear = " and ".join(name for name in CONTROLS if name not in beaten)
    return f"inconclusive: {figures}; not clearly above {unclear} ({controls}), which more replicates may settle"


_T_975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % points of Student's t for 1, 2, ... degrees of freedom; from 16 on the last is used."""


def _clearly_above(a: Stats, b: Stats, test_size: int | None) -> bool:
    """Welch's test (Welch 1947) at 2.5 %, one-sided; no spread is taken for smaller than one test example."""
    least = 1 / test_size if test_size else 1e-6
    terms = [(max(s.accuracy_early.sd or 0.0, least) ** 2 / s.replicates, s.replicates - 1) for s in (a, b)]
    variance = sum(term for term, _ in terms)
    freedom = variance**2 / sum(term**2 / degrees for term, degrees in terms)
    quantile = _T_975[min(max(int(freedom), 1), len(_T_975)) - 1]
    return a.accuracy_early.mean - b.accuracy_early.mean > quantile * math.sqrt(variance)


def _percent(stats: Stats) -> str:
    early = stats.accuracy_early
    return f"{100 * early.mean:.2f}" + (f" ± {100 * early.sd:.2f} %" if early.sd is not None else " %")


@dataclass(frozen=True)
class Difference:
    """How much two tickets agree."""

    same_masks: bool
    same_init: bool
    """Every initial weight and buffer equal, bit for bit."""
    tensors: dict[str, masks.Overlap]

    @property
    def total(self) -> masks.Overlap:
        """All tensors as one."""
        return masks.total(self.tensors.values())


def difference(a: Ticket, b: Ticket) -> Difference:
    """Compare two tickets. Raises TicketfindError where they are of different networks."""
    overlaps = masks.compare(a.masks, b.masks)
    tied = {**b.about.aliases, **a.about.aliases}

    def is_same(name: str) -> bool:
        ours, theirs = a.init[name], b.init[name]
        masked = tied.get(name, name)
        if masked in a.masks and not (a.complete and b.complete):  # a compact ticket holds what its mask keeps
            both = a.masks[masked] & b.masks[masked]
            ours, theirs = ours[both], theirs[both]
        return torch.equal(ours, theirs)

    same_init = a.init.keys() == b.init.keys() and all(map(is_same, a.init))
    same_masks = all(torch.equal(a.masks[name], b.masks[name]) for name in a.masks)
    return Difference(same_masks, same_init, overlaps)
