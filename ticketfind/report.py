"""A run's report: what its log, its evaluations and its weights say, as charts, as claims, and as a page. No torch."""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ticketfind import TicketfindError, __version__, beside, charts, claims, figures, files, movement, page, results
from ticketfind.claims import Findings
from ticketfind.layers import differences, to_yaml
from ticketfind.recipe import Recipe, Run
from ticketfind.results import Evaluated, Round, Spread, Stats
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
    found, verdicts, left_out = evaluations(run)
    chosen = results.winner_of(rounds) or rounds[-1]
    weights = movement.of_run(run, chosen.round or 1, _best_first(chosen))
    judged = claims.of_run(_findings(run, found, weights.means))
    if other is not None:
        judged = [claim if claim.number != 11 else _dropout(run, other) for claim in judged]
    planned = [*charts.of_run(recipe, rounds, log, found, weights, chosen)]
    notes = [*weights.notes, *left_out]
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
            notes=notes,
            versions={"report written by": f"ticketfind {__version__}", **_versions(run)},
        )
    )
    files.write_text(path, text, root)
    return Written(path, written, judged, notes)


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


@dataclass(frozen=True)
class _Evaluation:
    """One file."""

    found: Evaluated
    verdict: str
    settings: Mapping[str, int | None]
    """What must agree, and be known, for attacks of two evaluations to be of the same networks and examples; by the
    name that it has in messages."""


_SETTINGS = {"attack_examples": "examples", "trials": "trials", "seed": "seed"}
"""Keys of an evaluation, and what they are called."""


def evaluations(run: RunDir) -> tuple[list[Evaluated], dict[int, str], list[str]]:
    """Each evaluated round, densest first; each round's newest verdict; and which attacks are left out, and why.

    Of each arm the newest is taken, and of each attack and arm the newest of those evaluations whose settings are the
    round's newest. Raises TicketfindError for a file that is not as `eval` writes it.
    """
    read: dict[int, list[_Evaluation]] = {}
    for file in sorted(run.evals_folder.glob("*.json"), key=lambda file: file.stem):
        if (number := re.match(r"\d{1,6}(?=-)", file.name)) is None:
            raise TicketfindError(f"{file}: expected the name of an evaluation, NN-TIME.json")
        round = int(number[0])
        read.setdefault(round, []).append(_read(file, round))
    together = sorted((_together(each) for each in read.values()), key=lambda each: -each[0].remaining)
    verdicts = {round: each[-1].verdict for round, each in read.items()}
    return [found for found, _ in together], verdicts, [note for _, notes in together for note in notes]


def _together(read: Sequence[_Evaluation]) -> tuple[Evaluated, list[str]]:
    """A round's evaluations, oldest first, as one, and notes on the attacks that are in none that is taken."""
    found = read[-1].found
    arms = {name: stats for each in read for name, stats in each.found.arms.items()}
    attacked = [each for each in read if each.found.attacks]
    if not attacked:
        return dataclasses.replace(found, arms=arms), []
    newest = attacked[-1]
    alike = [each for each in attacked if each is newest or not _unlike(each, newest)]
    attacks: dict[str, dict[str, Spread]] = {}
    for each in alike:
        for name, under in each.found.attacks.items():  # each evaluation may have another ticket as `against`
            others = {arm: part for arm, part in under.items() if arm != "against" or each is newest}
            attacks[name] = attacks.get(name, {}) | others
    notes = [
        f"Round {found.round}: {', '.join(missing)} of an earlier evaluation cannot stand beside the newest and"
        f" {'is' if len(missing) == 1 else 'are'} left out: {'; '.join(_unlike(each, newest))}."
        for each in attacked
        if (missing := [name[:40] for name in sorted(each.found.attacks, key=_strength) if name not in attacks])
    ]
    ordered = {name: attacks[name] for name in sorted(attacks, key=_strength)}
    return dataclasses.replace(newest.found, arms=arms, attacks=ordered), notes


def _unlike(one: _Evaluation, newest: _Evaluation) -> list[str]:
    """The settings that are not known to be the same, in words."""
    pairs = [(name, one.settings[name], newest.settings[name]) for name in newest.settings]
    return [
        f"{name} not known" if None in (ours, theirs) else f"{name} {ours}, not {theirs}"
        for name, ours, theirs in pairs
        if ours is None or ours != theirs
    ]


def _strength(attack: str) -> tuple[bool, str, float]:
    """To sort attacks by: none first, then by kind and epsilon."""
    kind, _, epsilon = attack.partition(":")
    return attack != "clean", kind, float(epsilon) if re.fullmatch(r"\d+(\.\d+)?(e[+-]?\d+)?", epsilon) else 0.0


def _read(file: Path, round: int) -> _Evaluation:
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
    settings = {name: given.get(key) for key, name in _SETTINGS.items()}
    if not all(value is None or type(value) is int for value in settings.values()):
        raise TicketfindError(f"{file}: expected whole numbers, or null, in {', '.join(_SETTINGS)}")
    inputs = given.get("attack_range")
    if inputs is not None and not (isinstance(inputs, list) and len(inputs) == 2 and all(map(_is_usable, inputs))):
        raise TicketfindError(f"{file}: attack_range: expected two numbers or null, found {str(inputs)[:40]!r}")
    evaluated = Evaluated(
        round,
        float(remaining),
        found,
        _attacks(given.get("attacks", {}), file),
        settings["examples"],
        None if inputs is None else (float(inputs[0]), float(inputs[1])),
    )
    replicates = found["ticket"].replicates if "ticket" in found else None  # of one ticket each trial is one
    return _Evaluation(evaluated, verdict, {**settings, "replicates": replicates})


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
