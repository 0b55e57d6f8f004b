"""How each result is shown: a table and a line for people, one object for --json (docs/json.md). No torch."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.text import Text

from ticketfind import hillplot, layers, results
from ticketfind.results import Round, Spread
from ticketfind.terminal import RoundRows, Screen, brief, percent, printable, size, spread
from ticketfind.terminal import table as _table

if TYPE_CHECKING:
    from ticketfind.bench import Timing
    from ticketfind.prunable import Candidate
    from ticketfind.recipe import Recipe
    from ticketfind.report import Written
    from ticketfind.rundir import RunDir
    from ticketfind.search import Plan
    from ticketfind.ticket import Ticket
    from ticketfind.verify import Check


def show_plan(screen: Screen, recipe: "Recipe", plan: "Plan") -> None:
    """`search --dry-run`."""
    total = sum(plan.iterations) * recipe.run.replicates
    screen.print(escape(layers.to_yaml(recipe)))
    screen.print(_rounds_table(plan.kept, plan.iterations))
    screen.result(
        f"{plural(recipe.run.replicates, 'replicate')}, {total:,} iterations in all;"
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


def show_search(screen: Screen, run: "RunDir", rounds: Sequence[Round], seconds: float) -> None:
    """What `search` has found; its rounds were shown on the way."""
    winner = results.winner_of(rounds)
    ticket = str(run.ticket_file) if run.ticket_file.exists() else None
    if winner is not None:
        line = f"winner: {_winner(winner)} (dense {spread(rounds[0].stats.accuracy_early)} %)\nticket: {ticket}"
    elif ticket is not None:
        line = (
            f"ticket, drawn from trained weights and not trained itself: {ticket}\nticketfind eval {run.path} trains it"
        )
    else:
        line = (
            "no winner: no pruned round matches the dense network;"
            " try more --replicates, a later --rewind or a smaller --prune"
        )
    if screen.console.is_terminal:
        screen.print(Text("\n".join(hillplot.hill(rounds, screen.console.width))))
    dense = rounds[0].stats.json()
    screen.result(
        line, {"run": str(run.path), "dense": dense, **_rounds_json(rounds), "ticket": ticket, "seconds": seconds}
    )


def show_rounds(screen: Screen, rounds: Sequence[Round]) -> None:
    """Finished rounds, all at once."""
    rows = RoundRows(screen.console.width)
    screen.print(Text("\n").join([rows.header(), *(rows.row(finished) for finished in rounds)]))


def show_run(screen: Screen, run: "RunDir", recipe: "Recipe", rounds: Sequence[Round]) -> None:
    """`inspect RUN`."""
    what = subject(recipe.model.spec, recipe.data.spec)
    screen.message(f"{run.path}: {what}, {plural(recipe.run.replicates, 'replicate')}")
    if rounds:
        show_rounds(screen, rounds)
    winner = results.winner_of(rounds)
    state = "finished" if run.is_finished else "not finished: the same search command goes on"
    drawn = "a ticket drawn from trained weights" if run.ticket_file.exists() else "no winner"
    screen.result(
        f"{plural(len(rounds), 'round')}, {state}; {drawn if winner is None else 'winner: ' + _winner(winner)}",
        {"run": str(run.path), "finished": run.is_finished, "recipe": recipe.plain(), **_rounds_json(rounds)},
    )


def _winner(winner: Round) -> str:
    return f"round {winner.round}, {percent(winner.remaining)} of the weights, {spread(winner.stats.accuracy_early)} %"


def _rounds_json(rounds: Sequence[Round]) -> dict[str, Any]:
    winner = results.winner_of(rounds)
    return {
        "rounds": [finished.json() for finished in rounds],
        "winner": None if winner is None else {**winner.json(), "replicate": winner.best_replicate},
    }


def show_export(screen: Screen, ticket: "Ticket", path: Path, form: str) -> None:
    """`export`."""
    written = path.stat().st_size
    screen.result(
        f"{path}: {percent(ticket.remaining)} of the weights, {form}, {size(written)}",
        {"file": str(path), "format": form, "remaining": ticket.remaining, "bytes": written},
    )


def show_checks(screen: Screen, target: str, checks: "Sequence[Check]", seconds: float) -> None:
    """`verify`."""
    words = {True: "yes", False: "NO", None: "not checked"}
    styles = {True: "green", False: "bold red", None: "yellow"}
    for check in checks:
        line = Text(f"{words[check.passed]:>11}  ", style=styles[check.passed])
        line.append(f"{check.what}: {printable(check.found)}", style="default")
        screen.print(line)
    failed = [check.what for check in checks if check.passed is False]
    unknown = sum(check.passed is None for check in checks)
    passed = f"{plural(len(checks) - unknown, 'check')} passed" + (f", {unknown} could not be made" if unknown else "")
    screen.result(
        f"{target}: not as it says: {'; '.join(failed)}" if failed else f"{target}: {passed}",
        {
            "target": target,
            "verified": not failed,
            "checks": [{"what": c.what, "passed": c.passed, "found": c.found} for c in checks],
            "seconds": seconds,
        },
    )


def show_report(screen: Screen, run: "RunDir", found: "Written", seconds: float) -> None:
    """`report`."""
    for note in found.notes:
        screen.message(note)
    rows = [(str(claim.number), claim.status, claim.text) for claim in found.claims]
    screen.print(_table(("", "", "claim"), rows, left=3))
    screen.result(
        f"{found.page}, and {plural(len(found.figures), 'figure')} in {found.figures[0].parent}",
        {
            "run": str(run.path),
            "report": str(found.page),
            "figures": [str(path) for path in found.figures],
            "claims": [{"number": c.number, "claim": c.text, "status": c.status, "figures": c.figures}
                       for c in found.claims],
            "seconds": seconds,
        },
    )  # fmt: skip


def show_ticket(screen: Screen, ticket: "Ticket", path: Path) -> None:
    """`inspect TICKET`."""
    about = ticket.about
    tensors = {
        name: {"shape": list(mask.shape), "kept": int(mask.sum()), "size": mask.numel()}
        for name, mask in ticket.masks.items()
    }
    rows = [
        (name, _shape(mask.shape), f"{int(mask.sum()):,}", f"{mask.numel():,}", percent(float(mask.float().mean())))
        for name, mask in sorted(ticket.masks.items(), key=natural)
    ]
    screen.print(_table(("", "shape", "kept", "of", "left"), rows))
    screen.message(f"round {about.round}, replicate {about.replicate}, weights of iteration {about.iteration}")
    for line in _claims(about.recipe, about.claims):
        screen.message(line)
    layout = "full" if ticket.complete else "compact"
    screen.result(
        f"{path}: {percent(ticket.remaining)} of the weights, {layout}",
        {
            "ticket": str(path),
            "remaining": ticket.remaining,
            "layout": layout,
            "round": about.round,
            "replicate": about.replicate,
            "iteration": about.iteration,
            "claims": about.claims,
            "versions": about.versions,
            "aliases": about.aliases,
            "recipe": about.recipe,
            "tensors": tensors,
        },
    )


def _claims(recipe: Mapping[str, Any], claims: Mapping[str, Any]) -> list[str]:
    """Where a ticket comes from and what its search measured; what the file lacks is left out."""
    model, data = recipe.get("model"), recipe.get("data")
    lines = []
    if isinstance(model, dict) and isinstance(data, dict):
        lines.append(subject(model.get("spec"), data.get("spec")))
    for name in ("dense", "ticket"):
        try:
            early = claims[name]["accuracy_early"]
            lines.append(
                f"{name}: {spread(Spread(early['mean'], early['sd'], ()))} % at early stop, as its search says"
            )
        except (KeyError, TypeError, ValueError):
            continue
    return lines


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
        return sum(self.plan.iterations) * self.recipe.run.replicates

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
    rows = [(c.name, _shape(c.shape), "pruned" if c.pruned else "whole", c.reason) for c in found]
    return _table(("parameter", "shape", "", "why"), rows, left=4)


def _rounds_table(kept: Sequence[int], iterations: Sequence[int] | None) -> Text:
    rows = [
        (str(number), percent(n / kept[0]), f"{n:,}", *((f"{iterations[number]:,}",) if iterations else ()))
        for number, n in enumerate(kept)
    ]
    return _table(("round", "left", "weights", *(("iterations",) if iterations else ())), rows)


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


def subject(model: str | None, data: str | None) -> str:
    """``lenet-300-100 on digits``; a training of the user's own may have no data that is known here."""
    return f"{model}" if data is None else f"{model} on {data}"


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
    screen.print(_table(("step", "way", "arms", "min", "median", "max", "plain / this"), rows, left=2))
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


def plural(number: int, what: str) -> str:
    """``1 round``, ``2 rounds``."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def natural(item: tuple[str, Any]) -> list[tuple[int, str]]:
    """Sorts ``layers.2`` before ``layers.10``: a file keeps names in alphabetical order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", item[0])]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
