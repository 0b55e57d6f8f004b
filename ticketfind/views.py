"""How what was found is shown: a table and a line for people, one object for --json (docs/json.md). No torch."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ticketfind import hillplot, results
from ticketfind.results import Round, Spread
from ticketfind.terminal import RoundRows, Screen, percent, plural, printable, shape, size, spread, table

if TYPE_CHECKING:
    from ticketfind.recipe import Recipe
    from ticketfind.report import Written
    from ticketfind.rundir import RunDir
    from ticketfind.ticket import Ticket
    from ticketfind.verify import Check


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
    screen.print(table(("", "", "claim"), rows, left=3))
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
        (name, shape(mask.shape), f"{int(mask.sum()):,}", f"{mask.numel():,}", percent(float(mask.float().mean())))
        for name, mask in sorted(ticket.masks.items(), key=natural)
    ]
    screen.print(table(("", "shape", "kept", "of", "left"), rows))
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


def subject(model: str | None, data: str | None) -> str:
    """``lenet-300-100 on digits``; a training of the user's own may have no data that is known here."""
    return f"{model}" if data is None else f"{model} on {data}"


def natural(item: tuple[str, Any]) -> list[tuple[int, str]]:
    """Sorts ``layers.2`` before ``layers.10``: a file keeps names in alphabetical order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", item[0])]
