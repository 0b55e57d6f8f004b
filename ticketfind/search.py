"""Iterative magnitude pruning (arXiv 1803.03635, section 2): train, prune, rewind, again; resumable."""

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from ticketfind import TicketfindError, contents, invariants, masks, prunable, results, rundir
from ticketfind.arms import Arm, Outcome, State, Task, Watched
from ticketfind.batches import derived_seed
from ticketfind.connection import is_disconnected
from ticketfind.course import Failed
from ticketfind.devices import Way
from ticketfind.drawing import Drawing
from ticketfind.keeping import Keeper, Watch
from ticketfind.masks import Masks
from ticketfind.plan import Plan
from ticketfind.recipe import Recipe
from ticketfind.rundir import RunDir
from ticketfind.scores import Score
from ticketfind.snapshots import Snapshots
from ticketfind.standing import Standing
from ticketfind.tensorfile import read_tensors
from ticketfind.train import check_memory, fit, judge


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
            keeper = Keeper(task, run, plan, drawing, watch)
            return _Job(recipe, task, run, plan, drawing, watch, snapshots, keeper).rounds()
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
    keeper: Keeper

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
        self.draw_further(0)
        rounds, until_fails, drawing = range(1, self.plan.measured), self.recipe.prune.until_fails, list[int]()
        for round in self.plan.ahead:
            if round in self.plan.apart:
                self.draw(round)
            elif round in rounds:
                drawing.append(round)
                yield round
                if until_fails and not self.standing().is_matching(round):
                    break
                self.draw_further(round)
        if not until_fails:
            yield from (round for round in rounds if round not in drawing)
            return
        yield from sorted(self.standing().known(rounds).difference(drawing))  # of an earlier process
        while (between := self.standing().bracket(rounds)) is not None:
            yield between
        now = self.standing()
        unseen = {*rounds}.difference(now.known(rounds))
        self.watch.skip(sum(self.plan.iterations[round] * len(now.alive(round)) for round in unseen))
        spared = [number for round in self.plan.ahead for number in self.plan.tuned(round)]
        self.watch.skip(sum(self.plan.finetune * len(self.untuned(number, now)) for number in spared))
        self.watch.skip(sum(length * len(self.undrawn(round, now)) for round, length in self.plan.apart.items()))

    def measure(self, round: int) -> None:
        """Train what is not yet trained of a round, in full; it draws the next mask, if none does it apart."""
        now = self.standing()
        over = now.over(round)
        todo = self.todo(now.alive(round), over)
        arms = [self.arm(round, replicate) for replicate in todo]
        with closing(self.train(round, arms)) as trained:
            for replicate, (arm, outcome) in zip(todo, trained, strict=True):
                if replicate not in over:
                    self.keeper.finish(round, replicate, arm, outcome)
        self.snapshots.clear(round)

    def draw(self, round: int) -> None:
        """Train for the mask of the next round and nothing else."""
        now = self.standing()
        over, todo = now.drawn_over(round), self.undrawn(round, now)
        arms = [self.arm(round, replicate, for_mask=True) for replicate in todo]
        trainings = self.drawing.trainings(
            arms, self.keeper.initial, self.recipe.prune, way=Way.of(self.recipe.run), tick=self.watch.tick,
            skip=self.watch.skip, note=self.watch.note,
        )  # fmt: skip
        with closing(self.for_masks(round + 1, todo, over, trainings)) as drawn:
            for replicate, arm, outcome in drawn:
                done = outcome.points[-1].iteration - arm.first
                self.watch.skip(self.plan.apart[round] - done)
                self.keeper.keep(round, replicate, arm, outcome, self.keeper.initial(arm))
                line = {"round": round, "replicate": replicate, "iterations": done}
                self.run.append({**line, "accuracy_end": outcome.measured.accuracy_end}, self.run.drawn_file)

    def draw_further(self, round: int) -> None:
        """Draw the masks of a round's training after its first, each after training on under the one before."""
        keeper, further = self.keeper, self.plan.tuned(round)
        for number in further:
            now = self.standing()
            over, todo = self.tuned_over(number, now), self.untuned(number, now)
            trainings = fit(
                [self.going_on(number - 1, replicate) for replicate in todo], self.task, self.recipe.train,
                way=Way.of(self.recipe.run), tick=self.watch.tick, skip=self.watch.skip, note=self.watch.note,
                paths=self.drawing.score.needs_path, watched=Watched(at_end=False),
            )  # fmt: skip
            with closing(self.for_masks(number, todo, over, trainings)) as tuned:
                for replicate, arm, outcome in tuned:
                    keeper.hold(arm, outcome, invariants.of_training(outcome.final, arm.masks))
                    if number + 1 in further:
                        keeper.save(self.run.trained_file(replicate, number - 1), outcome.final)
                    keeper.keep(number - 1, replicate, arm, outcome, keeper.at_rewind_point(replicate))
            self.run.forget_trained(range(max(1, round), number - 1))

    def for_masks(
        self,
        number: int,
        todo: list[int],
        over: set[int],
        trainings: Generator[tuple[Arm, Outcome | Failed], None, None],
    ) -> Generator[tuple[int, Arm, Outcome], None, None]:
        """What comes of trainings for a round's masks alone, by replicate; one that fails ends its replicate."""
        with closing(trainings) as trained:
            for replicate, (arm, outcome) in zip(todo, trained, strict=True):
                if replicate in over:
                    continue
                self.run.check()
                if isinstance(outcome, Failed):
                    self.keeper.fail(number, replicate, arm, outcome, untrained=True)
                else:
                    yield replicate, arm, outcome

    def going_on(self, round: int, replicate: int) -> Arm:
        """Train on under a round's mask, at the schedule's last learning rates, from what drew it."""
        start, _ = read_tensors(self.run.trained_file(replicate, round - 1), "trained weights")
        name = f"replicate {replicate}, on to the mask of round {round + 1}"
        mask = self.mask(name, start, round, replicate)
        seed = derived_seed(self.recipe.run.seed + replicate, "finetune", round)
        return Arm(name, start, mask, seed, int(self.recipe.train.iterations) - self.plan.finetune, round, replicate)

    def undrawn(self, round: int, now: Standing) -> list[int]:
        """Replicates that are trained in a round for the next mask alone."""
        dense = now.measured(0)
        return self.todo([replicate for replicate in now.alive(round) if replicate in dense], now.drawn_over(round))

    def tuned_over(self, number: int, now: Standing) -> set[int]:
        """Replicates whose mask of this round is there, or that have failed on the way to it."""
        there = {replicate for round, replicate in self.run.masks() if round == number}
        return there | now.drawn_over(number - 1)

    def untuned(self, number: int, now: Standing) -> list[int]:
        """Replicates whose mask of this round is drawn after training on, and is to be."""
        return self.todo(now.alive(number - 1), self.tuned_over(number, now))

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
            for number in self.plan.tuned(round):
                before = len(now.alive(number - 1))
                total += self.plan.finetune * before
                done += self.plan.finetune * (before - len(self.untuned(number, now)))
            if round in self.plan.apart:
                own = {line["replicate"]: line["iterations"] for line in now.drawn if line["round"] == round}
                todo = self.undrawn(round, now)  # in step with another also what is over
                left = set(alive) - now.drawn_over(round)
                total += self.plan.apart[round] * len(left) + sum(own.values())
                done += sum(iterations for replicate, iterations in own.items() if replicate not in todo)
        return total, done

    def end(self) -> list[results.Round]:
        """Write the winner, or the one ticket that is drawn and not trained; the finished rounds."""
        plan, run = self.plan, self.run
        self.measured(0)
        run.forget_trained(range(1, len(plan.kept)))
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
            each = ((arm, {**arm.start, **self.task.trained}) for arm in named)
            return judge(each, self.task, how, precision=self.recipe.run.precision)
        return fit(
            arms,
            self.task,
            how,
            way=Way.of(self.recipe.run),
            keep_at=self.plan.rewind if round == 0 else None,
            tick=self.watch.tick,
            skip=self.watch.skip,
            note=self.watch.note,
            folder=self.run.arms_folder,
            snapshots=self.snapshots,
            paths=self.drawing.score.needs_path and bool(self.plan.draws(round)),
        )

    def arm(self, round: int, replicate: int, *, for_mask: bool = False) -> Arm:
        """Train from initialization in round 0, then (and for a mask alone) from the rewind point, under the mask
        drawn before."""
        alone = f", for the mask of round {round + 1}" if for_mask else ""
        name, seed = f"round {round}, replicate {replicate}{alone}", self.recipe.run.seed + replicate
        if round == 0 and for_mask:
            start = self.keeper.at_rewind_point(replicate)
            return Arm(name, start, masks.dense(self.plan.shapes), seed, self.plan.rewind, 0, replicate)
        if round == 0:
            return Arm(name, self.task.start(seed), {}, seed, replicate=replicate)
        self.run.check()
        start, _ = read_tensors(self.keeper.start_file(round, replicate), "rewind point")
        mask = self.mask(name, start, round, replicate)
        return Arm(name, start, mask, seed, self.plan.rewind, round, replicate)

    def mask(self, name: str, start: State, round: int, replicate: int) -> Masks:
        """A round's mask. Raises TicketfindError where nothing can be trained from `start` under it."""
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
        return mask
