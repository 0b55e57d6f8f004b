"""What to search with: how rewind points and recipes are shown, for people and as --json (docs/json.md). No torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ticketfind.terminal import Screen, brief, percent, plural, size, spread, table

if TYPE_CHECKING:
    from ticketfind.catalog import Entry
    from ticketfind.stability import Rung, Stability


def show_stability(screen: Screen, target: str, found: Sequence["Stability"], points: int, seconds: float) -> None:
    """`stability`; points: places on a line."""
    lines = []
    for each in found:
        screen.print(table((f"{each.question.network}, k", "barrier", "error at the ends", ""), _rows(each)))
        for note in _notes(each):
            screen.message(note)
        lines.append(_recommendation(each))
    total = sum(each.iterations for each in found)
    lines.append(f"the finder took {total:,} iterations, as many as {total / found[0].total:.1f} dense trainings")
    screen.result(
        "\n".join(lines),
        {
            "target": target,
            "threshold": found[0].question.threshold,
            "points": points,
            "networks": [_network_json(each) for each in found],
            "iterations": total,
            "seconds": seconds,
        },
    )


def _rows(found: "Stability") -> list[tuple[str, ...]]:
    return [
        (f"{rung.iteration:,}", _barrier(rung), spread(rung.error), _word(rung, found.question.threshold))
        for rung in found.rungs
    ]


def _word(rung: "Rung", threshold: float) -> str:
    return "stable" if rung.stable else "unclear" if rung.barrier.mean < threshold else "not stable"


def _barrier(rung: "Rung") -> str:
    """``1.20 ± 0.31 [0.43, 1.97]`` points, the interval that of the mean."""
    interval = rung.barrier.interval
    text = spread(rung.barrier)
    return text if interval is None else f"{text} [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"


def _notes(found: "Stability") -> list[str]:
    """What to know about how the rungs were chosen."""
    asked = found.question
    left = len(asked.rungs) - len(found.rungs)
    notes = []
    if len(found.rungs[0].barrier.values) == 1:
        notes.append("one pair of trainings for each k says little; more --replicates give an interval")
    if left:
        notes.append(
            f"{asked.network}: {left} of {plural(len(asked.rungs), 'iteration')} on the ladder not measured: what is"
            " stable at one is taken to be so at every later one; --at measures where you say"
        )
    if found.contradicting:
        where = ", ".join(f"{k:,}" for k in found.contradicting)
        notes.append(f"{asked.network}: stable at {where}, but not at a later iteration: more --replicates would tell")
    return notes


def _recommendation(found: "Stability") -> str:
    network, k, total, first = found.question.network, found.earliest, found.total, found.question.first
    limit = f"{100 * found.question.threshold:g} points"
    if k is None:
        last = found.rungs[-1]
        advice = "try later ones (--at 75%), a lower --lr or a longer warmup (--set train.warmup=10%)"
        if _word(last, found.question.threshold) == "unclear":
            advice = "the interval there is too wide to tell: more --replicates"
        return (
            f"{network}: not stable up to iteration {last.iteration:,} of {total:,} (barrier below {limit}); {advice}"
        )
    if network == "sparse" and k == first:
        return f"sparse: stable where its trainings begin, at iteration {k:,}: a rewind point to keep"
    rounds = f"each round after the dense one takes {total - k:,} iterations" + (f" instead of {total:,}" if k else "")
    ticket = (
        f"a ticket needs {k:,} iterations of dense training first, once ({percent(k / total)} of it)"
        if k
        else "a ticket needs no dense training first"
    )
    return f"{network}: stable from iteration {k:,} on: search with --rewind {k}it; {rounds}, and {ticket}"


def _network_json(found: "Stability") -> dict[str, Any]:
    k, total = found.earliest, found.total
    return {
        "network": found.question.network,
        "remaining": found.remaining,
        "ladder": list(found.question.rungs),
        "rungs": [
            {
                "iteration": rung.iteration,
                "stable": rung.stable,
                "barrier": rung.barrier.json(),
                "error": rung.error.json(),
            }
            for rung in found.rungs
        ],
        "recommended": None
        if k is None
        else {"rewind": f"{k}it", "iteration": k, "share": k / total, "round_iterations": total - k},
        "contradicting": list(found.contradicting),
        "iterations": found.iterations,
    }


def show_recipes(screen: Screen, entries: Sequence["Entry"]) -> None:
    """`recipes`: a row for each."""
    timed = any(each.step is not None for each in entries)
    columns = ["recipe", "model", "data", "images", "weights", "rounds", "trainings", "iterations", "examples", "disk"]
    columns += ["step", "time"] if timed else []
    screen.message("ticketfind recipes NAME prints a recipe, to be saved and edited; ticketfind search NAME runs it")
    screen.message("--data: give your own, images of another size too; the counts are for the size that is shown")
    if timed:
        screen.message("time: of training steps, measured here, one after another, without evaluations")
    rows = table(columns, [_recipe_row(each) for each in entries], left=4)
    screen.result(rows.plain, recipes_json(entries))


def show_recipe(screen: Screen, entry: "Entry") -> None:
    """`recipes NAME`: its file as it is."""
    screen.result(entry.text.rstrip("\n"), recipes_json([entry]))


def recipes_json(entries: Sequence["Entry"]) -> dict[str, Any]:
    """The JSON object of `recipes`."""
    return {"recipes": [_recipe_json(each) for each in entries]}


def _recipe_row(entry: "Entry") -> list[str]:
    recipe, plan = entry.recipe, entry.plan
    row = [
        recipe.name,
        recipe.model.spec,
        recipe.data.spec or "--data",
        "x".join(map(str, entry.shape)),
        f"{entry.parameters:,}",
        str(len(plan.iterations) - 1),
        str(entry.trainings),
        f"{entry.iterations:,}",
        f"{entry.examples:,}",
        size(plan.disk),
    ]
    if entry.step is not None and entry.seconds is not None:
        row += [brief(entry.step), brief(entry.seconds)]
    return row


def _recipe_json(entry: "Entry") -> dict[str, Any]:
    recipe, plan = entry.recipe, entry.plan
    return {
        "name": recipe.name,
        "about": entry.about,
        "model": recipe.model.spec,
        "data": recipe.data.spec,
        "shape": list(entry.shape),
        "parameters": entry.parameters,
        "prunable": plan.kept[0],
        "remaining": plan.kept[-1] / plan.kept[0],
        "rounds": len(plan.iterations) - 1,
        "replicates": recipe.run.replicates,
        "trainings": entry.trainings,
        "iterations": entry.iterations,
        "examples": entry.examples,
        "disk": plan.disk,
        "step_seconds": entry.step,
        "yaml": entry.text,
    }
