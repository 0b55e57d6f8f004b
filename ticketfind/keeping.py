"""What a search puts on disk of its trainings: masks, weights, lines of its log, the last of all."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ticketfind import invariants, masks, prunable, results
from ticketfind.arms import Arm, Outcome, State, Task
from ticketfind.course import Failed, Point
from ticketfind.drawing import Drawing
from ticketfind.masks import Masks
from ticketfind.plan import Plan
from ticketfind.rundir import RunDir
from ticketfind.tensorfile import read_metadata, read_tensors, save_tensors


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
class Keeper:
    """Draws masks from what is trained, and keeps both."""

    task: Task
    run: RunDir
    plan: Plan
    drawing: Drawing
    watch: Watch

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
            if plan.tuned(round) and round:
                self.save(self.run.trained_file(replicate, round), outcome.final)
            at_rewind = outcome.kept if outcome.kept is not None and not plan.moves else self.initial(arm)
            self.keep(round, replicate, arm, outcome, at_rewind)
        self.run.append(_log_line(round, replicate, old, outcome))

    def keep(self, round: int, replicate: int, arm: Arm, outcome: Outcome, initial: State) -> None:
        """Put the next masks on disk; with learning-rate rewinding, the weights too that the next round starts from.

        initial: the weights of the rewind point, which scores compare trained ones with.
        """
        old = arm.masks or masks.dense(self.plan.shapes)
        rounds = 1 if self.plan.finetune else len(self.plan.draws(round)) or 1
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
        self.watch.skip(self._spared(round, replicate, round if untrained else round + 1))
        line = {"round": round, "replicate": replicate, "failed": f"{arm.name}: {outcome.reason}"}
        self.run.append({**line, "untrained": True} if untrained else line)

    def _spared(self, round: int, replicate: int, first: int) -> int:
        """Iterations that are not done where a replicate ends in a round, and is not measured from `first` on; but for
        those that are spared already, as it has ended in a later round before."""
        plan, there = self.plan, self.run.masks()
        lines = [line for line in self.run.log() if line["replicate"] == replicate]
        over = {line["round"] for line in lines}
        end = min((line["round"] for line in lines if "failed" in line), default=len(plan.kept))
        apart = {before + 1: iterations for before, iterations in plan.apart.items()}
        apart |= {number: plan.finetune for drawing in plan.ahead for number in plan.tuned(drawing)}
        undrawn = [number for number in apart if round < number < end and (number, replicate) not in there]
        unmeasured: set[int] = {*range(first, min(plan.measured, end))} - over
        return sum(apart[number] for number in undrawn) + sum(plan.iterations[later] for later in unmeasured)

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
