"""The program and its commands: parse, call, show. What they compute is elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TextIO

import typer

from ticketfind import TicketfindError, __version__, judging, options, signals, targets

if TYPE_CHECKING:
    from ticketfind.agreement import Between
    from ticketfind.recipe import Recipe
    from ticketfind.rundir import RunDir
    from ticketfind.terminal import Screen
    from ticketfind.ticket import Ticket

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
    screen = Screen(as_json=as_json, quiet=quiet)
    if note := layers.without_effect(recipe, base[0], asked):
        screen.message(note)
    _search(asked, out, dry_run, screen)


def _search(asked: "Recipe", out: Path | None, dry_run: bool, screen: "Screen") -> None:
    began = time.monotonic()
    from ticketfind import assemble, contents, outlook, plan, rundir, terminal, views
    from ticketfind import search as searching

    recipe, task = assemble.assemble(asked)
    planned, score = plan.make_plan(recipe, task.model), assemble.score_of(recipe)
    if dry_run:
        return outlook.show_plan(screen, recipe, planned)
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
        begun = not (planned.apart or planned.finetune or recipe.train.is_external)  # else one under way is done again
        kept = "what is done is kept" if begun else "trainings that are done are kept"
        with _resumable(f"{kept} in {run.path}", run, screen), terminal.SearchWatch(screen, signals.heed) as watch:
            rounds = searching.search(recipe, task, run, planned, score, watch)
    views.show_search(screen, run, rounds, time.monotonic() - began)


@contextmanager
def _resumable(kept: str, run: "RunDir", screen: "Screen") -> Iterator[None]:
    """A search that is stopped ends with a word on what is kept and how to go on."""
    with signals.training():
        try:
            yield
            return
        except signals.Stopped as stop:
            exit_code, told = stop.exit_code, kept
        except TicketfindError as error:  # as it was about to keep what it had done, for one
            noted = signals.noted()
            if noted is None:
                raise
            exit_code = noted.exit_code
            told = f"{error}; what was kept before that is in {run.path}"
        with suppress(OSError):  # a terminal that has gone
            screen.message(f"stopped; {told}, and the same command goes on from there")
        sys.exit(exit_code)


# ------------------------------------------------------------------------------------------------ export


@options.for_recipe("model", "model_arg", "data", "data_arg", "device")
def export(
    *,
    source: options.TicketOrRun = None,
    round: options.Round = None,
    replicate: options.Replicate = None,
    format: options.Format = options.ExportFormat.ticket,
    shrink: options.Shrink = False,
    out: options.ExportOut = None,
    force: options.Force = False,
    settings: options.Settings,
    trust: options.Trust = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a ticket as one safetensors file: mask and initial weights, not trained ones.

    --shrink needs the network and a few examples too: the ticket's own, or those that --model and --data name.
    """
    from ticketfind import terminal, ticket, views

    screen = terminal.Screen(as_json=as_json, quiet=quiet)
    found, name = targets.ticket_at(source, round, replicate)
    if shrink:
        if format is not options.ExportFormat.ticket:
            raise typer.BadParameter(f"--shrink writes a plain state dict; leave out --format {format.value}")
        trusted = trust or source is None or source.is_dir()
        return _export_shrunk(found, out or Path(f"{name}-shrunk.safetensors"), force, settings, trusted, screen)
    if settings:
        raise typer.BadParameter(f"{', '.join(settings)}: for --shrink")
    path = out or Path(f"{name}-{format.value}.safetensors")
    ticket.write_as(found, path, format.value, force=force)
    views.show_export(screen, found, path, format.value)


def _export_shrunk(
    found: "Ticket", path: Path, force: bool, settings: options.Settings, trusted: bool, screen: "Screen"
) -> None:
    from ticketfind import assemble, smaller, speed
    from ticketfind import shrink as shrinking

    recipe, task = assemble.of_ticket(found.about.recipe, settings, where=path, elsewhere=True, trusted=trusted, arms=1)
    if task.data is None:
        raise TicketfindError("--shrink: expected data, of which the network sees a few examples; give --data")
    found.apply(task.model)
    batches = [task.data.example(size)[0] for size in (1, recipe.train.batch_size)]
    small = shrinking.shrink(task.model, dict(found.masks), task.data.example(8)[0])
    shrinking.save(small, path, force=force)
    device = str(recipe.run.device)
    with signals.training():
        measured = speed.compared(task.model.eval(), small.model, batches, device)
    smaller.show(screen, path, small, measured, device)


# -------------------------------------------------------------------------------------------------- diff


def diff(
    a: options.SideA,
    b: options.SideB,
    round: options.Round = None,
    replicate: options.Replicate = None,
    exit_code: options.ExitCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show how much two masks agree, against chance, and whether the initial weights are the same.

    Of two runs (or a run and itself) also every replicate's mask with every other's.
    """
    from ticketfind import agreement, answers, terminal

    screen = terminal.Screen(as_json=as_json, quiet=quiet)
    try:
        (one, _), (other, _) = (targets.ticket_at(side, round, replicate) for side in (a, b))
        found = agreement.difference(one, other)
        between = _between(a, b, round) if replicate is None else None
    except TicketfindError as error:
        if exit_code:
            _fail(error, 2)
        raise
    taken = {"a": (a, one.about), "b": (b, other.about)}
    sides = {name: answers.Side(str(path), about.round, about.replicate) for name, (path, about) in taken.items()}
    answers.show_difference(screen, found, between, sides)
    if exit_code and not found.is_none:
        raise typer.Exit(1)


def _between(a: Path, b: Path, round: int | None) -> "Between | None":
    from ticketfind import agreement, contents

    one, other = targets.run_at(a), targets.run_at(b)
    if one is None or other is None:
        return None
    is_same = one.path.resolve() == other.path.resolve()
    return agreement.between(contents.tickets(one, round), None if is_same else contents.tickets(other, round))


# ----------------------------------------------------------------------------------------------- inspect


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
        run = targets.run_at(path)
        assert run is not None
        recipe = run.recipe()
        own = recipe.run
        found = results.rounds_of(run.log(), replicates=own.replicates, given_tolerance=own.tolerance)
        views.show_run(screen, run, recipe, found)


def _inspect_model(spec: str, settings: options.Settings, screen: "Screen") -> None:
    from ticketfind import assemble, layers, outlook, plan, train

    data = settings.get("data.spec")
    base = layers.base_layers(None, spec, data)
    settings = {"run.tolerance": 0, **settings}  # nothing is matched here
    asked = layers.from_layers(*base, layers.nested({"model.spec": spec, **settings}))
    if data is None:
        found = plan.candidates(asked, assemble.model_alone(asked))
        return outlook.show_model(screen, spec, found, plan.weights_kept(asked, found)[1])
    recipe, task = assemble.assemble(asked)
    found = plan.candidates(recipe, task.model)
    kept = plan.weights_kept(recipe, found)[1]
    if len(kept) < 2:
        return outlook.show_model(screen, spec, found, kept)
    assert task.data is not None
    planned = plan.make_plan(recipe, task.model)
    seconds = [] if recipe.train.is_external else train.step_seconds(task, recipe.train)
    outlook.show_model(screen, spec, found, kept, outlook.Outlook(recipe, planned, task.data.resident_bytes, seconds))


# ----------------------------------------------------------------------------------------------- recipes


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


# --------------------------------------------------------------------------------------------- the program

COMMANDS: dict[str, Callable[..., None]] = {
    "search": search,
    "eval": judging.evaluate,
    "stability": judging.stability,
    "export": export,
    "diff": diff,
    "report": judging.report,
    "verify": judging.verify,
    "inspect": inspect,
    "recipes": recipes,
    "bench": bench,
}
"""In the order of `--help`."""
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def _fail(error: TicketfindError, code: int) -> NoReturn:
    from ticketfind import terminal

    if "--debug" in sys.argv:
        raise error
    terminal.error(str(error))
    sys.exit(code)


def _let_go(stream: TextIO) -> None:
    """Forget what a terminal that has gone can no longer be told: Python would end with exit code 120 over it."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
        for stream in (sys.stdout, sys.stderr):
            _let_go(stream)
