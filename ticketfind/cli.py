"""The commands: parse, call, show. What they compute is elsewhere."""

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ticketfind import TicketfindError, __version__, options, signals

if TYPE_CHECKING:
    from ticketfind.recipe import Recipe
    from ticketfind.rundir import RunDir
    from ticketfind.terminal import Screen
    from ticketfind.ticket import Ticket
    from ticketfind.verify import Check

app = typer.Typer(
    name="ticketfind",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"ticketfind {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Finds lottery tickets (sparse subnetworks that train as well as the whole) in any PyTorch model."""


# ------------------------------------------------------------------------------------------------ search


@app.command()
@options.for_recipe()
def search(
    settings: options.Settings,
    recipe: options.RecipeArg = None,
    out: options.RunOut = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find a ticket: train, prune, rewind, again; the winner goes to runs/NAME/ticket.safetensors.

    The same command, started again, goes on where an interrupted search stopped.
    """
    from ticketfind import layers
    from ticketfind.terminal import Screen

    base = layers.base_layers(recipe, settings.get("model.spec"), settings.get("data.spec"))
    asked = layers.from_layers(*base, layers.nested(settings))
    _search(asked, out, dry_run, Screen(as_json=as_json, quiet=quiet))


def _search(asked: "Recipe", out: Path | None, dry_run: bool, screen: "Screen") -> None:
    began = time.monotonic()
    from ticketfind import assemble, contents, outlook, rundir, terminal, views
    from ticketfind import search as searching

    recipe, task = assemble.assemble(asked)
    plan, score = searching.make_plan(recipe, task.model), assemble.score_function(recipe)
    if dry_run:
        return outlook.show_plan(screen, recipe, plan)
    run = rundir.claim(recipe, out)
    rounds = contents.finished_rounds(run, recipe)
    if run.is_finished and rounds:
        screen.message(f"{run.path}: this search is finished; its result:")
        views.show_rounds(screen, rounds)
    else:
        doing = "goes on with" if run.recipe_file.exists() else "searches"
        replicates = terminal.plural(recipe.run.replicates, "replicate")
        what = views.subject(recipe.model.spec, recipe.data.spec)
        screen.message(f"{run.path}: {doing} {what}, {replicates}, {task.device}")
        with _resumable(run, screen), terminal.SearchWatch(screen, signals.heed) as watch:
            rounds = searching.search(recipe, task, run, plan, score, watch)
    views.show_search(screen, run, rounds, time.monotonic() - began)


@contextmanager
def _resumable(run: "RunDir", screen: "Screen") -> Iterator[None]:
    """A search that is stopped ends with a word on how to go on."""
    with signals.training():
        try:
            yield
            return
        except signals.Stopped as stop:
            exit_code, told = stop.exit_code, f"what is done is kept in {run.path}"
        except TicketfindError as error:  # as it was about to keep what it had done, for one
            noted = signals.noted()
            if noted is None:
                raise
            exit_code = noted.exit_code
            told = f"{error}; what was kept before that is in {run.path}"
        with suppress(OSError):  # a terminal that has gone
            screen.message(f"stopped; {told}, and the same command goes on from there")
        sys.exit(exit_code)


# -------------------------------------------------------------------------------------------------- eval


@app.command("eval")
@options.for_recipe(
    "model", "model_arg", "data", "data_arg", "seed", "tolerance", "device", "precision", "engine", "arms_at_once"
)
def evaluate(
    *,
    target: options.TicketOrRun = None,
    noise: options.Noise = None,
    weight_noise: options.WeightNoise = None,
    control: options.Controls = None,
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
    from ticketfind import assemble, contents, devices, experiments, files, masks, terminal, views
    from ticketfind.ticket import load_ticket

    screen = terminal.Screen(as_json=as_json, quiet=quiet)
    run = _run_at(target)
    tickets = [load_ticket(str(target))] if run is None else contents.tickets(run, round)
    if run is None and round is not None:
        raise typer.BadParameter("--round is for a run; a ticket file is one ticket")
    extras = [each.value for each in dict.fromkeys(control or ())]
    design = experiments.Design(
        tickets=tickets,
        trials=trials or experiments.default_trials(len(tickets), run is not None),
        noise=sorted(set(noise or ())),
        weight_noise=sorted(set(weight_noise or ())),
        extras=extras,
        trained=contents.dense_weights(run, tickets) if run is not None and "one-shot" in extras else (),
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
        progress.begin(arms * int(resolved.train.iterations), 0)
        found = experiments.evaluate(
            design,
            task,
            resolved.train,
            first_seed=experiments.unseen_seed(resolved.run) if seed is None else seed,
            way=devices.Way.of(resolved.run),
            groups=masks.make_groups([*tickets[0].masks], resolved.prune.fraction, resolved.prune.scope),
            tolerance=resolved.run.tolerance,
            tick=progress.tick,
            folder=Path(folder),
        )
    described = views.evaluation_json(found, str(target or (run and run.path)), time.monotonic() - began)
    views.show_evaluation(screen, found, described)
    if run is not None:
        files.write_text(run.new_eval_file(tickets[0].about.round), terminal.dump(described), root=run.path)


# --------------------------------------------------------------------------------------------- stability


@app.command()
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
    run = _run_at(path) if path is None or path.is_dir() else None
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
        asked = layers.from_layers(run.recipe().plain(), layers.nested(settings))
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


# ------------------------------------------------------------------------------------------------ export


@app.command()
def export(
    source: options.TicketOrRun = None,
    round: options.Round = None,
    replicate: options.Replicate = None,
    format: options.Format = options.ExportFormat.ticket,
    out: options.ExportOut = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a ticket as one safetensors file: mask and initial weights, not trained ones."""
    from ticketfind import terminal, ticket, views

    screen = terminal.Screen(as_json=as_json, quiet=quiet)
    found, name = _ticket_at(source, round, replicate)
    path = out or Path(f"{name}-{format.value}.safetensors")
    ticket.write_as(found, path, format.value, force=force)
    views.show_export(screen, found, path, format.value)


# -------------------------------------------------------------------------------------------------- diff


@app.command()
def diff(
    a: options.SideA,
    b: options.SideB,
    round: options.Round = None,
    replicate: options.Replicate = None,
    exit_code: options.ExitCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show how much two masks agree, against chance, and whether the initial weights are the same."""
    from ticketfind import experiments, terminal, views

    screen = terminal.Screen(as_json=as_json, quiet=quiet)
    try:
        found = experiments.difference(_ticket_at(a, round, replicate)[0], _ticket_at(b, round, replicate)[0])
    except TicketfindError as error:
        if exit_code:
            _fail(error, 2)
        raise
    views.show_difference(screen, found)
    if exit_code and not (found.same_masks and found.same_init):
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------------------ report


@app.command()
def report(
    run: options.RunArg = None,
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
    found = _run_at(run)
    if found is None:
        raise TicketfindError(f"{run}: expected a run directory, found a file")
    views.show_report(screen, found, reporting.write(found, out), time.monotonic() - began)


# ------------------------------------------------------------------------------------------------ verify


@app.command()
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
    run = _run_at(target)
    file = target if run is None else run.ticket_file
    assert file is not None
    found = checks.of_ticket(file) if run is None else checks.of_run(run)
    if retrain and all(check.passed is not False for check in found):
        found.append(_retrained(file, settings, trust or run is not None, screen))
    views.show_checks(screen, str(target or file.parent), found, time.monotonic() - began)
    if any(check.passed is False for check in found):
        raise typer.Exit(1)


def _retrained(file: Path, settings: dict[str, Any], trust: bool, screen: "Screen") -> "Check":
    from ticketfind import assemble, experiments, terminal
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
            experiments.retrain(ticket, task, recipe.train, tick=progress.tick, folder=Path(folder))
        )


# ----------------------------------------------------------------------------------------------- inspect


@app.command()
@options.for_recipe(but=("model", "trained", "trainer", "train_command"))
def inspect(
    settings: options.Settings,
    target: options.Anything = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what is in a ticket or a run, or what a search would do with a model before it does it.

    Of a model: which parameters can be pruned, why not the rest, and the weights left in each round; with --data also
    the iterations, the memory and the measured time of a training step.
    """
    from ticketfind import results, terminal, views

    screen = terminal.Screen(as_json=as_json, quiet=quiet)
    path = None if target is None else Path(target)
    is_file = path is not None and path.suffix != ".py" and (path.is_file() or path.suffix == ".safetensors")
    is_model = path is not None and not path.is_dir() and not is_file
    if not is_model and settings:
        raise typer.BadParameter(
            f"{', '.join(settings)}: for models; {target or 'the latest run'} has settings of its own"
        )
    if is_model:
        assert target is not None
        _inspect_model(target, settings, screen)
    elif path is not None and not path.is_dir():
        from ticketfind.ticket import load_ticket

        views.show_ticket(screen, load_ticket(path), path)
    else:
        run = _run_at(path)
        assert run is not None
        recipe = run.recipe()
        own = recipe.run
        found = results.rounds_of(run.log(), replicates=own.replicates, given_tolerance=own.tolerance)
        views.show_run(screen, run, recipe, found)


def _inspect_model(spec: str, settings: options.Settings, screen: "Screen") -> None:
    from ticketfind import assemble, layers, outlook, prunable, train
    from ticketfind import search as searching

    data = settings.get("data.spec")
    base = layers.base_layers(None, spec, data)
    settings = {"run.tolerance": 0, **settings}  # nothing is matched here
    asked = layers.from_layers(*base, layers.nested({"model.spec": spec, **settings}))
    only, skip = asked.prune.only, asked.prune.skip
    if data is None:
        found = prunable.candidates(assemble.model_alone(asked), only=only, skip=skip)
        return outlook.show_model(screen, spec, found, searching.weights_kept(asked, found)[1])
    recipe, task = assemble.assemble(asked)
    found = prunable.candidates(task.model, only=only, skip=skip)
    kept = searching.weights_kept(recipe, found)[1]
    if len(kept) < 2:
        return outlook.show_model(screen, spec, found, kept)
    assert task.data is not None
    plan = searching.make_plan(recipe, task.model)
    seconds = [] if recipe.train.is_external else train.step_seconds(task, recipe.train)
    outlook.show_model(screen, spec, found, kept, outlook.Outlook(recipe, plan, task.data.resident_bytes, seconds))


# ----------------------------------------------------------------------------------------------- recipes


@app.command()
def recipes(
    name: options.ShippedName = None,
    time: options.Timed = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List the recipes that come with ticketfind, and what each costs; or print one, to be saved and edited."""
    from ticketfind import advice, catalog, layers, terminal

    screen = terminal.Screen(as_json=as_json, quiet=quiet)
    if name is not None:
        return advice.show_recipe(screen, catalog.entry(layers.shipped_file(name), timed=time))
    advice.show_recipes(screen, [catalog.entry(file, timed=time) for file in layers.shipped().values()])


# ------------------------------------------------------------------------------------------------- bench


@app.command()
@options.for_recipe("model", "model_arg", "data", "data_arg", "batch_size", "optimizer", "device", "precision")
def bench(
    settings: options.Settings,
    blocks: options.Blocks = 5,
    seconds: options.Seconds = 1.0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Time training steps on this machine, one arm and several, against the loop that people write; about a minute."""
    from ticketfind import assemble, devices, layers, outlook, terminal
    from ticketfind import bench as timing

    screen = terminal.Screen(as_json=as_json, quiet=quiet)
    base = layers.base_layers(None, settings.get("model.spec"), settings.get("data.spec"))
    asked = layers.from_layers(*base, layers.nested({"run.tolerance": 0, **settings}))
    recipe, task = assemble.assemble(asked)
    ways, way = timing.ways(task.device), devices.Way.of(recipe.run)
    cases = timing.cases(task, recipe.train, base=way, ways=ways, arms=(5, 10))
    with signals.training(), terminal.Progress(screen, "timing", signals.heed) as progress:
        progress.begin(blocks * len(cases), 0)
        found = timing.measure(cases, blocks=blocks, seconds=seconds, tick=progress.tick)
    for text in dict.fromkeys(note for case in cases for note in case.notes):
        screen.message(text)
    outlook.show_bench(screen, recipe, found)


# ------------------------------------------------------------------------------------------------ shared


def _run_at(path: Path | None) -> "RunDir | None":
    """The run at `path`, the latest for None; None where `path` is a file."""
    from ticketfind import rundir

    if path is None:
        return rundir.latest()
    if path.is_dir():
        run = rundir.RunDir(path)
        run.recipe()
        return run
    if not path.exists():
        raise TicketfindError(f"{path}: expected a ticket file or a run directory, found nothing of that name")
    return None


def _ticket_at(path: Path | None, round: int | None, replicate: int | None) -> "tuple[Ticket, str]":
    """The ticket in a file or of a run, and a name for what is made of it."""
    from ticketfind import contents
    from ticketfind.ticket import load_ticket

    run = _run_at(path)
    if run is not None:
        chosen = contents.chosen(run, round)
        which = chosen.replicate if replicate is None else replicate
        return contents.load(run, chosen.round, which), run.path.name
    assert path is not None
    if round is not None or replicate is not None:
        raise TicketfindError(f"{path}: is one ticket; --round and --replicate are for run directories")
    return load_ticket(path), path.stem


def _fail(error: TicketfindError, code: int) -> NoReturn:
    from ticketfind import terminal

    if "--debug" in sys.argv:
        raise error
    terminal.error(str(error))
    sys.exit(code)


def main() -> None:
    """The console script: errors become one line each, exit code 1; usage and recipe errors 2."""
    signals.install()
    stdout = sys.stdout
    try:
        app()
    except signals.Stopped as stop:
        with suppress(OSError):  # a terminal that has gone
            print("stopped", file=sys.stderr)
        sys.exit(stop.exit_code)
    except TicketfindError as error:
        from ticketfind.recipe import RecipeError

        _fail(error, 2 if isinstance(error, RecipeError) else 1)
    except OSError as error:  # a place that cannot be looked at: no permission, a name too long, a disk that has gone
        if error.filename is None:
            raise
        _fail(TicketfindError(f"{error.filename}: cannot read: {error.strerror}"), 1)
    finally:
        sys.stdout = stdout
