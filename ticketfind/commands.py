"""Any program trains one arm: files in, files out. A `arms.Trainer`, as a function of the user's is (`trainers`)."""

import json
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ticketfind import TicketfindError, checkpoint, files, masks, prunable
from ticketfind.arms import Arm, Outcome, State, Task, Trainer, Work
from ticketfind.specs import one_line
from ticketfind.tensorfile import save_tensors
from ticketfind.trainers import checked_outcome, fitting

try:
    import fcntl
except ImportError:  # Windows: no commands there
    fcntl = None  # type: ignore[assignment]

FIELDS = ("init", "mask", "out", "seed", "first", "rewind", "round", "replicate", "iterations", "device")
"""What a command may have in braces."""
_FINAL, _REWIND, _METRICS, _CODE = "final.safetensors", "rewind.safetensors", "metrics.json", "exit-code"


def by_command(template: str) -> Trainer:
    """A trainer out of a command: files in, files out (docs/guide.md).

    {init}, {mask}: safetensors files, the start (pruned weights zero) and the masks by parameter. {out}: a folder, into
    which the command writes final.safetensors, metrics.json and, where {rewind} is above 0, rewind.safetensors. What
    has finished there is not run again. Raises TicketfindError for a template that cannot be filled in.
    """
    words = _words(template)

    def train(task: Task, arm: Arm, work: Work) -> Outcome:
        assert work.folder is not None
        folder = work.folder.resolve() / re.sub(r"[^\w=.-]+", "-", arm.name)
        files.make_folder(folder, root=work.folder.resolve().parent)
        with _alone(folder / ".lock", work) as lock:
            code = folder / _CODE
            if not code.exists() or code.read_text().strip() != "0":
                for name in (_FINAL, _REWIND, _METRICS, _CODE):  # of an attempt that failed; the rest is the command's
                    (folder / name).unlink(missing_ok=True)
                values = _fill_in(folder, task, arm, work)
                _run([word.format(**values) for word in words], folder, arm.name, work, lock)
            try:
                found = _read(folder, task, arm, work)
            except TicketfindError:
                code.unlink()
                raise
        for name in ("init", "mask"):
            (folder / f"{name}.safetensors").unlink(missing_ok=True)
        work.tick(max(1, int(work.how.iterations) - arm.first))
        return found

    return train


def _words(template: str) -> list[str]:
    if os.name != "posix":
        raise TicketfindError("train.command: expected Linux or macOS; use --trainer here")
    try:
        words = shlex.split(template)
        names = [name for word in words for _, name, _, _ in string.Formatter().parse(word) if name is not None]
        unknown = [name for name in names if name not in FIELDS]
        if not unknown:
            texts = {name: "" for name in ("init", "mask", "out", "device")}
            _ = [word.format(**{**dict.fromkeys(FIELDS, 0), **texts}) for word in words]  # conversions that fail
    except (ValueError, LookupError, TypeError) as error:
        raise TicketfindError(f"train.command: expected a command, found {template!r}: {error}") from error
    if unknown or "out" not in names:
        raise TicketfindError(
            f"train.command: expected {{out}} and others of {', '.join(FIELDS)} in braces,"
            f" found {', '.join(f'{{{name}}}' for name in unknown or names) or 'none'}"
            " (braces that stand for themselves are doubled)"
        )
    return words


@contextmanager
def _alone(file: Path, work: Work) -> Iterator[int]:
    """Hold a training's folder: a command that outlived a killed ticketfind may still be on its way to its end."""
    with file.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                work.tick(0)
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield lock.fileno()


def _fill_in(folder: Path, task: Task, arm: Arm, work: Work) -> dict[str, Any]:
    """Write the files that the command reads; what it may have in braces."""
    tied = {alias: arm.masks[name] for alias, name in prunable.aliases(task.model).items() if name in arm.masks}
    save_tensors(folder / "init.safetensors", masks.masked(arm.start, {**arm.masks, **tied}))
    save_tensors(folder / "mask.safetensors", arm.masks)
    return {
        "init": str(folder / "init.safetensors"),
        "mask": str(folder / "mask.safetensors"),
        "out": str(folder),
        "seed": arm.seed,
        "first": arm.first,
        "rewind": work.keep_at or 0,
        "round": arm.round,
        "replicate": arm.replicate,
        "iterations": int(work.how.iterations),
        "device": str(task.device),
    }


def _run(words: list[str], folder: Path, name: str, work: Work, lock: int) -> None:
    """Run a command to its end, under a supervisor that ends all that it has started (`supervise`).

    Raises TicketfindError, with the last that it printed, where it fails.
    """
    if shutil.which(words[0]) is None:
        raise TicketfindError(
            f"{name}: train.command: expected a program, found none called {words[0]}"
            " (no shell reads the command; sh -c '...' would)"
        )
    log, code_file = folder / "log.txt", folder / _CODE
    supervisor = [sys.executable, "-I", "-S", str(Path(__file__).with_name("supervise.py")), str(code_file)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*supervisor, *words], stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=[lock],
        )  # fmt: skip
    assert process.stdin is not None
    try:
        while process.poll() is None:
            work.tick(0)
            time.sleep(0.05)
    finally:
        process.stdin.close()
        process.wait()
    code = int(code_file.read_text()) if code_file.exists() else None
    if code:
        how = f"with exit code {code}" if code > 0 else f"by {_signal_name(-code)}"
        raise TicketfindError(f"{name}: the command {words[0]} ended {how}; {_last_of(log)}")
    if code is None:
        raise TicketfindError(f"{name}: the command {words[0]} was killed, and its supervisor; {_last_of(log)}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


_ERROR = re.compile(
    r"(\[rank\d+\]: ?)?[A-Za-z_][\w.]*(?<!ChildFailed)(Error|Exception|Interrupt)\b|terminate called|Segmentation fault"
)
"""What an error begins with, other than torchrun's on the processes that it runs."""


def _last_of(log: Path, lines: int = 20, kept: int = 2**20) -> str:
    """The last lines of a command's output; before them the first error, where others have followed it."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - kept))
        text = file.read().decode(errors="replace")
    # of progress lines that were written over one another, the last
    whole = [line.rstrip().rpartition("\r")[2][:300] for line in text.rstrip().split("\n")]
    shown = [line for line in whole if line.strip()]
    if not shown:
        return "it printed nothing"
    first = next((line for line in shown[:-lines] if _ERROR.match(line)), None)
    return "\n  ".join([
        "the last that it printed:", *([first, "..."] if first else []), *shown[-lines:],
    ])  # fmt: skip


def _read(folder: Path, task: Task, arm: Arm, work: Work) -> Outcome:
    """What the command has written, checked."""
    final = _weights(folder / _FINAL, task, arm)
    kept = None
    if work.keep_at is not None:
        kept = arm.start if work.keep_at == arm.first else _weights(folder / _REWIND, task, arm)
    file = folder / _METRICS
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TicketfindError(
            f"{arm.name}: expected the command to write {file}, an object with accuracy: {one_line(error)}"
        ) from error
    return checked_outcome(metrics, arm, final, kept, int(work.how.iterations))


def _weights(file: Path, task: Task, arm: Arm) -> State:
    if not file.is_file():
        raise TicketfindError(f"{arm.name}: expected the command to write {file}, a state dict, found no such file")
    aliases = prunable.aliases(task.model)
    found = checkpoint.read(file)
    return fitting(
        {**found, **checkpoint.match(found, arm.start, allow=("*",), path=file, aliases=aliases)}, arm, str(file)
    )
