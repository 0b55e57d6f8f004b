"""The commands that judge what a search has found: eval, stability, report, verify. `cli` says how they are called."""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ticketfind import TicketfindError, flags, options, signals, targets

if TYPE_CHECKING:
    from ticketfind.terminal import Screen
    from ticketfind.ticket import Ticket
    from ticketfind.verify import Check

# -------------------------------------------------------------------------------------------------- eval


@options.for_recipe(
    "model", "model_arg", "data", "data_arg", "seed", "tolerance", "device", "precision", "engine", "arms_at_once"
)
def evaluate(
    *,
    target: options.TicketOrRun = None,
    noise: options.Noise = None,
    weight_noise: options.WeightNoise = None,
    control: options.Controls = None,
    against: options.Against = None,
    attack: options.Attacks = None,
    attack_examples: options.AttackExamples = 1000,
    trials: options.Trials = None,
    round: options.Round = None,
    settings: options.Settings,
    trust: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train the ticket, its noisy twins and its controls (dense, reinit, random) alike, and compare.

    A ticket file is enough: its recipe is inside it. The answer is winning, matching but not special, not matching, or
    inconclusive.
    """
    began = time.monotonic()
    from ticketfind import answers, assemble, contents, devices, experiments, files, layers, masks, recipe, terminal
    from ticketfind.attack import Attack
    from ticketfind.ticket import load_ticket

    screen = terminal.Screen(as_json=as_json, quiet=quiet)
    run = targets.run_at(target)
    tickets = [load_ticket(str(target))] if run is None else contents.tickets(run, round)
    if run is None and round is not None:
        raise typer.BadParameter("--round is for a run; a ticket file is one ticket")
    trials = trials or experiments.default_trials(len(tickets), run is not None)
    others, which = _others(against, tickets[0].remaining, most=trials * len(tickets))
    extras = [each.value for each in dict.fromkeys(control or ())]
    design = experiments.Design(
        tickets=tickets,
        trials=trials,
        noise=sorted(set(noise or ())),
        weight_noise=sorted(set(weight_noise or ())),
        extras=extras,
        trained=contents.dense_weights(run, tickets) if run is not None and "one-shot" in extras else (),
        against=others,
        attacks=[Attack(*each) for each in flags.attacks(attack or [])],
        attack_examples=attack_examples,
    )
    seed = settings.pop("run.seed", None)  # of the trials; the recipe's own decides which examples are held out
    trusted = trust or run is not None
    own, arms = tickets[0].about.recipe, design.trainings
    resolved, task = assemble.of_ticket(own, settings, where=target, elsewhere=run is None, trusted=trusted, arms=arms)
    with (
        signals.training(),
        terminal.Progress(screen, "training", signals.heed) as progress,
        tempfile.TemporaryDirectory(prefix="ticketfind-") as folder,
    ):
        found = experiments.evaluate(
            design,
            task,
            resolved.train,
            first_seed=experiments.unseen_seed(resolved.run) if seed is None else seed,
            way=devices.Way.of(resolved.run),
            groups=masks.make_groups([*tickets[0].masks], resolved.prune.fraction, resolved.prune.scope),
            tolerance=resolved.run.tolerance,
            begin=lambda total: progress.begin(total, 0),
            tick=progress.tick,
            skip=progress.skip,
            folder=Path(folder),
        )
    if which is not None:
        found = dataclasses.replace(found, notes=(which, *found.notes))
    described = answers.evaluation_json(
        found, str(target or (run and run.path)), str(resolved.data.spec), time.monotonic() - began
    )
    answers.show_evaluation(screen, found, described)
    if run is None:
        return
    if differing := [*layers.differences(resolved, assemble.for_ticket(run.recipe()), but=recipe.ASIDE)]:
        screen.message(f"not kept in {run.path}, whose settings are others: {'; '.join(differing)}")
    else:
        files.write_text(run.new_eval_file(tickets[0].about.round), terminal.dump(described), root=run.path)


def _others(path: Path | None, remaining: float, *, most: int) -> "tuple[list[Ticket], str | None]":
    """The tickets of --against, at most as many as there are trainings of each arm, and which they are."""
    from ticketfind import contents, terminal
    from ticketfind.ticket import load_ticket

    if path is None:
        return [], None
    run = targets.run_at(path)
    found = [load_ticket(path)] if run is None else contents.tickets(run, contents.nearest_round(run, remaining))
    found = found[:most]
    about = f"{path}, round {found[0].about.round}, {terminal.percent(found[0].remaining)} of the weights"
    return found, f"against: {about}, {len(found)} of them"


# --------------------------------------------------------------------------------------------- stability


@options.for_recipe(
    "model_arg", "checkpoint", "checkpoint_key", "allow_mismatch", "data", "data_arg", "augment", "loss", "metric",
    "iterations", "epochs", "batch_size", "lr", "optimizer", "replicates", "seed", "device", "precision", "engine",
    "arms_at_once",
)  # fmt: skip
def stability(
    *,
    target: options.StabilityTarget = None,
    at: options.At = None,
    threshold: options.Threshold = 2.0,
    round: options.SparseRound = None,
    settings: options.Settings,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find the iteration to rewind to: the earliest from which on a training no longer depends on the data's order.

    Pairs of trainings share their first k iterations; the barrier is what the error rises by on the line between their
    ends. Of a run the winner's sparse networks are looked at too, from the run's own rewind point on.
    """
    began = time.monotonic()
    from ticketfind import advice, assemble, contents, devices, layers, results, terminal
    from ticketfind import stability as finder

    screen = terminal.Screen(as_json=as_json, quiet=quiet)
    if str(target).endswith(".safetensors"):
        raise TicketfindError(f"{target}: expected a model, a recipe or a run directory, found a file of weights")
    path = None if target is None else Path(target)
    run = targets.run_at(path) if path is None or path.is_dir() else None
    tickets: list[Ticket] = []
    if run is None:
        if round is not None:
            raise typer.BadParameter("--round is for a run")
        is_recipe = target in layers.shipped() or str(target).endswith((".yaml", ".yml"))
        named = {} if is_recipe else {"model.spec": target}
        base = layers.base_layers(target if is_recipe else None, named.get("model.spec"), settings.get("data.spec"))
        asked = layers.from_layers(*base, layers.nested({"run.tolerance": 0, **named, **settings}))
    else:
        settings = {"run.engine": "auto", "run.arms_at_once": None, **settings}
        asked = layers.from_layers(assemble.masks_given(run.recipe()).plain(), layers.nested(settings))
        if round is not None or results.winner_of(contents.finished_rounds(run)):
            tickets = contents.tickets(run, round)
    recipe, task = assemble.assemble(asked, arms=finder.trainings(asked.run))
    questions = finder.questions(task, recipe, tickets, at or (), threshold, screen.message)
    with signals.training(), terminal.Progress(screen, "training", signals.heed) as progress:
        progress.begin(finder.most_iterations(questions, recipe.train), 0)
        found = [
            finder.find(
                question,
                task,
                recipe.train,
                way=devices.Way.of(recipe.run),
                tick=progress.tick,
                skip=progress.skip,
                note=screen.message,
            )
            for question in questions
        ]
    shown = str(target or (run and run.path))
    advice.show_stability(screen, shown, found, finder.POINTS, time.monotonic() - began)


# ------------------------------------------------------------------------------------------------ report


def report(
    run: options.RunArg = None,
    beside: options.Beside = None,
    out: options.ReportOut = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write what a run has found as one HTML page: figures, tables, and the paper's claims held against it.

    It needs nothing from elsewhere to be read. Each figure is written as a PNG and an SVG file too.
    """
    began = time.monotonic()
    from ticketfind import report as reporting
    from ticketfind import terminal, views

    screen = terminal.Screen(as_json=as_json, quiet=quiet)
    found = targets.run_at(run)
    other = None if beside is None else targets.run_at(beside)
    for path, there in ((run, found), (beside, other)):
        if path is not None and there is None:
            raise TicketfindError(f"{path}: expected a run directory, found a file")
    assert found is not None
    views.show_report(screen, found, reporting.write(found, out, other), time.monotonic() - began)


# ------------------------------------------------------------------------------------------------ verify


@options.for_recipe("model", "model_arg", "data", "data_arg", "device")
def verify(
    *,
    target: options.TicketOrRun = None,
    retrain: options.Retrain = False,
    settings: options.Settings,
    trust: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check that a ticket file or a run is what it says it is; exit with 1 where it is not.

    Of a file: that its contents are as they were written. Of a run: masks, counts and rewinding in every round. With
    --retrain the ticket is trained once more from the file alone, and must reach the accuracy that it claims.
    """
    began = time.monotonic()
    from ticketfind import terminal, views
    from ticketfind import verify as checks

    screen = terminal.Screen(as_json=as_json, quiet=quiet)
    run = targets.run_at(target)
    file = target if run is None else run.ticket_file
    assert file is not None
    found = checks.of_ticket(file) if run is None else checks.of_run(run)
    if retrain and all(check.passed is not False for check in found):
        found.append(_retrained(file, settings, trust or run is not None, screen))
    views.show_checks(screen, str(target or file.parent), found, time.monotonic() - began)
    if any(check.passed is False for check in found):
        raise typer.Exit(1)


def _retrained(file: Path, settings: dict[str, Any], trust: bool, screen: "Screen") -> "Check":
    from ticketfind import assemble, devices, retraining, terminal
    from ticketfind import verify as checks
    from ticketfind.ticket import load_ticket

    ticket = load_ticket(file)
    recipe, task = assemble.of_ticket(ticket.about.recipe, settings, where=file, elsewhere=True, trusted=trust, arms=1)
    with (
        signals.training(),
        terminal.Progress(screen, "training", signals.heed) as progress,
        tempfile.TemporaryDirectory(prefix="ticketfind-") as folder,
    ):
        progress.begin(int(recipe.train.iterations) - ticket.about.iteration, 0)
        return checks.of_retraining(
            retraining.retrain(
                ticket, task, recipe.train, way=devices.Way.of(recipe.run), tick=progress.tick, folder=Path(folder)
            )
        )
