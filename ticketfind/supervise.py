"""Runs one command, and ends with it everything that it has started: ``python supervise.py CODE_FILE WORD...``

A program of its own, so that it outlives ticketfind. Its standard input is a pipe that ticketfind holds; when that
closes, because the search was stopped or killed, the command is ended. The exit code of a command that ended by itself
(negative: by a signal) goes to CODE_FILE once all that it left running is gone. Its output goes where ours does.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""
_PR_SET_CHILD_SUBREAPER = 36


def main(code_file: Path, words: list[str]) -> None:
    """Run the command `words` to its end, or to that of standard input."""
    with suppress(Exception):  # Linux: what loses its parent becomes our child, wherever it has gone
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # it is for ticketfind to heed them, and to close the pipe
    try:
        command = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"cannot run {words[0]}: {error.strerror}", flush=True)
        _write(code_file, 127)
        return
    code = None
    while code is None:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
        code = _reap(command.pid)
        if code is None and 0 in ready:
            break
    _end_all(command.pid, woken)
    if code is not None:
        _write(code_file, code)


def _reap(pid: int) -> int | None:
    """Take note of the children that have ended; the exit code of `pid` if it is one of them."""
    code = None
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if found[0] == pid:
                code = os.waitstatus_to_exitcode(found[1])
    return code


def _end_all(command: int, woken: int) -> None:
    """SIGTERM to all that is left, and SIGKILL to what does not heed it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        told: set[int] = set()
        until = time.monotonic() + GRACE
        while (left := _left(command)) and time.monotonic() < until:
            for target in left - told:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(target, number)
            told |= left
            if select.select([woken], [], [], 0.05)[0]:
                os.read(woken, 4096)
            _reap(command)


def _left(command: int) -> set[int]:
    """Processes that come from the command, as `os.kill` takes them; without /proc, its process group."""
    if not Path("/proc/self/stat").exists():
        with suppress(ProcessLookupError, PermissionError):
            os.kill(-command, 0)
            return {-command}
        return set()
    children: dict[int, list[int]] = {}
    ended = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            children.setdefault(int(parent), []).append(int(folder.name))
            if state == "Z":
                ended.add(int(folder.name))
    found: set[int] = set()
    todo = [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found.update(below)
        todo += below
    return found - ended


def _write(file: Path, code: int) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w") as out:
        out.write(f"{code}\n")
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
