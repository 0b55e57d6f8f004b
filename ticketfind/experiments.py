"""One function per question asked of a ticket; each returns a plain dataclass."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ticketfind import TicketfindError, attack, masks, results, transfer
from ticketfind.arms import Arm, Outcome, State, Task
from ticketfind.attack import Attack, Attacked
from ticketfind.batches import derived_seed
from ticketfind.course import Failed
from ticketfind.devices import EAGER, Way
from ticketfind.forks import Tick
from ticketfind.recipe import Run, Train
from ticketfind.results import Measured, Stats
from ticketfind.ticket import Ticket
from ticketfind.train import check_memory, fit, judge
from ticketfind.verdict import CONTROLS, Verdict, verdict

EXTRAS = ("one-shot", "init-magnitude")
"""Controls that are trained where they are asked for: pruned once to the ticket's density, by the magnitude of the
dense network's trained weights (the paper's figure 4) or of its weights at iteration 0 (its appendix F.4)."""
TRAININGS = 10
"""Trainings of an arm, where nothing else is asked for. With five replicates, two each, bare `search` and `eval` on
digits end in a verdict (docs/evidence.md)."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """What an evaluation trains."""

    tickets: Sequence[Ticket]
    """One for each replicate of a run, or a single one, of which each trial then counts as a replicate."""
    trials: int
    """Trainings of each ticket, and of everything beside it, with different data orders."""
    noise: Sequence[float] = ()
    """Levels s: each initial weight gets Gaussian noise of standard deviation s * sigma, sigma that of its layer's
    initialization (the paper's appendix F.7), and is trained; of the ticket and of the dense network."""
    weight_noise: Sequence[float] = ()
    """The same noise on the trained weights, which are then measured as they are."""
    extras: Sequence[str] = ()
    """Of EXTRAS."""
    trained: Sequence[State] = ()
    """For one-shot: the dense network's trained weights of each ticket's replicate."""
    attacks: Sequence[Attack] = ()
    """What test inputs are changed by, to mislead the networks after their training."""
    attack_examples: int = 1000
    """Test examples that are attacked, at most."""
    against: Sequence[Ticket] = ()
    """Other tickets for the same network, which are trained beside these: a single one, or one for each replicate."""

    @property
    def trainings(self) -> int:
        """Trainings, if none is left out."""
        kinds = 2 * (1 + len(self.noise)) + len(CONTROLS) + len(self.extras) + bool(self.against)
        return len(self.tickets) * self.trials * kinds

    def replicate(self, trial: int, *, against: bool = False) -> int:
        """Which replicate's mean a trial, counted over all tickets, goes into; of those to compare with the like."""
        tickets = self.against if against and len(self.against) > 1 else self.tickets
        return trial % len(tickets) if len(tickets) > 1 else trial


def default_trials(tickets: int, is_run: bool) -> int:
    """Trainings of each ticket where nothing else is asked for. A run with one replicate cannot give a verdict: one."""
    return 1 if is_run and tickets == 1 else math.ceil(TRAININGS / tickets)


def unseen_seed(run: Run) -> int:
    """The seed of the first trial where none is asked for: behind those of the search, so that no data order is one
    that the choice of the round has seen."""
    return run.seed + run.replicates


@dataclass(frozen=True)
class Evaluation:
    """A ticket beside the dense network, its noisy twins and its controls, all trained alike."""

    remaining: float
    """Weights remaining, a fraction."""
    against: float | None
    """Those of the tickets of `Design.against`; None without any."""
    arms: dict[str, Stats]
    """dense, ticket, against, noise=S, dense noise=S, reinit, random, one-shot, init-magnitude, weight-noise=S, dense
    weight-noise=S, as far as they could be trained. A replicate's value is the mean over its trials."""
    trials: int
    """Trainings of each replicate."""
    seed: int
    """Of the first trial; the others follow."""
    verdict: Verdict
    notes: tuple[str, ...]
    """What was left out, and why."""
    attacks: dict[str, Attacked] = field(default_factory=dict)
    """By the attack's name, without one ("clean") first; with the weights at the end of each training."""
    attack_examples: int | None = None
    """Test examples that were attacked; None without an attack."""
    attack_range: tuple[float, float] | None = None
    """The lowest and the highest of their inputs."""


@dataclass(frozen=True)
class _Case:
    """One ticket in one trial."""

    ticket: Ticket
    seed: int
    """Of the data order and of all that is drawn."""
    replicate: int
    """Which replicate's mean its figures go into."""
    trained: State | None


def evaluate(
    design: Design,
    task: Task,
    how: Train,
    *,
    first_seed: int,
    way: Way = EAGER,
    groups: Sequence[masks.Group] = (),
    tolerance: float | None = None,
    begin: Callable[[int], None] = lambda n: None,
    tick: Tick = lambda n: None,
    skip: Tick = lambda n: None,
    folder: Path | None = None,
) -> Evaluation:
    """Train the tickets, the dense network, noisy twins and controls, in one `fit`; compare.

    first_seed: of the first trial; the others follow. groups: what is ranked together, for masks drawn anew.
    begin: told of all iterations, those that attacks are counted as included, before the first. tick, skip, folder: as
    `train.fit` has them. Raises TicketfindError where the ticket does not fit the task's model.
    """
    design, new, notes = _onto(design, task)
    for ticket in design.tickets:
        check(ticket, task, how)
    try:
        for ticket in design.against:
            check(ticket, task, how)
    except TicketfindError as error:
        raise TicketfindError(f"against: {error}") from None
    of = len(design.tickets)
    arms, left_out = _arms(design, new, first_seed, task, groups)
    notes += left_out
    check_memory(task, how, way, len(arms))
    under_attack = None
    if design.attacks:
        under_attack = attack.prepare(
            task, design.attacks, design.attack_examples, batch_size=how.batch_size, note=notes.append, tick=tick
        )
    attacking = under_attack.iterations if under_attack else 0
    begin(sum(max(1, int(how.iterations) - arm.first) + attacking for _, arm, _ in arms))
    robust: dict[str, dict[str, dict[int, list[float]]]] = {}
    measured: dict[str, dict[int, list[Measured]]] = {}
    test_size, lost = None, 0
    if design.weight_noise and task.data is None:
        notes.append("weight noise is left out: only the program that trains can measure")
    trainings = fit(
        [arm for _, arm, _ in arms], task, how, way=way, tick=tick, skip=skip, note=notes.append, folder=folder
    )
    with closing(trainings) as outcomes:
        for (kind, _, case), (arm, outcome) in zip(arms, outcomes, strict=True):
            if isinstance(outcome, Failed):
                skip(attacking)
                notes.append(f"{arm.name}: {outcome.reason}; it is left out")
                lost += kind == "ticket"
                continue
            measured.setdefault(kind, {}).setdefault(case.replicate, []).append(outcome.measured)
            test_size = outcome.test_size
            for name, accuracy in under_attack.measure(outcome.final).items() if under_attack else ():
                robust.setdefault(name, {}).setdefault(kind, {}).setdefault(case.replicate, []).append(accuracy)
            if kind in ("ticket", "dense") and task.data is not None:
                for level, found in _shaken(design, case, arm, outcome.final, task, how, way):
                    name = f"weight-noise={level:g}" if kind == "ticket" else f"dense weight-noise={level:g}"
                    if isinstance(found, Failed):
                        notes.append(f"{name}, seed {case.seed}: its numbers are not finite; it is left out")
                        continue
                    measured.setdefault(name, {}).setdefault(case.replicate, []).append(found.measured)
            for file in folder.rglob("*.safetensors") if folder else ():
                file.unlink()  # a program's weights, which have been read: those of all arms may fill a disk
    stats = {
        name: Stats.of([results.average(trials) for _, trials in sorted(found.items())])
        for name, found in measured.items()
    }
    if "ticket" not in stats:
        raise TicketfindError(f"every training of the ticket failed; the last: {notes[-1]}")
    if task.chance is not None and how.metric is None:
        low = [name for name, found in stats.items() if results.is_chance(found, task.chance, test_size)]
        notes += [f"{name} is at chance level ({task.chance:.1%}): nothing was learned" for name in low]
    remaining = design.tickets[0].remaining
    return Evaluation(
        remaining=remaining,
        against=design.against[0].remaining if design.against else None,
        arms=stats,
        trials=design.trials if of > 1 else 1,
        seed=first_seed,
        verdict=verdict(stats, remaining, tolerance=tolerance, test_size=test_size, lost=lost),
        notes=tuple(notes),
        attacks={name: Attacked.of(by_arm, under_attack.examples) for name, by_arm in robust.items() if under_attack},
        attack_examples=under_attack.examples if under_attack else None,
        attack_range=under_attack.inputs if under_attack else None,
    )


def _shaken(
    design: Design, case: _Case, arm: Arm, final: State, task: Task, how: Train, way: Way
) -> Iterator[tuple[float, Outcome | Failed]]:
    """Trained weights with noise on those that the mask keeps, measured."""
    for level in design.weight_noise:
        state = masks.masked(noisy(case.ticket, level, case.seed, final), arm.masks)
        ((_, outcome),) = judge([(arm, state)], task, how, precision=way.precision)
        yield level, outcome


def _onto(design: Design, task: Task) -> tuple[Design, list[str], list[str]]:
    """The design in the task's network, the entries of a head that is new there, and notes on them."""
    wanted = {name: value for name, value in task.model.state_dict().items() if isinstance(value, Tensor)}
    modules = task.model.named_modules(remove_duplicate=False)
    tables = {f"{name}.weight" for name, module in modules if isinstance(module, nn.Embedding | nn.EmbeddingBag)}

    def head(ticket: Ticket) -> list[str]:
        found = transfer.head(ticket.init, wanted)
        return [] if tables & {*found} else found  # one row for each input, and not for each class

    def onto(ticket: Ticket) -> Ticket:
        return transfer.onto(ticket, task.fresh(ticket.first_seed)) if head(ticket) else ticket

    new = head(design.tickets[0])
    notes = []
    if new:
        notes.append(f"these data have other classes: {', '.join(new)} start afresh and keep all their weights")
    elif of_others := head(design.against[0]) if design.against else []:
        notes.append(f"against: found on other classes; {', '.join(of_others)} start afresh and keep all their weights")
    moved = dataclasses.replace(
        design,
        tickets=[onto(ticket) for ticket in design.tickets],
        against=[onto(ticket) for ticket in design.against],
        trained=() if new else design.trained,
    )
    return moved, new, notes


def _arms(
    design: Design, new: Sequence[str], first_seed: int, task: Task, groups: Sequence[masks.Group]
) -> tuple[list[tuple[str, Arm, _Case]], list[str]]:
    """The arms, each with its kind (a key of `Evaluation.arms`) and its case, and notes on those left out."""
    trials = range(len(design.tickets) * design.trials)
    named = [(group, tuple(name for name in group.names if name not in new)) for group in groups]
    groups = [dataclasses.replace(group, names=names) for group, names in named if names]  # a new head stays whole

    def case_of(
        trial: int, tickets: Sequence[Ticket], trained: Sequence[State] = (), *, against: bool = False
    ) -> _Case:
        which = trial % len(tickets)
        replicate = design.replicate(trial, against=against)
        return _Case(tickets[which], first_seed + trial, replicate, trained[which] if trained else None)

    cases = [case_of(trial, design.tickets, design.trained) for trial in trials]
    others = [case_of(trial, design.against, against=True) for trial in trials if design.against]
    notes = []
    fresh = _why_no_original(design.tickets[0])
    original = not (fresh and design.tickets[0].from_checkpoint)
    if fresh:
        instead = "start from a fresh initialization" if original else "are left out"
        notes.append(f"dense and random {instead}: {fresh}")
    reinit = _depends_on_seed(task, design.tickets[0])
    if not reinit:
        notes.append("reinit is left out: the model's factory gives the same weights whatever the seed")
    arms: list[tuple[str, Arm, _Case]] = []

    def add(kind: str, case: _Case, start: State, mask: masks.Masks, first: int) -> None:
        about = case.ticket.about
        name = f"{kind}, seed {case.seed}"
        arms.append((kind, Arm(name, start, mask, case.seed, first, about.round, case.replicate), case))

    def dense(case: _Case) -> tuple[State, int]:
        """Where the dense network starts."""
        ticket = case.ticket
        if fresh:
            return task.fresh(case.seed), 0
        if ticket.about.iteration and not ticket.from_checkpoint:  # the whole training, as the search's round 0
            return task.fresh(ticket.first_seed), 0
        return ticket.init, ticket.about.iteration

    def original_weights(case: _Case) -> tuple[State, int]:
        return (task.fresh(case.seed), 0) if fresh else (case.ticket.init, case.ticket.about.iteration)

    for case in cases if original else ():
        start, first = dense(case)
        add("dense", case, start, {}, first)
    for case in cases:
        add("ticket", case, case.ticket.init, case.ticket.masks, case.ticket.about.iteration)
    for case in others:
        add("against", case, case.ticket.init, case.ticket.masks, case.ticket.about.iteration)
    for level in design.noise:
        for case in cases:
            start = noisy(case.ticket, level, case.seed, case.ticket.init)
            add(f"noise={level:g}", case, start, case.ticket.masks, case.ticket.about.iteration)
        for case in cases if original else ():
            start, first = dense(case)
            add(f"dense noise={level:g}", case, noisy(case.ticket, level, case.seed, start), {}, first)
    for case in cases if reinit else ():
        add("reinit", case, task.fresh(derived_seed(case.seed, "reinit")), case.ticket.masks, 0)
    for case in cases if original else ():
        start, first = original_weights(case)
        drawn = masks.random_like(case.ticket.masks, seed=derived_seed(case.seed, "random"), groups=groups)
        add("random", case, start, drawn, first)
    for kind in design.extras:
        for case in cases if original and not fresh else ():
            weights = _ranked_by(kind, case, task)
            if weights is not None:
                start, first = original_weights(case)
                add(kind, case, start, masks.magnitude_like(case.ticket.masks, weights, groups), first)
        if all(found != kind for found, _, _ in arms):
            where = "for other classes" if new else "in a run, not in a ticket file"
            why = fresh or f"the dense network's trained weights are {where}"
            notes.append(f"{kind} is left out: {why}")
    return arms, notes


def _ranked_by(kind: str, case: _Case, task: Task) -> State | None:
    """The weights whose magnitude a control's mask is drawn by."""
    if kind == "one-shot":
        return case.trained
    ticket = case.ticket
    return ticket.init if ticket.about.iteration == 0 or ticket.from_checkpoint else task.fresh(ticket.first_seed)


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


def noisy(ticket: Ticket, level: float, seed: int, weights: State) -> State:
    """`weights` plus Gaussian noise of `level` times sigma on the ticket's prunable ones (the paper's appendix F.7).

    sigma: the standard deviation of that layer's initialization. The same seed draws the same direction for every
    level.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "noise"))
    state = dict(weights)
    for name in ticket.masks:
        draw = torch.randn(state[name].shape, generator=generator)
        sigma = ticket.about.sigma.get(name)
        if not isinstance(sigma, (int, float)):
            raise TicketfindError(f"ticket metadata sigma: expected a number for {name}, found {sigma!r}")
        state[name] = state[name] + (level * sigma * draw).to(state[name].dtype)
    return state


def check(ticket: Ticket, task: Task, how: Train) -> None:
    """Raise TicketfindError unless the ticket is of the task's network, and begins before the training's end."""
    ticket.check_fits(task.model)
    iterations = int(how.iterations)
    if not 0 <= ticket.about.iteration < iterations and not how.is_external:
        raise TicketfindError(
            f"ticket metadata iteration: expected 0 to {iterations - 1}, before the training's end,"
            f" found {ticket.about.iteration}"
        )
