"""Iterative magnitude pruning (arXiv 1803.03635, section 2): train, prune, rewind, again; resumable."""

import json
import math
import platform
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ticketfind import TicketfindError, __version__, masks, prunable, results, rundir
from ticketfind.batches import derived_seed
from ticketfind.devices import Way
from ticketfind.masks import Masks, ScoreFn
from ticketfind.readers import Duration
from ticketfind.recipe import Recipe
from ticketfind.rundir import RunDir
from ticketfind.tensorfile import read_tensors, save_tensors
from ticketfind.ticket import Provenance, Ticket
from ticketfind.train import Arm, Outcome, Point, State, Task, fit, is_disconnected, judge


class Watch(Protocol):
    """Told how a search gets on."""

    def begin(self, total: int, done: int) -> None:
        """Iterations of the whole search over all replicates, and those that an earlier process has done."""

    def tick(self, iterations: int) -> None:
        """Iterations done since the last call."""

    def round(self, finished: results.Round) -> None:
        """A round is finished."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


@dataclass(frozen=True)
class Plan:
    """What a search will do, known before any training."""

    candidates: list[prunable.Candidate]
    groups: list[masks.Group]
    kept: list[int]
    """Weights kept in each round, the dense round 0 first."""
    rewind: int
    """Iteration that survivors go back to; with learning-rate rewinding 0, where the schedule starts over."""
    moves: bool
    """Learning-rate rewinding: each round starts from the last one's trained weights."""
    iterations: list[int]
    """Iterations of each round, of one replicate."""
    measured: int
    """Rounds that are measured, the dense one included: all, but that a one-shot mask from weights that are trained
    already is drawn and no more."""

    memory: int
    """Bytes of weights, gradients, optimizer state and masks of the trainings that run at once."""
    disk: int
    """Bytes of the finished run."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Prunable parameters and their shapes."""
        return {c.name: c.shape for c in self.candidates if c.pruned}


def weights_kept(recipe: Recipe, candidates: list[prunable.Candidate]) -> tuple[list[masks.Group], list[int]]:
    """What is ranked together, and the weights kept in each round, the dense round 0 first."""
    settings = recipe.prune
    prunable.check_globs(settings.fraction, [c.name for c in candidates], "prune.fraction")
    sizes = {c.name: math.prod(c.shape) for c in candidates if c.pruned}
    groups = masks.make_groups(list(sizes), settings.fraction, settings.scope)
    return groups, masks.plan(sizes, groups, settings.rounds, settings.until)


def make_plan(recipe: Recipe, model: nn.Module) -> Plan:
    """The plan of a resolved recipe. Raises TicketfindError where nothing is left to prune."""
    settings = recipe.prune
    candidates = prunable.candidates(model, only=settings.only, skip=settings.skip)
    if not any(c.pruned for c in candidates):
        raise TicketfindError(
            f"model {recipe.model.spec!r}: expected a parameter to prune, found none; ticketfind inspect MODEL says why"
        )
    groups, kept = weights_kept(recipe, candidates)
    if len(kept) < 2:
        raise TicketfindError(
            "prune.fraction: expected to prune a weight in the first round, found that it prunes none"
        )
    moves = settings.rewind == "lr"
    rewind = int(settings.rewind) if isinstance(settings.rewind, Duration) else 0
    total = int(recipe.train.iterations)
    iterations = [total] + [max(1, total - rewind)] * (len(kept) - 1)
    measured = len(kept)
    if recipe.model.trained:
        iterations[0] = 0
        if settings.rounds == 1:
            iterations[1], measured = 0, 1
    parameters, replicates = sum(math.prod(c.shape) for c in candidates), recipe.run.replicates
    at_once = min(recipe.run.arms_at_once or 1, replicates)
    optimizer_slots = 2 if recipe.train.optimizer != "sgd" else int(recipe.train.momentum > 0)
    memory = 4 * at_once * (parameters * (2 + optimizer_slots) + kept[0])
    starts = replicates * (len(kept) if moves else 1)
    disk = 4 * parameters * (starts + 1) + kept[0] * (replicates * (len(kept) - 1) + 1)
    if recipe.train.command is not None:  # what it writes is kept, see commands.by_command
        disk += 4 * parameters * replicates * (measured + (rewind > 0))
    return Plan(candidates, groups, kept, rewind, moves, iterations, measured, memory, disk)


def search(recipe: Recipe, task: Task, run: RunDir, plan: Plan, score: ScoreFn, watch: Watch) -> list[results.Round]:
    """Run (or go on with) the search of a resolved recipe in `run`; its finished rounds.

    Each (round, replicate) is on disk before the next begins; the winner's ticket is written at the end.
    """
    with rundir.sole_writer(run):
        is_new = rundir.begin(run, recipe)
        try:
            return _Job(recipe, task, run, plan, score, watch).rounds()
        except TicketfindError:
            if is_new:
                rundir.forget_unstarted(run)
            raise


@dataclass(frozen=True)
class _Job:
    """A search under way: what all its steps need."""

    recipe: Recipe
    task: Task
    run: RunDir
    plan: Plan
    score: ScoreFn
    watch: Watch

    def rounds(self) -> list[results.Round]:
        recipe, plan, run = self.recipe, self.plan, self.run
        logged = {(line["round"], line["replicate"]) for line in run.log()}
        replicates, in_step = range(recipe.run.replicates), Way.of(recipe.run).in_step
        groups = [replicates[first : first + in_step] for first in replicates[::in_step]]
        left = {  # all of those that are trained together, or none: their numbers may depend on it, by rounding
            round: [r for group in groups if any((round, r) not in logged for r in group) for r in group]
            for round in range(plan.measured)
        }
        total = sum(plan.iterations) * len(replicates)
        self.watch.begin(total, total - sum(plan.iterations[round] * len(todo) for round, todo in left.items()))
        for round, todo in left.items():
            arms = [self.arm(round, replicate) for replicate in todo]
            with closing(self.train(round, arms)) as trained:
                for replicate, (arm, outcome) in zip(todo, trained, strict=True):
                    if (round, replicate) not in logged:
                        self.finish(round, replicate, arm, outcome)
            rundir.make_latest(run)
            self.watch.round(finished_rounds(run, recipe)[round])
        rounds = finished_rounds(run, recipe)
        winner = results.winner_of(rounds)
        if winner is not None:
            load(run, winner.round, winner.best_replicate).save(run.ticket_file)
        elif plan.measured < len(plan.kept):
            load(run, plan.measured, 0).save(run.ticket_file)
        run.finish()
        return rounds

    def train(self, round: int, arms: list[Arm]) -> Generator[tuple[Arm, Outcome], None, None]:
        """The arms of a round, each with its outcome; weights that are trained already stand for round 0."""
        how = self.recipe.train
        if round == 0 and self.task.trained:
            return judge(arms, self.task, how)
        return fit(
            arms,
            self.task,
            how,
            way=Way.of(self.recipe.run),
            keep_at=self.plan.rewind if round == 0 else None,
            tick=self.watch.tick,
            note=self.watch.note,
            folder=self.run.arms_folder,
        )

    def arm(self, round: int, replicate: int) -> Arm:
        """Train from initialization in round 0, then from the rewind point under the mask drawn before."""
        name, seed = f"round {round}, replicate {replicate}", self.recipe.run.seed + replicate
        if round == 0:
            return Arm(name, self.task.start(seed), {}, seed, replicate=replicate)
        start, _ = read_tensors(self.start_file(round, replicate), "rewind point")
        mask, _ = read_tensors(self.run.mask_file(round, replicate), "mask")
        emptied = ", ".join(parameter for parameter, kept in mask.items() if not bool(kept.any()))
        if emptied:
            self.watch.note(f"{name}: no weight is left in {emptied}")
            if not self.recipe.prune.allow_collapse and is_disconnected(self.task, start, mask):
                raise TicketfindError(
                    f"{name}: no weight is left in {emptied}, and the output no longer depends on the input;"
                    " use scope layer or fewer rounds, or start anew with --set prune.allow_collapse=true"
                )
        if lost := prunable.without_direction(mask, start):
            raise TicketfindError(
                f"{name}: a whole row of {', '.join(lost)} is pruned, whose length weight_norm divides by;"
                " --skip it, prune it less (--prune '*=0.2' --prune GLOB=0.05), or take fewer rounds"
            )
        return Arm(name, start, mask, seed, self.plan.rewind, round, replicate)

    def finish(self, round: int, replicate: int, arm: Arm, outcome: Outcome) -> None:
        """Draw the next round's mask, and put everything about this training on disk; the log line last."""
        plan, old = self.plan, arm.masks or masks.dense(self.plan.shapes)
        revived = masks.nonzero_outside(old, outcome.final)
        assert not revived, f"{arm.name}: pruned weights are not zero in {revived}"
        start = arm.start
        if round == 0:
            if not plan.moves:
                assert outcome.kept is not None
                start = outcome.kept
            about = {"ticketfind": json.dumps(_about_start(arm.start, plan, self.task))}
            save_tensors(self.start_file(0, replicate), start, about)
        if round + 1 < len(plan.kept):
            initial = read_tensors(self.start_file(0, replicate), "rewind point")[0] if plan.moves else start
            new = self.prune(round, replicate, old, outcome.final, initial)
            assert masks.nested(new, old), f"{arm.name}: a pruned weight has come back"
            assert masks.count(new) == plan.kept[round + 1], f"{arm.name}: {masks.count(new)} weights kept"
            if plan.moves:
                _, about = read_tensors(self.start_file(0, replicate), "rewind point")
                save_tensors(self.start_file(round + 1, replicate), outcome.final, about)
            save_tensors(self.run.mask_file(round + 1, replicate), new)
        self.run.append(_log_line(round, replicate, old, outcome))

    def prune(self, round: int, replicate: int, old: Masks, final: State, initial: State) -> Masks:
        """Score on the training device, keep the highest."""
        device = self.task.device
        trained = {name: final[name].to(device) for name in self.plan.shapes}
        before = {name: initial[name].to(device) for name in self.plan.shapes}
        seed = derived_seed(self.recipe.run.seed + replicate, "score", round)
        scores = masks.score(self.score, trained, before, seed=seed)
        drawn = masks.prune({name: mask.to(device) for name, mask in old.items()}, scores, self.plan.groups)
        return {name: mask.cpu() for name, mask in drawn.items()}

    def start_file(self, round: int, replicate: int) -> Path:
        """Where the weights that a round starts from are kept."""
        return self.run.start_file(replicate, round if self.plan.moves else None)


def _about_start(initial: State, plan: Plan, task: Task) -> dict[str, Any]:
    sigma = {name: float(initial[name].double().std(correction=0)) for name in plan.shapes}
    return {
        "iteration": plan.rewind,
        "sigma": sigma,
        "aliases": prunable.aliases(task.model),
        "checkpoint_dtype": task.given_dtype,
    }


def _log_line(round: int, replicate: int, mask: Masks, outcome: Outcome) -> dict[str, Any]:
    points = [asdict(point) for point in outcome.points]
    return {
        "round": round,
        "replicate": replicate,
        "kept": masks.count(mask),
        "remaining": masks.remaining(mask),
        **asdict(outcome.measured),
        "test_size": outcome.test_size,
        "kept_per_tensor": {name: int(m.sum()) for name, m in mask.items()},
        "curve": {key: [point[key] for point in points] for key in Point.__dataclass_fields__},
    }


# ------------------------------------------------------------------------------------- what a run holds


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
    if not 0 <= replicate < recipe.run.replicates:
        raise TicketfindError(f"{run.path}: replicate: expected 0 to {recipe.run.replicates - 1}, found {replicate}")
    mask, _ = read_tensors(run.mask_file(round, replicate), "mask")
    start, metadata = read_tensors(
        run.start_file(replicate, round if recipe.prune.rewind == "lr" else None), "rewind point"
    )
    about = Provenance(
        recipe=recipe.plain(),
        round=round,
        replicate=replicate,
        claims={name: rounds[n].stats.json() for name, n in (("dense", 0), ("ticket", round)) if n < len(rounds)},
        versions={"ticketfind": __version__, "torch": torch.__version__, "python": platform.python_version()},
        **json.loads(metadata["ticketfind"]),
    )
    return Ticket(mask, start, about)


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
        return Choice(untested, 0)
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
    return [load(run, number, replicate) for replicate in range(run.recipe().run.replicates)]
