"""The run directory: every path in it, the log, and what is done. No torch.

runs/NAME/  recipe.yaml  log.jsonl  init/  masks/  ticket.safetensors  evals/   (docs/architecture.md has the whole)
"""

import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ticketfind import TicketfindError, files
from ticketfind.layers import differences, from_layers, read_layer, to_yaml
from ticketfind.limits import SPARE, json_cost, read_json
from ticketfind.recipe import CONVENIENCES, Recipe

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None  # type: ignore[assignment]

MOST_LINE = 2**24
"""Bytes of a line of the log: 100,000 evaluations."""
_FOLDERS = ("init", "masks", "trained", "state")
"""What a search writes to, in a run directory."""
_OF_A_COMMAND = {"init.safetensors", "mask.safetensors", "log.txt", "exit-code", ".lock"}
"""What is written for a command that trains, in its folder (`commands`); any other file there is its own."""

RUNS = Path("runs")
LATEST = RUNS / "latest"


@dataclass(frozen=True)
class RunDir:
    """One run's folder. A file that exists in it is whole."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def log_file(self) -> Path:
        """One line per finished (round, replicate)."""
        return self.path / "log.jsonl"

    @property
    def drawn_file(self) -> Path:
        """One line per finished training that was there for the next mask alone."""
        return self.path / "drawn.jsonl"

    @property
    def lock_file(self) -> Path:
        """Held by the search that writes here."""
        return self.path / ".lock"

    @property
    def ticket_file(self) -> Path:
        """The winner, once the search is over and has found one."""
        return self.path / "ticket.safetensors"

    @property
    def finished_file(self) -> Path:
        """Its existence says that the search is over."""
        return self.path / "finished"

    def start_file(self, replicate: int, round: int | None = None) -> Path:
        """Weights and buffers that a replicate's rounds start from; `round` where each has its own (rewind: lr)."""
        return (
            self.path
            / "init"
            / (f"{replicate}.safetensors" if round is None else f"{round:02}-{replicate}.safetensors")
        )

    def trained_file(self, replicate: int, round: int = 0) -> Path:
        """Weights and buffers that a replicate's training in a round ended with: the dense one, and those that are to
        be trained on."""
        return self.path / "trained" / (f"{round:02}-{replicate}.safetensors" if round else f"{replicate}.safetensors")

    def forget_trained(self, rounds: range) -> None:
        """Remove what trainings of these rounds ended with; not the dense ones'."""
        for round in rounds:
            for file in self.trained_file(0).parent.glob(f"{round:02}-*.safetensors"):
                file.unlink()

    def mask_file(self, round: int, replicate: int) -> Path:
        """The masks that a round trains under."""
        return self.path / "masks" / f"{round:02}-{replicate}.safetensors"

    def masks(self) -> set[tuple[int, int]]:
        """(round, replicate) of every mask that is there."""
        names = (
            re.fullmatch(r"(\d{2,6})-(\d{1,6})", file.stem)
            for file in self.mask_file(0, 0).parent.glob("*.safetensors")
        )
        return {(int(found[1]), int(found[2])) for found in names if found}

    @property
    def arms_folder(self) -> Path:
        """Files of an outside program that trains, a folder for each training."""
        return self.path / "arms"

    @property
    def violated_folder(self) -> Path:
        """What there was when an invariant did not hold; it is kept whatever becomes of the run."""
        return self.path / "violated"

    def violated_file(self, round: int, replicate: int) -> Path:
        """Where a training's is."""
        return self.violated_folder / f"{round:02}-{replicate}.safetensors"

    @property
    def state_folder(self) -> Path:
        """Snapshots of the trainings under way."""
        return self.path / "state"

    def check(self) -> None:
        """Raise TicketfindError where the directory has gone, with a file system that went or by somebody's hand."""
        if not self.recipe_file.is_file():
            raise TicketfindError(
                f"{self.path}: the run directory has gone while the search was at work; put it back (is its disk"
                " mounted?), and the same command goes on"
            )

    @property
    def evals_folder(self) -> Path:
        """What evaluations of this run's tickets found, a file each, the round first in its name."""
        return self.path / "evals"

    @property
    def report_file(self) -> Path:
        """The report on the run."""
        return self.path / "report.html"

    @property
    def figures_folder(self) -> Path:
        """The figures of the report, as files of their own."""
        return self.path / "figures"

    def new_eval_file(self, round: int) -> Path:
        """A name, not yet taken, for what an evaluation found."""
        name = f"{round:02}-{time.strftime('%Y%m%dT%H%M%S')}"
        return next(path for path in _names(self.evals_folder / name, ".json") if not path.exists())

    # ------------------------------------------------------------------------------------------- the log

    def log(self) -> list[dict[str, Any]]:
        """The finished (round, replicate) trainings; a torn last line counts as not written."""
        return _entries(self.log_file)

    def drawn(self) -> list[dict[str, Any]]:
        """Those that were there for the next mask alone, with their `iterations`."""
        return _entries(self.drawn_file)

    def append(self, entry: Mapping[str, Any], log: Path | None = None) -> None:
        """Add one finished training to a log (`log_file` unless given), on disk when this returns."""
        file = log or self.log_file
        _drop_torn_line(file)
        try:
            is_new = not file.exists()
            with file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(entry, allow_nan=False) + "\n")
                opened.flush()
                os.fsync(opened.fileno())
            if is_new:
                files.sync_entries(self.path)
        except OSError as error:
            raise TicketfindError(f"{file}: cannot write: {error.strerror}") from error

    def finish(self) -> None:
        """Mark the search as over."""
        files.write_text(self.finished_file, "", root=self.path)

    @property
    def is_finished(self) -> bool:
        """True once every round is trained and the winner, if any, is written."""
        return self.finished_file.exists()

    def recipe(self) -> Recipe:
        """The run's resolved recipe. Raises TicketfindError where there is none."""
        if not self.recipe_file.is_file():
            raise TicketfindError(f"{self.path}: expected a run directory, found no recipe.yaml in it")
        return from_layers(read_layer(self.recipe_file), where=str(self.recipe_file))


def _entries(file: Path) -> list[dict[str, Any]]:
    """The entries of a log of trainings; a torn last line counts as not written."""
    if not file.is_file():
        return []
    entries = []
    for number, line in enumerate(_lines(file), 1):
        try:
            entry = read_json(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and type(entry.get("round")) is int and type(entry.get("replicate")) is int:
            entries.append(entry)
        else:
            found = line[:60].decode(errors="replace").strip()
            raise TicketfindError(
                f"{file}, line {number}: expected a JSON object of a finished training, found {found!r}"
            )
    return entries


def _lines(file: Path) -> Iterator[bytes]:
    """The whole lines of a log. Raises TicketfindError where they would take much more memory than the file."""
    cost = 0
    try:
        size = file.stat().st_size
        with file.open("rb") as log:
            while line := log.readline(MOST_LINE + 1):
                cost += json_cost(line)
                if cost > 3 * size + SPARE or len(line) > MOST_LINE:
                    raise TicketfindError(
                        f"{file}: expected lines as a search writes them, found them with too much in"
                    )
                if line.endswith(b"\n"):
                    yield line
    except OSError as error:
        raise TicketfindError(f"{file}: cannot read: {error.strerror}") from error


def _drop_torn_line(file: Path) -> None:
    """Cut what a crash left after the last newline."""
    if not file.exists():
        return
    try:
        raw = file.read_bytes()
        if raw and not raw.endswith(b"\n"):
            with file.open("r+b") as log:
                log.truncate(raw.rfind(b"\n") + 1)
    except OSError as error:
        raise TicketfindError(f"{file}: cannot write: {error.strerror}") from error


def claim(recipe: Recipe, out: Path | None) -> RunDir:
    """The directory for a search of this resolved recipe: `out`, else the first of runs/NAME, runs/NAME-2, ... that
    is free or holds a run of an equal recipe (to go on with, or to print). Touches nothing.

    Raises TicketfindError where `out` holds something else, naming the keys in which the recipes differ.
    """
    if out is not None:
        run = RunDir(out)
        if run.recipe_file.exists():
            _check_same(recipe, run)
        elif not _is_empty(run):
            raise TicketfindError(f"{out}: expected a run directory, an empty folder or nothing, found other files")
        return run
    return next(run for run in map(RunDir, _names(RUNS / recipe.name)) if _is_free_for(recipe, run))


def _is_free_for(recipe: Recipe, run: RunDir) -> bool:
    if _is_empty(run):
        return True
    with suppress(TicketfindError):
        return run.recipe_file.exists() and not list(differences(recipe, run.recipe(), but=CONVENIENCES))
    return False


def _is_empty(run: RunDir) -> bool:
    """True if there is nothing, or nothing but what a search that was killed as it began has left."""
    if not run.path.exists():
        return True
    of_no_matter = {run.lock_file, run.violated_folder, *files.leftovers(run.path)}
    return run.path.is_dir() and set(run.path.iterdir()) <= of_no_matter


def _names(path: Path, suffix: str = "") -> Iterator[Path]:
    yield path.with_name(path.name + suffix)
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}{suffix}")


@contextmanager
def sole_writer(run: RunDir) -> Iterator[None]:
    """Hold the run's directory. Raises TicketfindError where another process does; the hold ends with its process."""
    try:
        files.make_folder(run.path)
        lock = run.lock_file.open("w")
    except OSError as error:
        raise TicketfindError(f"{run.path}: cannot write: {error.strerror}") from error
    with lock:
        try:
            if fcntl is not None:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which forked processes would hold too
        except (BlockingIOError, PermissionError):
            raise TicketfindError(f"{run.path}: another search is at work here; wait for it or stop it") from None
        except OSError:
            pass  # a file system without locks
        for folder in (run.path, *map(run.path.joinpath, _FOLDERS)):
            files.sweep(folder)
        for log in (run.log_file, run.drawn_file):
            _drop_torn_line(log)
        yield


def begin(run: RunDir, recipe: Recipe) -> bool:
    """Write the recipe, if that is not done; True if it was not. Raises TicketfindError where another one is there."""
    if run.recipe_file.exists():
        _check_same(recipe, run)
        return False
    files.write_text(run.recipe_file, to_yaml(recipe))
    return True


def _check_same(recipe: Recipe, run: RunDir) -> None:
    differing = list(differences(recipe, run.recipe(), but=CONVENIENCES))
    if differing:
        raise TicketfindError(
            f"{run.path}: holds a run of another recipe ({'; '.join(differing)});"
            " give another --out, or the same settings"
        )


def forget_unstarted(run: RunDir) -> None:
    """Remove what the search wrote, if there is nothing in it to go on from: one that fails at once leaves nothing.

    Snapshots are something to go on from, and files of a command's own.
    """
    ours = {file for name in _OF_A_COMMAND for file in run.arms_folder.glob(f"*/{name}")}
    kept = {*_files(run.arms_folder), *_files(run.state_folder)} - ours
    if kept or any("failed" not in line for line in run.log()):
        return
    for file in (run.recipe_file, run.log_file, run.drawn_file, run.lock_file):
        file.unlink(missing_ok=True)
    for folder in (*map(run.path.joinpath, _FOLDERS), run.arms_folder):
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # it holds other files
        run.path.rmdir()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def make_latest(run: RunDir) -> None:
    """Point runs/latest to `run`."""
    with suppress(OSError):  # a file system without symbolic links: bare commands then ask for a run
        RUNS.mkdir(exist_ok=True)
        temporary = RUNS / f".latest-{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(run.path, RUNS))
        temporary.replace(LATEST)


def latest() -> RunDir:
    """The newest run. Raises TicketfindError where there is none."""
    if not (LATEST / "recipe.yaml").is_file():
        raise TicketfindError("no run found (runs/latest); run ticketfind search first, or name a run or ticket")
    return RunDir(Path(os.path.relpath(LATEST.resolve())))
