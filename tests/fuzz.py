"""Feed every reader of files with damaged and hostile ones; none may fail but by one clear error.

    python tests/fuzz.py --inputs 100000 --seed 0

Each input is a valid file of its kind, mutated: bytes flipped, cut, spliced and doubled, or, so that mutations get past
the outermost check, what is inside changed and packed again with the right lengths and checksums (tests/mutate.py).
Readers run in forked processes. What counts as a fault: an exception other than TicketfindError; more than 5 seconds
of the processor (a machine that is busy with other things takes longer by the clock);
memory, taken or only asked for, beyond 4 times the file's size and 64 MiB (of what is compressed, beyond 4 times what
`limits.inflated` lets it hold); a crash; any code run, program started, connection made or file written; a message that
is no short line.
"""

import argparse
import functools
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mutate import mutated
from rich.console import Console
from seeds import KINDS

from ticketfind import (
    TicketfindError,
    checkpoint,
    formats,
    layers,
    limits,
    load_shrunk,
    results,
    terminal,
    verify,
    views,
)
from ticketfind.course import course_of
from ticketfind.rundir import RunDir
from ticketfind.snapshots import Snapshots
from ticketfind.tensorfile import read_tensors
from ticketfind.ticket import changed_sections, load_ticket

SECONDS = 5.0
MOST_WAITED = 60.0
"""By the clock, for a process that sleeps or does not hear the alarm."""
BATCH = 400
"""Inputs of one forked process."""


# ------------------------------------------------------------------------------------------- the readers


class _Out:
    """A stream that keeps what is written to it only until it is looked at."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def _screen(as_json: bool) -> tuple[terminal.Screen, _Out]:
    out = _Out()
    stdout, sys.stdout = sys.stdout, out  # type: ignore[assignment]
    try:
        screen = terminal.Screen(as_json=as_json)
        screen.console = Console(file=out, width=100, force_terminal=True, color_system=None, emoji=False)  # type: ignore[arg-type]
    finally:
        sys.stdout = stdout
    return screen, out


def _shown(show: Callable[[terminal.Screen], None]) -> None:
    for as_json in (False, True):
        screen, out = _screen(as_json)
        show(screen)
        assert all(c.isprintable() or c == "\n" for c in out.text), f"shown as it is: {out.text!r}"


def ticket(path: Path) -> None:
    found = load_ticket(path)
    found.weights()
    assert not [name for name, mask in found.masks.items() if not found.init[name][mask].float().isfinite().all()]
    changed_sections(path)
    _shown(lambda screen: views.show_ticket(screen, found, path))
    layers.from_layers(found.about.recipe).code_specs()


def checked(path: Path) -> None:
    checks = verify.of_ticket(path)
    _shown(lambda screen: views.show_checks(screen, str(path), checks, 0.0))


WANTED = {"fc.weight": torch.zeros(4, 3), "fc.bias": torch.zeros(4), "n.count": torch.tensor(0)}


def weights(path: Path) -> None:
    for key in (None, "ema.net"):
        try:
            found = checkpoint.read(path, key)
        except TicketfindError:
            if key is None:
                raise
            continue
        checkpoint.match(found, WANTED, allow=["*"], path=path)
        checkpoint.dtype(found)


def recipe(path: Path) -> None:
    found = layers.from_layers(layers.find_layer(str(path)))
    layers.to_yaml(found)
    list(layers.differences(found, layers.from_layers({})))


def idx(path: Path) -> None:
    formats.to_targets(formats.read_idx(path), "data")


def npz(path: Path) -> None:
    formats.from_arrays("data", formats.read_npz(path))


def arrays(path: Path) -> None:
    formats.from_arrays("data", read_tensors(path, "data")[0])


def log(path: Path) -> None:
    lines = RunDir(path.parent).log()
    rounds = results.rounds_of(lines, replicates=2, given_tolerance=None)
    winner = results.winner_of(rounds)
    json.dumps([found.json() for found in rounds], allow_nan=False)
    assert winner is None or winner.round > 0
    if rounds:
        _shown(lambda screen: views.show_rounds(screen, rounds))


def snapshot(path: Path) -> None:
    kept = Snapshots(path.parent, None)
    assert kept.done(1, [0]) >= 0
    try:
        found = kept.find([SimpleNamespace(round=1, replicate=r) for r in (0, 1)])  # type: ignore[misc]
        if found is not None:
            course_of(found, 2, 0, 100)
    except (TicketfindError, KeyError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise TicketfindError(f"its snapshot cannot be used: {type(error).__name__}") from error  # as train._begun


def shrunken(path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        load_shrunk(path, model)
    except TicketfindError:
        now = model.state_dict()
        assert all(torch.equal(value, now[name]) for name, value in before.items()), "changed, though refused"
        raise
    assert not any(bool(value.isnan().any()) for value in model.state_dict().values())
    assert model[3](torch.zeros(1, model[3].in_features)).shape == (1, 2), "outputs stay"


@dataclass(frozen=True)
class Reader:
    """What reads a kind of file, and what the file is called."""

    read: Callable[[Path], None]
    kind: str
    file: str

    @property
    def most(self) -> Callable[[int], int]:
        """The bytes that a file of a size may take."""
        if self.file.endswith((".npz", ".gz")) or self.kind == "compact":
            return lambda size: 4 * limits.inflated(size)
        return lambda size: 4 * size + limits.SPARE


READERS = {
    "ticket, full": Reader(ticket, "ticket", "ticket.safetensors"),
    "ticket, compact": Reader(ticket, "compact", "ticket.safetensors"),
    "verify": Reader(checked, "ticket", "ticket.safetensors"),
    "checkpoint .safetensors": Reader(weights, "weights", "w.safetensors"),
    "checkpoint, sharded": Reader(weights, "index", "w.safetensors.index.json"),
    "checkpoint .pt": Reader(weights, "torch", "w.pt"),
    "checkpoint .pth, old": Reader(weights, "torch old", "w.pth"),
    "recipe": Reader(recipe, "recipe", "r.yaml"),
    "IDX": Reader(idx, "idx", "train-images-idx3-ubyte"),
    "IDX .gz": Reader(idx, "idx.gz", "train-images-idx3-ubyte.gz"),
    "data .npz": Reader(npz, "npz", "d.npz"),
    "data .safetensors": Reader(arrays, "arrays", "d.safetensors"),
    "log.jsonl": Reader(log, "log", "log.jsonl"),
    "snapshot": Reader(snapshot, "snapshot", "01-0.safetensors"),
    "shrunken network": Reader(shrunken, "shrunken", "s.safetensors"),
}


# --------------------------------------------------------------------------------------- one input, judged


class Hang(BaseException):
    """It takes too long."""


FORBIDDEN = (
    "exec", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn",
    "socket.connect", "socket.bind", "ctypes.dlopen", "pickle.find_class", "os.remove", "os.rename", "shutil.rmtree",
)  # fmt: skip
_events: list[str] | None = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Note what no reader has any business to do."""
    if _events is None:
        return
    if event == "exec" and getattr(args[0], "co_filename", "").startswith((sys.prefix, sys.base_prefix)):
        return  # an installed module, imported as it is needed
    if event == "exec" and sys._getframe(1).f_code.co_name == "namedtuple":
        return  # which is how the standard library makes one
    if event in FORBIDDEN or (event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
        _events.append(f"{event} {args!r}"[:200])


@contextmanager
def _watched() -> Iterator[list[str]]:
    global _events
    _events = found = []
    try:
        yield found
    finally:
        _events = None


@dataclass
class Verdict:
    """What became of an input."""

    accepted: bool
    fault: str | None
    seconds: float
    bytes: int
    """The most memory that it took, beyond what was there."""


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def _alarmed(*_: object) -> None:
    raise Hang


def judge(reader: Reader, path: Path, size: int) -> Verdict:
    """Read one file, within limits of time and memory, and say whether that went as promised."""
    Path("/proc/self/clear_refs").write_text("5")  # the most memory so far, forgotten
    before, hard = _status("VmRSS"), resource.getrlimit(resource.RLIMIT_AS)[1]
    room = reader.most(size) + 2**24  # of the interpreter's own
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + room, hard))
    fault, accepted = None, False
    began = time.process_time()
    with _watched() as events:
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read(path)
            accepted = True
        except TicketfindError as error:
            fault = _fault_in(str(error))
        except Hang:
            fault = f"more than {SECONDS:g} s"
        except MemoryError:
            fault = "asks for too much memory"
        except BaseException as error:
            fault = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - began
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    if events:
        fault = f"does {events[0]}"
    return Verdict(accepted, fault, seconds, max(0, _status("VmHWM") - before))


def _fault_in(text: str) -> str | None:
    lines = text.splitlines()
    if not lines or len(lines) > 60 or max(map(len, lines)) > 2000:
        return f"a message of {len(lines)} lines, {len(text)} characters: {text[:200]!r}"
    if any(word in text for word in ("MemoryError", "allocate memory", "Cannot allocate")):
        return f"asks for too much memory: {text[:300]}"
    return None


# ------------------------------------------------------------------------------------- many, in processes


@dataclass
class Tally:
    """What became of the inputs of one reader."""

    inputs: int = 0
    accepted: int = 0
    slowest: float = 0.0
    bytes: int = 0
    faults: list[tuple[int, str]] = field(default_factory=list)


def inputs_of(name: str, seed: int, number: int) -> bytes:
    """The input of a number; the first are the valid files themselves."""
    reader = READERS[name]
    valid = KINDS[reader.kind]()
    if number < len(valid):
        return valid[number]
    return mutated(valid, reader.kind, random.Random(f"{seed}/{name}/{number}"))


def run(reader: Reader, make: Callable[[int], bytes], numbers: Sequence[int], folder: Path) -> Tally:
    """Judge inputs in forked processes; one that crashes or hangs for good is a fault, too. make: number to input."""
    tally, todo = Tally(), [*numbers]
    while todo:
        batch, todo = todo[:BATCH], todo[BATCH:]
        todo = _batch(reader, make, batch, folder, tally) + todo
    return tally


_RECORD = struct.Struct("<q?dq200s")
READING, READ = 1, 2


def _batch(reader: Reader, make: Callable[[int], bytes], batch: list[int], folder: Path, tally: Tally) -> list[int]:
    """Judge a batch in one forked process; what is left of it after a crash."""
    board = mmap.mmap(-1, _RECORD.size * len(batch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which are not used
        pid = os.fork()
    if not pid:
        try:
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
            signal.signal(signal.SIGPROF, _alarmed)
            path = folder / reader.file
            (folder / "w-1.safetensors").write_bytes(KINDS["weights"]()[0])  # what a sharded checkpoint's index names
            for place, number in enumerate(batch):
                data = make(number)
                path.unlink(missing_ok=True)
                path.write_bytes(data)
                _RECORD.pack_into(board, place * _RECORD.size, READING, False, 0.0, 0, b"")
                found = judge(reader, path, len(data))
                text = (found.fault or "").encode()[:200]
                _RECORD.pack_into(board, place * _RECORD.size, READ, found.accepted, found.seconds, found.bytes, text)
        finally:
            os._exit(0)
    done, status, last = 0, None, time.monotonic()
    while status is None:
        time.sleep(0.01)
        ended, code = os.waitpid(pid, os.WNOHANG)
        status = code if ended else None
        while done < len(batch) and _RECORD.unpack_from(board, done * _RECORD.size)[0] == READ:
            done, last = done + 1, time.monotonic()
        if done < len(batch) and _RECORD.unpack_from(board, done * _RECORD.size)[0] != READING:
            last = time.monotonic()  # its input is being made
        if status is None and time.monotonic() - last > MOST_WAITED:
            os.kill(pid, signal.SIGKILL)
    for place in range(done):
        _, accepted, seconds, taken, text = _RECORD.unpack_from(board, place * _RECORD.size)
        tally.inputs += 1
        tally.accepted += accepted
        tally.slowest, tally.bytes = max(tally.slowest, seconds), max(tally.bytes, taken)
        if fault := text.rstrip(b"\0").decode(errors="replace"):
            tally.faults.append((batch[place], fault))
    if done < len(batch):
        tally.inputs += 1
        tally.faults.append((batch[done], f"the process ended: {status}"))
        done += 1
    return batch[done:]


def prepare() -> None:
    """Import what readers import as they are needed, and have the files beside the files: once, before any fork."""
    torch.set_num_threads(1)
    sys.addaudithook(_audit)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "w-1.safetensors").write_bytes(KINDS["weights"]()[0])
        for reader in READERS.values():
            for data in KINDS[reader.kind]():
                path = Path(folder) / reader.file
                path.write_bytes(data)
                try:
                    reader.read(path)
                except TicketfindError:
                    continue


def main() -> None:
    """Parse, run, print the table; exit code 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, help="only this one")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs with faults")
    given = parser.parse_args()
    prepare()
    names = [given.reader] if given.reader else [*READERS]
    each = -(-given.inputs // len(names))
    print(f"{'reader':<24}{'inputs':>8}{'accepted':>10}{'refused':>9}{'slowest':>10}{'memory':>11}{'faults':>8}")
    total = Tally()
    began = time.monotonic()
    for name in names:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            make = functools.partial(inputs_of, name, given.seed)
            found = run(READERS[name], make, range(each), Path(folder))
        refused = found.inputs - found.accepted - len(found.faults)
        memory = f"{found.bytes / 2**20:.1f} MiB"
        print(
            f"{name:<24}{found.inputs:>8}{found.accepted:>10}{refused:>9}{found.slowest:>8.2f} s{memory:>11}"
            f"{len(found.faults):>8}",
            flush=True,
        )
        kinds = {fault[:60]: (number, fault) for number, fault in reversed(found.faults)}
        for number, fault in sorted(kinds.values())[:12]:
            print(f"    input {number}: {fault}", flush=True)
            if given.keep:
                given.keep.mkdir(exist_ok=True)
                file = given.keep / f"{name.replace(' ', '-').replace(',', '')}-{number}-{READERS[name].file}"
                file.write_bytes(make(number))
        total.inputs += found.inputs
        total.accepted += found.accepted
        total.faults += found.faults
    print(
        f"{'all':<24}{total.inputs:>8}{total.accepted:>10}"
        f"{total.inputs - total.accepted - len(total.faults):>9}{'':>21}{len(total.faults):>8}"
    )
    print(f"seed {given.seed}, {time.monotonic() - began:.0f} s")
    sys.exit(1 if total.faults else 0)


if __name__ == "__main__":
    main()
