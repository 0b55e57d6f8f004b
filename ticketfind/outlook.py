"""How it is shown what a search would do, and what it takes: plans, models, timings; and for --json. No torch."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.text import Text

from ticketfind import layers
from ticketfind.terminal import Screen, brief, percent, plural, shape, size, table
from ticketfind.views import subject

if TYPE_CHECKING:
    from ticketfind.bench import Timing
    from ticketfind.plan import Plan
    from ticketfind.prunable import Candidate
    from ticketfind.recipe import Recipe


def show_plan(screen: Screen, recipe: "Recipe", plan: "Plan") -> None:
    """`search --dry-run`."""
    total = plan.total * recipe.run.replicates
    short = recipe.prune.mask_iterations
    length = "" if short is None else f", {int(short):,} iterations"
    twice = f", {plural(len(plan.apart), 'round')} trained twice, once for the mask{length}" if plan.apart else ""
    tuned = sum(len(plan.tuned(round)) for round in plan.ahead)
    between = f", {plural(tuned, 'time')} {plan.finetune:,} a replicate between masks" if tuned else ""
    screen.print(escape(layers.to_yaml(recipe)))
    screen.print(_rounds_table(plan.kept, plan.iterations))
    for candidate in plan.candidates:
        if candidate.is_left_whole:
            screen.message(f"{candidate.name} is {candidate.reason}")
    screen.result(
        f"{plural(recipe.run.replicates, 'replicate')}, {'at most ' if plan.may_end_early else ''}{total:,} iterations"
        f" in all{twice}{between};"
        f" memory {size(plan.memory)} beside data and activations, disk {size(plan.disk)}",
        {
            "recipe": recipe.plain(),
            "rounds": _plan_json(plan.kept, plan.iterations),
            "iterations": total,
            "parameters": sum(math.prod(c.shape) for c in plan.candidates),
            "prunable": plan.kept[0],
            "memory": plan.memory,
            "disk": plan.disk,
        },
    )


@dataclass(frozen=True)
class Outlook:
    """What a search of a model on data would take."""

    recipe: "Recipe"
    plan: "Plan"
    data_bytes: int
    """Bytes of the examples that are held in memory."""
    step_seconds: Sequence[float]
    """Of the first training steps; none where the training is the user's own."""

    @property
    def total(self) -> int:
        """Iterations of all trainings."""
        return self.plan.total * self.recipe.run.replicates

    @property
    def first_step(self) -> float | None:
        """Seconds of the first step."""
        return self.step_seconds[0] if self.step_seconds else None

    @property
    def step(self) -> float | None:
        """Seconds of a step, once the first is done."""
        return statistics.median(self.step_seconds[1:]) if self.step_seconds else None


def show_model(
    screen: Screen, spec: str, found: Sequence["Candidate"], kept: Sequence[int], outlook: Outlook | None = None
) -> None:
    """`inspect MODEL`; kept: weights in each round; outlook: with --data."""
    iterations = None if outlook is None else outlook.plan.iterations
    screen.print(_candidates_table(found))
    if len(kept) > 1:
        screen.print(_rounds_table(kept, iterations))
    parameters = sum(math.prod(c.shape) for c in found)
    prunable = sum(math.prod(c.shape) for c in found if c.pruned)
    lines = [f"{spec}: {prunable:,} of {parameters:,} parameters can be pruned"]
    screen.result(
        "\n".join(lines + _outlook_lines(outlook)),
        {
            "model": spec,
            "parameters": parameters,
            "prunable": prunable,
            "tensors": {c.name: {"shape": list(c.shape), "pruned": c.pruned, "reason": c.reason} for c in found},
            "rounds": _plan_json(kept, iterations),
            **_outlook_json(outlook),
        },
    )


def _outlook_lines(outlook: Outlook | None) -> list[str]:
    if outlook is None:
        return ["iterations, memory and time: with --data"]
    replicates, device = outlook.recipe.run.replicates, outlook.recipe.run.device
    lines = [
        f"{plural(replicates, 'replicate')}, {outlook.total:,} iterations in all;"
        f" memory {size(outlook.plan.memory)} for training, {size(outlook.data_bytes)} for data, and activations"
    ]
    if outlook.first_step is not None and outlook.step is not None:
        lines.append(
            f"first step {brief(outlook.first_step)}, then {brief(outlook.step)} a step on {device}: about"
            f" {brief(outlook.total * outlook.step)} of training, one after another, without evaluations"
        )
    return lines


def _outlook_json(outlook: Outlook | None) -> dict[str, Any]:
    """The same keys with and without data."""
    return {
        "replicates": outlook and outlook.recipe.run.replicates,
        "iterations": outlook and outlook.total,
        "memory": outlook and outlook.plan.memory,
        "data_bytes": outlook and outlook.data_bytes,
        "disk": outlook and outlook.plan.disk,
        "first_step_seconds": outlook and outlook.first_step,
        "step_seconds": outlook and outlook.step,
    }


def _candidates_table(found: Sequence["Candidate"]) -> Text:
    rows = [(c.name, shape(c.shape), "pruned" if c.pruned else "whole", c.reason) for c in found]
    return table(("parameter", "shape", "", "why"), rows, left=4)


def _rounds_table(kept: Sequence[int], iterations: Sequence[int] | None) -> Text:
    rows = [
        (str(number), percent(n / kept[0]), f"{n:,}", *((f"{iterations[number]:,}",) if iterations else ()))
        for number, n in enumerate(kept)
    ]
    return table(("round", "left", "weights", *(("iterations",) if iterations else ())), rows)


def _plan_json(kept: Sequence[int], iterations: Sequence[int] | None) -> list[dict[str, Any]]:
    """The rounds of a plan; none for a model with nothing to prune."""
    return [
        {
            "round": number,
            "remaining": n / kept[0],
            "kept": n,
            "iterations": None if iterations is None else iterations[number],
        }
        for number, n in enumerate(kept if kept[0] else ())
    ]


def show_bench(screen: Screen, recipe: "Recipe", found: Sequence["Timing"]) -> None:
    """`bench`."""
    single = {
        timing.case.name: timing for timing in found if timing.case.way in ("plain", "eager") and timing.case.arms == 1
    }
    plain = single["plain"]
    rows = [
        (
            timing.case.name,
            "" if timing.case.way == "plain" else timing.case.way,
            str(timing.case.arms),
            *(f"{ms:.3f}" for ms in (min(timing.ms), timing.median, max(timing.ms))),
            f"{plain.over(timing):.2f}",
        )
        for timing in found
    ]
    screen.print(table(("step", "way", "arms", "min", "median", "max", "plain / this"), rows, left=2))
    ratio = single["masked"].over(single["dense"])
    best = max((timing for timing in found if timing.case.name == "masked"), key=plain.over)
    what, batch = subject(recipe.model.spec, recipe.data.spec), recipe.train.batch_size
    screen.result(
        f"{what}, batch {batch}, {recipe.train.optimizer}, {recipe.run.device}; milliseconds an iteration and arm;"
        f" masked / dense {ratio:.3f}; {plain.over(best):.2f} times the plain loop's speed at best"
        f" ({best.case.way}, {plural(best.case.arms, 'arm')})",
        {
            "model": recipe.model.spec,
            "data": recipe.data.spec,
            "device": recipe.run.device,
            "batch_size": batch,
            "optimizer": recipe.train.optimizer,
            "masked_over_dense": ratio,
            "cases": [
                {
                    "step": timing.case.name,
                    "way": timing.case.way,
                    "arms": timing.case.arms,
                    "ms": list(timing.ms),
                    "ms_median": timing.median,
                    "plain_over_this": plain.over(timing),
                }
                for timing in found
            ],
        },
    )
