"""A run's report: what its log, its evaluations and its weights say, as charts, as claims, and as a page. No torch."""

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ticketfind import TicketfindError, __version__, beside, charts, claims, figures, files, movement, page, results
from ticketfind.claims import Evaluated, Findings
from ticketfind.layers import differences, to_yaml
from ticketfind.recipe import Recipe, Run
from ticketfind.results import Round, Spread, Stats
from ticketfind.rundir import RunDir


@dataclass(frozen=True)
class Written:
    """What a report consists of."""

    page: Path
    figures: list[Path]
    claims: list[claims.Claim]
    notes: list[str]
    """What is not in it, and why."""


def write(run: RunDir, out: Path | None = None, other: RunDir | None = None) -> Written:
    """Write the report on a run, finished or not, and its figures: in the run directory, or as `out` and beside it.

    other: the same search with another dropout rate, for the claim that needs both. Raises TicketfindError where no
    round has finished, a file is not as ticketfind writes it, `other` is another search, or matplotlib is missing.
    """
    figures.check_matplotlib()
    recipe, log, rounds = run.recipe(), run.log(), _rounds(run)
    found, verdicts = evaluations(run)
    chosen = results.winner_of(rounds) or rounds[-1]
    weights = movement.of_run(run, chosen.round or 1, _best_first(chosen))
    judged = claims.of_run(_findings(run, found, weights.means))
    if other is not None:
        judged = [claim if claim.number != 11 else _dropout(run, other) for claim in judged]
    planned = [*charts.of_run(recipe, rounds, log, found, weights, chosen)]
    folder = run.figures_folder if out is None else out.with_name(f"{out.stem}-figures")
    root = run.path if out is None else None
    drawn, written = [], []
    for chart in planned:
        svg, png = figures.render(chart)
        drawn.append((chart, svg))
        written += [folder / f"{chart.name}.svg", folder / f"{chart.name}.png"]
        files.write_text(written[-2], svg, root)
        with files.whole(written[-1], root) as temporary:
            temporary.write_bytes(png)
    path = out or run.report_file
    text = page.html(
        page.Contents(
            run=str(run.path),
            is_finished=run.is_finished,
            recipe=recipe,
            recipe_text=to_yaml(recipe),
            rounds=rounds,
            evaluated=found,
            verdict=verdicts.get(chosen.round),
            drawn=drawn,
            claims=judged,
            notes=weights.notes,
            versions={"report written by": f"ticketfind {__version__}", **_versions(run)},
        )
    )
    files.write_text(path, text, root)
    return Written(path, written, judged, weights.notes)


def _rounds(run: RunDir) -> list[Round]:
    recipe = run.recipe()
    rounds = results.rounds_of(run.log(), replicates=recipe.run.replicates, given_tolerance=recipe.run.tolerance)
    if not rounds:
        raise TicketfindError(f"{run.path}: no round has finished; ticketfind search goes on with it")
    if not all(_is_usable(value) for r in rounds for part in _parts(r.stats) for value in part.values):
        raise TicketfindError(f"{run.log_file}: expected accuracies and iterations, found larger numbers")
    return rounds


def _best_first(chosen: Round) -> list[int]:
    return sorted(chosen.replicates, key=lambda replicate: replicate != chosen.best_replicate)


def _versions(run: RunDir) -> dict[str, str]:
    """Of what made the ticket; nothing where there is none or it does not say."""
    if not run.ticket_file.is_file():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(run.ticket_file, framework="np") as file:
            versions = json.loads((file.metadata() or {})["ticketfind"])["versions"]
        return {f"search by {name}": str(version)[:60] for name, version in versions.items()}
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


# ------------------------------------------------------------------------------------------- evaluations


def evaluations(run: RunDir) -> tuple[list[Evaluated], dict[int, str]]:
    """Of each evaluated round the newest of each arm, and the newest attacks, together; densest round first; and each
    round's newest verdict.

    Raises TicketfindError for a file that is not as `eval` writes it.
    """
    newest: dict[int, Evaluated] = {}
    verdicts: dict[int, str] = {}
    for file in sorted(run.evals_folder.glob("*.json"), key=lambda file: file.stem):
        if (number := re.match(r"\d{1,6}(?=-)", file.name)) is None:
            raise TicketfindError(f"{file}: expected the name of an evaluation, NN-TIME.json")
        round = int(number[0])
        found, verdicts[round] = _read(file, round)
        before = newest.get(round, found)
        newest[round] = dataclasses.replace(
            found, arms={**before.arms, **found.arms}, attacks=found.attacks or before.attacks
        )
    return sorted(newest.values(), key=lambda each: -each.remaining), verdicts


def _read(file: Path, round: int) -> tuple[Evaluated, str]:
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TicketfindError(f"{file}: cannot read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise TicketfindError(f"{file}: expected the JSON object of an evaluation, found something else") from error
    given = given if isinstance(given, dict) else {}
    remaining, arms, verdict = given.get("remaining"), given.get("arms"), given.get("verdict")
    if not results.is_finite(remaining) or not 0 <= remaining <= 1:
        raise TicketfindError(f"{file}: remaining: expected a fraction, found {str(remaining)[:40]!r}")
    if not isinstance(arms, dict) or not isinstance(verdict, str):
        raise TicketfindError(f"{file}: expected arms (an object) and a verdict (a text)")
    found = {name: _stats(stats, f"{file}: {name[:40]!r}") for name, stats in arms.items()}
    return Evaluated(round, float(remaining), found, _attacks(given.get("attacks", {}), file)), verdict


def _attacks(given: Any, file: Path) -> dict[str, dict[str, Spread]]:
    """By attack and arm; evaluations of before there were attacks have none."""
    if not isinstance(given, dict) or not all(_has_arms(under) for under in given.values()):
        raise TicketfindError(f"{file}: attacks: expected an object of attacks, each with arms")
    where = f"{file}: attacks:"
    return {
        name: {arm: _spread(part, f"{where} {name[:40]!r}", arm[:40]) for arm, part in under["arms"].items()}
        for name, under in given.items()
    }


def _has_arms(under: Any) -> bool:
    return isinstance(under, dict) and isinstance(under.get("arms"), dict)


def _parts(stats: Stats) -> tuple[Spread, ...]:
    return stats.accuracy_early, stats.accuracy_end, stats.early_stop


def _is_usable(value: object) -> bool:
    """Whether it can be a measure or an iteration, and be squared."""
    return results.is_finite(value) and abs(value) <= 1e12


def _stats(given: Any, where: str) -> Stats:
    parts = given if isinstance(given, dict) else {}
    keys = ("accuracy_early", "accuracy_end", "early_stop")
    spreads = [_spread(parts.get(key), where, key) for key in keys]
    if len({len(found.values) for found in spreads}) > 1:
        raise TicketfindError(f"{where}: expected as many values of each kind")
    return Stats(*spreads)


def _spread(given: Any, where: str, key: str) -> Spread:
    values = given.get("values") if isinstance(given, dict) else None
    if not isinstance(values, list) or not values or not all(map(_is_usable, values)):
        raise TicketfindError(f"{where}: expected numbers in {key}.values")
    return Spread.of(map(float, values))


# ------------------------------------------------------------------------------------------------ claims


def _findings(run: RunDir, found: Sequence[Evaluated] = (), moved: Sequence[tuple[float, float]] = ()) -> Findings:
    log, rounds, recipe = run.log(), _rounds(run), run.recipe()
    sizes = [line["test_size"] for line in log if isinstance(line.get("test_size"), int)]
    iterations = [x for curve, _ in charts.curves(log, 0)[:1] for x in curve]
    return Findings(
        rounds=rounds,
        evaluated=found,
        movement=moved,
        tolerance=results.tolerance(rounds[0].stats, recipe.run.tolerance, sizes[0] if sizes else None),
        test_size=sizes[0] if sizes else None,
        step=max((b - a for a, b in itertools.pairwise(iterations)), default=1),
        last=iterations[-1] if iterations else None,
        apart=_apart(recipe),
        run=str(run.path),
    )


def _dropout(run: RunDir, other: RunDir) -> claims.Claim:
    """Claim 11 of a run and the same search without dropout, whichever is which.

    Raises TicketfindError where they differ in more than that.
    """
    rates = [_rate(each.recipe()) for each in (run, other)]
    if differing := [*differences(_without_dropout(run.recipe()), _without_dropout(other.recipe()))]:
        raise TicketfindError(
            f"{other.path}: expected the search of {run.path} with another dropout rate and nothing else that differs,"
            f" found {'; '.join(differing)}"
        )
    if all(rates) or not any(rates):
        raise TicketfindError(
            f"{other.path}: expected dropout (model.args {' or '.join(beside.RATES)}) in one of the two runs, none"
            f" in the other, found {rates[0]:g} in {run.path} and {rates[1]:g} here"
        )
    dropped, plain = (run, other) if rates[0] else (other, run)
    return beside.dropout_adds_up(_findings(dropped), _findings(plain), max(rates))


def _rate(recipe: Recipe) -> float:
    given = [recipe.model.args[name] for name in beside.RATES if name in recipe.model.args]
    return float(given[0]) if given and results.is_finite(given[0]) else 0.0


def _without_dropout(recipe: Recipe) -> Recipe:
    """A recipe but for its dropout rate, its name and what is no part of the question."""
    args = {name: value for name, value in recipe.model.args.items() if name not in beside.RATES}
    return dataclasses.replace(recipe, name="", model=dataclasses.replace(recipe.model, args=args), run=Run())


def _apart(recipe: Recipe) -> str | None:
    if recipe.model.trained:
        return "the dense network was trained elsewhere, and when it stops is not known"
    if recipe.prune.rewind == "lr":
        return "with --rewind lr a round goes on from trained weights: when it stops does not compare"
    return None
