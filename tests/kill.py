"""Kill searches at random moments until each is finished; they must leave what one that was never killed leaves.

    python tests/kill.py --kills 200

Each attempt is a process of its own, forked from this one, which has torch imported, and is ended by SIGKILL: at a
random time, or at a random step of a random file's way to the disk (before, within and after its writing, before and
after its renaming). Now and then half a line is added to the log after a kill, as a power cut leaves it.
"""

import argparse
import collections
import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ticketfind import assemble, files, forks, layers, plan, rundir, search, snapshots, tensorfile
from ticketfind.results import Round

RECIPE: dict[str, Any] = {
    "name": "killed",
    "train": {"iterations": 400, "eval_every": 100, "batch_size": 60, "optimizer": "adam", "lr": 1.2e-3},
    "prune": {"rounds": 3, "rewind": "150it", "scope": "layer"},
    "run": {"replicates": 3, "device": "cpu", "snapshot": 0.02},
}
ENGINES = (*(("processes",) if forks.possible() else ()), "eager", "stacked")
"""Those that the machine has: processes take Linux and a second core."""


class Silent:
    """A search's watch."""

    def begin(self, total: int, done: int) -> None:
        pass

    def tick(self, iterations: int) -> None:
        pass

    def skip(self, iterations: int) -> None:
        pass

    def round(self, finished: Round) -> None:
        pass

    def note(self, text: str) -> None:
        print(text, flush=True)


def attempt(out: Path, engine: str, prepare: Callable[[], None] = lambda: None) -> int:
    """Start a search in a process of its own; the process's number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        snapshots.SHARE = 1.0  # as many as there is time for
        prepare()
        recipe, task = assemble.assemble(layers.from_layers(RECIPE, {"run": {"engine": engine}}))
        planned = plan.make_plan(recipe, task.model)
        search.search(recipe, task, rundir.claim(recipe, out), planned, assemble.score_of(recipe), Silent())
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def at_a_file(number: int, moment: str, name: str = "") -> Callable[[], None]:
    """Have the search, whichever of its processes writes, kill itself at a moment of a file's way to the disk.

    number: which file, of those with `name` in their path.
    """

    def prepare() -> None:
        own, count = os.getpid(), 0
        save, sync, replace = tensorfile.save_file, files._sync, Path.replace

        def die() -> None:
            os.kill(own, signal.SIGKILL)
            time.sleep(10)  # a process of the search's own, which ends with it

        def is_now(at: str, path: Path) -> bool:
            nonlocal count
            here = at == moment and name in f"{path.parent.name}/{path.name.removeprefix('.')}"
            count += here
            return here and count == number

        def save_half(tensors: Any, path: Path, metadata: Any) -> None:
            if is_now("before", path):
                die()
            save(tensors, path, metadata)
            if is_now("within", path):
                os.truncate(path, random.randrange(path.stat().st_size))
                die()

        def sync_and_die(path: Path) -> None:
            if is_now("written", path):
                die()
            sync(path)

        def replace_and_die(self: Path, target: Path) -> Path:
            if is_now("synced", target):
                die()
            found = replace(self, target)
            if is_now("renamed", target):
                die()
            return found

        tensorfile.save_file, files._sync, Path.replace = save_half, sync_and_die, replace_and_die  # type: ignore[assignment, method-assign]

    return prepare


MOMENTS = ("before", "within", "written", "synced", "renamed")


def contents(out: Path) -> dict[str, bytes]:
    """Every file that a run is to leave, and any that it is not."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    found.pop(".lock", None)
    return found


@dataclasses.dataclass
class Tally:
    """What was survived."""

    kills: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    searches: int = 0
    torn: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: list[str] = dataclasses.field(default_factory=list)


def kill_until_done(out: Path, engine: str, seconds: float, dice: random.Random, most: int, tally: Tally) -> None:
    """One search, killed at most so often; seconds: what it takes if it is not."""
    for number in range(10 * most):
        moment = dice.choice(("time", "time", *MOMENTS))
        prepare = at_a_file(dice.randint(1, 6), moment) if moment != "time" else lambda: None
        is_last = number >= most
        pid = attempt(out, engine, (lambda: None) if is_last else prepare)
        if moment == "time" and not is_last:
            time.sleep(dice.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                tally.faults.append(f"{engine}: exit code {os.WEXITSTATUS(status)} after {number} kills")
            return
        tally.kills[f"{engine}, {'at a random time' if moment == 'time' else 'file ' + moment}"] += 1
        for leftover in out.rglob(".*.tmp"):
            tally.torn["ticket" if "ticket" in leftover.name else leftover.parent.name] += 1
        if (out / "log.jsonl").exists() and dice.random() < 0.2:
            with (out / "log.jsonl").open("ab") as log:
                log.write(b'{"round": 2, "replicate"')
            tally.torn["log.jsonl"] += 1


NAMED = (
    ("ticket.safetensors", "within"),
    ("ticket.safetensors", "renamed"),
    ("state/00-0.safetensors", "within"),
    ("masks/02-1.safetensors", "within"),
)


def kill_at_each(folder: Path, expected: dict[str, bytes], tally: Tally) -> None:
    """One search each, which kills itself within the writing, or right after the renaming, of one named file."""
    for name, moment in NAMED:
        out, where = folder / "named", f"{name} {moment}"
        _, status = os.waitpid(attempt(out, "eager", at_a_file(1, moment, name)), 0)
        if not os.WIFSIGNALED(status) or (moment == "within" and (out / name).exists()):
            tally.faults.append(f"{where}: not killed, or not whole or absent")
        tally.kills[f"eager, {where}"] += 1
        os.waitpid(attempt(out, "eager"), 0)
        if contents(out) != expected:
            tally.faults.append(f"{where}: what is left differs from that of a search never killed")
        tally.searches += 1
        shutil.rmtree(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=400, help="of each training; the suite takes fewer")
    parser.add_argument("--named", action="store_true", help="also at moments of named files, the ticket among them")
    asked = parser.parse_args()
    RECIPE["train"] |= {"iterations": asked.iterations, "eval_every": asked.iterations // 4}
    RECIPE["prune"] |= {"rewind": f"{asked.iterations * 3 // 8}it"}
    dice, tally, began = random.Random(asked.seed), Tally(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        references = {}
        for engine in ENGINES:
            out, start = Path(folder) / engine, time.monotonic()
            _, status = os.waitpid(attempt(out, engine), 0)
            assert status == 0, f"{engine}: the search that is not killed ended with status {status}"
            references[engine] = contents(out), time.monotonic() - start
            shutil.rmtree(out)
        if asked.named:
            kill_at_each(Path(folder), references["eager"][0], tally)
        asked.kills += tally.kills.total()
        while tally.kills.total() < asked.kills and not tally.faults:
            engine = dice.choice(ENGINES)
            expected, seconds = references[engine]
            out = Path(folder) / "killed"
            most = min(asked.kills - tally.kills.total(), 12)
            kill_until_done(out, engine, seconds, dice, most, tally)
            found = contents(out)
            differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            if differing:
                tally.faults.append(f"{engine}: {', '.join(differing)} differ from those of a search never killed")
            tally.searches += 1
            shutil.rmtree(out)
    for kind, count in sorted(tally.kills.items()):
        print(f"{count:5}  {kind}")
    print(f"{tally.kills.total()} kills in {tally.searches} searches, {time.monotonic() - began:.0f} s;", end=" ")
    torn = ", ".join(f"{count} in {place}" for place, count in sorted(tally.torn.items()))
    print(f"found torn: {torn or 'nothing'}")
    for fault in tally.faults:
        print(f"FAULT: {fault}")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
