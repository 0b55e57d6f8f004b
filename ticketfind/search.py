"""Iterative magnitude pruning (arXiv 1803.03635, section 2): train, prune, rewind, again; resumable."""

import dataclasses
import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ticketfind import TicketfindError, contents, invariants, masks, prunable, results, rundir
from ticketfind.arms import Arm, Outcome, State, Task
from ticketfind.connection import is_disconnected
from ticketfind.course import Failed, Point
from ticketfind.devices import Way
from ticketfind.drawing import Drawing
from ticketfind.masks import Masks
from ticketfind.plan import Plan
from ticketfind.recipe import Recipe
from ticketfind.rundir import RunDir
from ticketfind.scores import Score
from ticketfind.snapshots import Snapshots
from ticketfind.standing import Standing
from ticketfind.tensorfile import read_metadata, read_tensors, save_tensors
from ticketfind.train import check_memory, fit, judge


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


def search(recipe: Recipe, task: Task, run: RunDir, plan: Plan, score: Score, watch: Watch) -> list[results.Round]:
    """Run (or go on with) the search of a resolved recipe in `run`; its finished rounds.

    Each (round, replicate) is on disk before the next begins; the winner's ticket is written at the end.
    """
    check_memory(task, recipe.train, Way.of(recipe.run), recipe.run.replicates)
    with rundir.sole_writer(run):
        is_new = rundir.begin(run, recipe)
        snapshots = Snapshots(run.state_folder, recipe.run.snapshot, run.check)
        drawing = Drawing(score, task, recipe.train, plan.groups, plan.shapes)
        try:
            return _Job(recipe, task, run, plan, drawing, watch, snapshots).rounds()
        except Exception as error:
            run.check()  # a directory that has gone is the better reason, whatever it has led to
            if is_new and isinstance(error, TicketfindError):
                rundir.forget_unstarted(run)
            raise


@dataclass(frozen=True)
class _Job:
    """A search under way: what all its steps need."""

    recipe: Recipe
    task: Task
    run: RunDir
    plan: Plan
    drawing: Drawing
    watch: Watch
    snapshots: Snapshots

    def rounds(self) -> list[results.Round]:
        self.watch.begin(*self.iterations())
        ended = False
        for round in self.order():
            self.measure(round)
            if not self.standing().left(round):
                if not ended:
                    self.none_left(round)
                ended = True
                continue
            finished = self.measured(round)
            rundir.make_latest(self.run)
            self.watch.round(finished)
            self.look_at(finished)
        return self.end()

    def order(self) -> Iterator[int]:
        """The rounds in the order in which they are measured: first those that draw masks, as far as they are needed,
        then the others, all of them or those in between a round that matches and one that does not."""
        yield 0
        for round in self.plan.drawn:
            self.draw(round)
        rounds, until_fails = range(1, self.plan.measured), self.recipe.prune.until_fails
        drawing = [] if self.plan.drawn else [round for round in rounds if round in self.plan.ahead]
        for round in drawing:
            yield round
            if until_fails and not self.standing().is_matching(round):
                break
        if not until_fails:
            yield from (round for round in rounds if round not in drawing)
            return
        yield from sorted(self.standing().known(rounds).difference(drawing))  # of an earlier process
        while (between := self.standing().bracket(rounds)) is not None:
            yield between
        now = self.standing()
        unseen = {*rounds}.difference(now.known(rounds))
        self.watch.skip(sum(self.plan.iterations[round] * len(now.alive(round)) for round in unseen))

    def measure(self, round: int) -> None:
        """Train what is not yet trained of a round, in full; it draws the next mask, if none does it apart."""
        now = self.standing()
        over = now.over(round)
        todo = self.todo(now.alive(round), over)
        arms = [self.arm(round, replicate) for replicate in todo]
        with closing(self.train(round, arms)) as trained:
            for replicate, (arm, outcome) in zip(todo, trained, strict=True):
                if replicate not in over:
                    self.finish(round, replicate, arm, outcome)
        self.snapshots.clear(round)

    def draw(self, round: int) -> None:
        """Train for the mask of the next round and nothing else."""
        now = self.standing()
        dense, over = now.measured(0), now.drawn_over(round)
        todo = self.todo([replicate for replicate in now.alive(round) if replicate in dense], over)
        arms = [self.arm(round, replicate, for_mask=True) for replicate in todo]
        trainings = self.drawing.trainings(
            arms, self.initial, self.recipe.prune, way=Way.of(self.recipe.run), tick=self.watch.tick,
            note=self.watch.note,
        )  # fmt: skip
        with closing(trainings) as trained:
            for replicate, (arm, outcome) in zip(todo, trained, strict=True):
                if replicate in over:
                    continue
                self.run.check()
                if isinstance(outcome, Failed):
                    self.fail(round + 1, replicate, arm, outcome, untrained=True)
                    continue
                done = outcome.points[-1].iteration - arm.first
                self.watch.skip(self.plan.iterations[round] - done)
                self.keep(round, replicate, arm, outcome)
                line = {"round": round, "replicate": replicate, "iterations": done}
                self.run.append({**line, "accuracy_end": outcome.measured.accuracy_end}, self.run.drawn_file)

    def standing(self) -> Standing:
        """What the logs say now."""
        finished = {each.round: each for each in contents.finished_rounds(self.run, self.recipe)}
        return Standing(self.recipe.run.replicates, self.run.log(), self.run.drawn(), finished)

    def measured(self, round: int) -> results.Round:
        """A round that this search has finished. Raises TicketfindError where the log no longer has it."""
        self.run.check()
        finished = self.standing().rounds.get(round)
        if finished is None:
            raise TicketfindError(
                f"{self.run.log_file}: expected all of round {round}, found less: lines of this search have gone;"
                " put the file back, and the same command goes on"
            )
        return finished

    def todo(self, alive: Sequence[int], over: set[int]) -> list[int]:
        """Replicates to train. Of those that are trained in step all, or none: their numbers may depend on it."""
        in_step = Way.of(self.recipe.run).in_step
        groups = [alive[first : first + in_step] for first in range(0, len(alive), in_step)]
        return [r for group in groups if not over.issuperset(group) for r in group]

    def iterations(self) -> tuple[int, int]:
        """Those of the whole search, as far as is known, and those done."""
        total, done, now = 0, 0, self.standing()
        for round, count in enumerate(self.plan.iterations):
            alive = now.alive(round)
            total += count * len(alive)
            if round < self.plan.measured:
                todo = self.todo(alive, now.over(round))
                done += count * (len(alive) - len(todo)) + self.snapshots.done(round, todo)
            if round in self.plan.drawn:
                own = [line["iterations"] for line in now.drawn if line["round"] == round]
                total += count * len(set(alive) - now.drawn_over(round)) + sum(own)
                done += sum(own)
        return total, done

    def end(self) -> list[results.Round]:
        """Write the winner, or the one ticket that is drawn and not trained; the finished rounds."""
        plan, run = self.plan, self.run
        self.measured(0)
        rounds = contents.finished_rounds(run, self.recipe)
        winner = results.winner_of(rounds)
        if winner is not None:
            ticket = contents.load(run, winner.round, winner.best_replicate)
            ticket.save(run.ticket_file, root=run.path)
        elif plan.measured < len(plan.kept):
            ticket = contents.load(run, plan.measured, rounds[0].replicates[0])
            ticket.save(run.ticket_file, root=run.path)
        run.finish()
        return rounds

    def none_left(self, round: int) -> None:
        """Every replicate has failed. Raises TicketfindError where there is no round before."""
        if round == 0:
            *_, last = self.standing().failures.values()
            raise TicketfindError(f"every replicate failed; the last: {last['failed']}")
        self.watch.note(f"no replicate is left after round {round}: the search ends with the rounds before it")

    def look_at(self, finished: results.Round) -> None:
        """Point out an accuracy that any constant answer has; once, and for the dense network."""
        chance = self.task.chance if self.recipe.train.metric is None else None
        if chance is None or self.task.data is None:
            return
        size = len(self.task.data.test)
        before = [r for r in contents.finished_rounds(self.run, self.recipe) if r.round < finished.round]
        is_first = not before or not results.is_chance(before[-1].stats, chance, size)
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
            paths=self.drawing.score.needs_path and bool(self.plan.draws(round)),
        )

    def arm(self, round: int, replicate: int, *, for_mask: bool = False) -> Arm:
        """Train from initialization in round 0, then (and for a mask alone) from the rewind point, under the mask
        drawn before."""
        name, seed = f"round {round}, replicate {replicate}", self.recipe.run.seed + replicate
        if round == 0 and for_mask:
            start = self.at_rewind_point(replicate)
            return Arm(name, start, masks.dense(self.plan.shapes), seed, self.plan.rewind, 0, replicate)
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
            self.fail(round, replicate, arm, outcome)
            return
        plan, old = self.plan, arm.masks or masks.dense(self.plan.shapes)
        self.hold(arm, outcome, invariants.of_training(outcome.final, old))
        if round == 0:
            start = arm.start
            if not plan.moves:
                assert outcome.kept is not None
                start = outcome.kept
            about = {"ticketfind": json.dumps(_about_start(arm.start, plan, self.task))}
            self.save(self.start_file(0, replicate), start, about)
            self.save(self.run.trained_file(replicate), outcome.final)
        if plan.draws(round):
            self.keep(round, replicate, arm, outcome)
        self.run.append(_log_line(round, replicate, old, outcome))

    def keep(self, round: int, replicate: int, arm: Arm, outcome: Outcome) -> None:
        """Put the next masks on disk; with learning-rate rewinding, the weights too that the next round starts from."""
        old = arm.masks or masks.dense(self.plan.shapes)
        initial = outcome.kept if outcome.kept is not None and not self.plan.moves else self.initial(arm)
        rounds = len(self.plan.draws(round)) or 1
        drawn = (
            [outcome.masks]
            if outcome.masks is not None
            else self.drawing.of_training(arm, initial, outcome.final, outcome.path, rounds=rounds)
        )
        for number, new in enumerate(drawn, round + 1):
            self.hold(arm, outcome, invariants.of_pruning(new, old, self.plan.kept[number], self.plan.groups, number))
            old = new
        if self.plan.moves:
            about = read_metadata(self.start_file(0, replicate), "rewind point")
            self.save(self.start_file(round + 1, replicate), outcome.final, about)
        for number, new in enumerate(drawn, round + 1):
            self.save(self.run.mask_file(number, replicate), new)

    def initial(self, arm: Arm) -> State:
        """The weights that scores compare trained ones with: those of the rewind point."""
        return self.at_rewind_point(arm.replicate) if self.plan.moves else arm.start

    def at_rewind_point(self, replicate: int) -> State:
        """The same from its file."""
        return read_tensors(self.start_file(0, replicate), "rewind point")[0]

    def fail(self, round: int, replicate: int, arm: Arm, outcome: Failed, *, untrained: bool = False) -> None:
        """End a replicate in a round. untrained: it is the training for this round's mask that failed."""
        self.watch.note(f"{arm.name}: {outcome.reason}; it ends here, and the other replicates go on")
        over = {line["round"] for line in self.run.log() if line["replicate"] == replicate}
        unmeasured = {*range(round + (not untrained), self.plan.measured)} - over
        undrawn = [later for later in self.plan.drawn if later >= round] if untrained or round == 0 else []
        self.watch.skip(sum(self.plan.iterations[later] for later in (*unmeasured, *undrawn)))
        line = {"round": round, "replicate": replicate, "failed": f"{arm.name}: {outcome.reason}"}
        self.run.append({**line, "untrained": True} if untrained else line)

    def hold(self, arm: Arm, outcome: Outcome, faults: list[str]) -> None:
        """Raise Violated where there are faults, once what there is has been saved."""
        if not faults:
            return
        file = self.run.violated_file(arm.round, arm.replicate)
        parts = {"start": arm.start, "mask": arm.masks, "final": outcome.final}
        self.save(file, {f"{part}/{name}": t for part, state in parts.items() for name, t in state.items()})
        raise invariants.Violated.of(arm.name, [*faults[:3], f"its weights and masks are in {file}"])

    def save(self, file: Path, tensors: State, about: dict[str, str] | None = None) -> None:
        """Write tensors into the run directory, which is not begun anew where it has gone."""
        save_tensors(file, tensors, about, root=self.run.path)

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
