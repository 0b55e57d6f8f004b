"""Iterative magnitude pruning (arXiv 1803.03635, section 2): train, prune, rewind, again; resumable."""

import dataclasses
import json
import math
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ticketfind import TicketfindError, contents, invariants, masks, prunable, readers, results, rundir
from ticketfind.batches import derived_seed
from ticketfind.connection import is_disconnected
from ticketfind.course import Failed, Point
from ticketfind.devices import Way
from ticketfind.masks import Masks, ScoreFn
from ticketfind.readers import Duration
from ticketfind.recipe import Recipe
from ticketfind.rundir import RunDir
from ticketfind.snapshots import Snapshots
from ticketfind.tensorfile import read_tensors, save_tensors
from ticketfind.train import Arm, Outcome, State, Task, check_memory, fit, judge


class Watch(Protocol):
    """Told how a search gets on."""

    def begin(self, total: int, done: int) -> None:
        """Iterations of the whole search over all replicates, and those that an earlier process has done."""

    def tick(self, iterations: int) -> None:
        """Iterations done since the last call."""

    def skip(self, iterations: int) -> None:
        """Iterations that will not be done."""

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


def candidates(recipe: Recipe, model: nn.Module) -> list[prunable.Candidate]:
    """Every parameter, and whether the recipe prunes it and why."""
    settings = recipe.prune
    _, block = readers.pattern(settings.scope) or (1, None)
    return prunable.candidates(model, only=settings.only, skip=settings.skip, block=block)


def weights_kept(recipe: Recipe, candidates: list[prunable.Candidate]) -> tuple[list[masks.Group], list[int]]:
    """What is ranked together, and the weights kept in each round, the dense round 0 first."""
    settings = recipe.prune
    prunable.check_globs(settings.fraction, [c.name for c in candidates], "prune.fraction")
    sizes = {c.name: math.prod(c.shape) for c in candidates if c.pruned}
    groups = masks.make_groups(list(sizes), settings.fraction, settings.scope, settings.rounds)
    return groups, masks.plan(sizes, groups, settings.rounds, settings.until)


def make_plan(recipe: Recipe, model: nn.Module) -> Plan:
    """The plan of a resolved recipe. Raises TicketfindError where nothing is left to prune."""
    settings = recipe.prune
    found = candidates(recipe, model)
    if not any(c.pruned for c in found):
        raise TicketfindError(
            f"model {recipe.model.spec!r}: expected a parameter to prune, found none; ticketfind inspect MODEL says why"
        )
    groups, kept = weights_kept(recipe, found)
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
    parameters, replicates = sum(math.prod(c.shape) for c in found), recipe.run.replicates
    at_once = min(recipe.run.arms_at_once or 1, replicates)
    optimizer_slots = 2 if recipe.train.optimizer != "sgd" else int(recipe.train.momentum > 0)
    memory = 4 * at_once * (parameters * (2 + optimizer_slots) + kept[0])
    starts = replicates * (len(kept) if moves else 1)
    disk = 4 * parameters * (starts + replicates + 1) + kept[0] * (replicates * (len(kept) - 1) + 1)
    if recipe.train.command is not None:  # what it writes is kept, see commands.by_command
        disk += 4 * parameters * replicates * (measured + (rewind > 0))
    return Plan(found, groups, kept, rewind, moves, iterations, measured, memory, disk)


def search(recipe: Recipe, task: Task, run: RunDir, plan: Plan, score: ScoreFn, watch: Watch) -> list[results.Round]:
    """Run (or go on with) the search of a resolved recipe in `run`; its finished rounds.

    Each (round, replicate) is on disk before the next begins; the winner's ticket is written at the end.
    """
    check_memory(task, recipe.train, Way.of(recipe.run), recipe.run.replicates)
    with rundir.sole_writer(run):
        is_new = rundir.begin(run, recipe)
        snapshots = Snapshots(run.state_folder, recipe.run.snapshot, run.check)
        try:
            return _Job(recipe, task, run, plan, score, watch, snapshots).rounds()
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
    snapshots: Snapshots

    def rounds(self) -> list[results.Round]:
        plan, run = self.plan, self.run
        log = run.log()
        over, failed = {(line["round"], line["replicate"]) for line in log}, {}
        for line in log:
            if "failed" in line:
                failed[line["replicate"]] = line["round"]
        self.watch.begin(*self.iterations(over, failed))
        for round in range(plan.measured):
            alive = [r for r in range(self.recipe.run.replicates) if failed.get(r, round) >= round]
            todo = self.todo(alive, {r for r in alive if (round, r) in over})
            arms = [self.arm(round, replicate) for replicate in todo]
            with closing(self.train(round, arms)) as trained:
                for replicate, (arm, outcome) in zip(todo, trained, strict=True):
                    if (round, replicate) not in over:
                        if isinstance(outcome, Failed):
                            failed[replicate] = round
                        self.finish(round, replicate, arm, outcome)
            self.snapshots.clear(round)
            finished = contents.finished_rounds(run, self.recipe)[round:]
            if not finished:
                self.none_left(round)
                break
            rundir.make_latest(run)
            self.watch.round(finished[0])
            self.look_at(finished[0])
        return self.end()

    def todo(self, alive: Sequence[int], over: set[int]) -> list[int]:
        """Replicates to train. Of those that are trained in step all, or none: their numbers may depend on it."""
        in_step = Way.of(self.recipe.run).in_step
        groups = [alive[first : first + in_step] for first in range(0, len(alive), in_step)]
        return [r for group in groups if not over.issuperset(group) for r in group]

    def iterations(self, over: Set[tuple[int, int]], failed: Mapping[int, int]) -> tuple[int, int]:
        """Those of the whole search, as far as is known, and those done."""
        total = done = 0
        for round, count in enumerate(self.plan.iterations):
            alive = [r for r in range(self.recipe.run.replicates) if failed.get(r, round) >= round]
            total += count * len(alive)
            if round < self.plan.measured:
                todo = self.todo(alive, {r for r in alive if (round, r) in over})
                done += count * (len(alive) - len(todo)) + self.snapshots.done(round, todo)
        return total, done

    def end(self) -> list[results.Round]:
        """Write the winner, or the one ticket that is drawn and not trained; the finished rounds."""
        plan, run = self.plan, self.run
        run.check()
        rounds = contents.finished_rounds(run, self.recipe)
        winner = results.winner_of(rounds)
        if winner is not None:
            contents.load(run, winner.round, winner.best_replicate).save(run.ticket_file)
        elif plan.measured < len(plan.kept):
            contents.load(run, plan.measured, rounds[0].replicates[0]).save(run.ticket_file)
        run.finish()
        return rounds

    def none_left(self, round: int) -> None:
        """Every replicate has failed. Raises TicketfindError where there is no round before."""
        reason = self.run.log()[-1]["failed"]
        if round == 0:
            raise TicketfindError(f"every replicate failed; the last: {reason}")
        self.watch.note(f"no replicate is left after round {round}: the search ends with the rounds before it")

    def look_at(self, finished: results.Round) -> None:
        """Point out an accuracy that any constant answer has; once, and for the dense network."""
        chance = self.task.chance if self.recipe.train.metric is None else None
        if chance is None or self.task.data is None:
            return
        size = len(self.task.data.test)
        before = contents.finished_rounds(self.run, self.recipe)[max(0, finished.round - 1)]
        is_first = finished.round == 0 or not results.is_chance(before.stats, chance, size)
        if is_first and results.is_chance(finished.stats, chance, size):
            what = "the dense network has learned nothing" if finished.round == 0 else "nothing is learned any more"
            self.watch.note(
                f"round {finished.round}: an accuracy of {finished.stats.accuracy_early.mean:.1%} is at chance level"
                f" (always giving the most frequent label has {chance:.1%}): {what}"
            )

    def train(self, round: int, arms: list[Arm]) -> Generator[tuple[Arm, Outcome | Failed], None, None]:
        """The arms of a round, each with its outcome; weights that are trained already stand for round 0."""
        how = self.recipe.train
        if round == 0 and self.task.trained:
            named = (dataclasses.replace(arm, name=f"{arm.name}, from model.trained") for arm in arms)
            return judge(((arm, {**arm.start, **self.task.trained}) for arm in named), self.task, how)
        return fit(
            arms,
            self.task,
            how,
            way=Way.of(self.recipe.run),
            keep_at=self.plan.rewind if round == 0 else None,
            tick=self.watch.tick,
            note=self.watch.note,
            folder=self.run.arms_folder,
            snapshots=self.snapshots,
        )

    def arm(self, round: int, replicate: int) -> Arm:
        """Train from initialization in round 0, then from the rewind point under the mask drawn before."""
        name, seed = f"round {round}, replicate {replicate}", self.recipe.run.seed + replicate
        if round == 0:
            return Arm(name, self.task.start(seed), {}, seed, replicate=replicate)
        self.run.check()
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

    def finish(self, round: int, replicate: int, arm: Arm, outcome: Outcome | Failed) -> None:
        """Draw the next round's mask, and put everything about this training on disk; the log line last."""
        self.run.check()
        if isinstance(outcome, Failed):
            self.watch.note(f"{arm.name}: {outcome.reason}; it ends here, and the other replicates go on")
            self.watch.skip(sum(self.plan.iterations[round + 1 :]))
            self.run.append({"round": round, "replicate": replicate, "failed": f"{arm.name}: {outcome.reason}"})
            return
        plan, old = self.plan, arm.masks or masks.dense(self.plan.shapes)
        self.hold(arm, outcome, invariants.of_training(outcome.final, old))
        start = arm.start
        if round == 0:
            if not plan.moves:
                assert outcome.kept is not None
                start = outcome.kept
            about = {"ticketfind": json.dumps(_about_start(arm.start, plan, self.task))}
            save_tensors(self.start_file(0, replicate), start, about)
            save_tensors(self.run.trained_file(replicate), outcome.final)
        if round + 1 < len(plan.kept):
            initial = read_tensors(self.start_file(0, replicate), "rewind point")[0] if plan.moves else start
            new = self.prune(round, replicate, old, outcome.final, initial)
            self.hold(arm, outcome, invariants.of_pruning(new, old, plan.kept[round + 1], plan.groups, round + 1))
            if plan.moves:
                _, about = read_tensors(self.start_file(0, replicate), "rewind point")
                save_tensors(self.start_file(round + 1, replicate), outcome.final, about)
            save_tensors(self.run.mask_file(round + 1, replicate), new)
        self.run.append(_log_line(round, replicate, old, outcome))

    def hold(self, arm: Arm, outcome: Outcome, faults: list[str]) -> None:
        """Raise Violated where there are faults, once what there is has been saved."""
        if not faults:
            return
        file = self.run.violated_file(arm.round, arm.replicate)
        parts = {"start": arm.start, "mask": arm.masks, "final": outcome.final}
        save_tensors(file, {f"{part}/{name}": t for part, state in parts.items() for name, t in state.items()})
        raise invariants.Violated.of(arm.name, [*faults[:3], f"its weights and masks are in {file}"])

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
        "began": outcome.began,
        **asdict(outcome.measured),
        "test_size": outcome.test_size,
        "kept_per_tensor": {name: int(m.sum()) for name, m in mask.items()},
        "curve": {key: [point[key] for point in points] for key in Point.__dataclass_fields__},
    }
