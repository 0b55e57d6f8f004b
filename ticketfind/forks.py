"""Trainings side by side, each in a forked process with one thread. Linux; CPU only."""

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from ticketfind import TicketfindError

T = TypeVar("T")
Tick = Callable[[int], None]
"""Called with the number of iterations done since the last call; may raise, to end the training where it is."""

_STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

PATIENCE = 30.0
"""Seconds that a process has to finish its iteration, and to keep what it has done, before it is killed."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def possible() -> bool:
    """True if there is something to gain, and this system can do it."""
    return sys.platform == "linux" and cores() > 1


def side_by_side(count: int, at_once: int, train: Callable[[int, Tick], T], tick: Tick) -> Iterator[T]:
    """``train(i, tick)`` for i from 0 to count - 1, `at_once` of them at any time; results in order.

    One thread each, so that the numbers do not depend on how many cores there are; more processes than cores, so
    that five replicates keep two cores busy to the end.
    """
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[int, multiprocessing.context.ForkProcess]] = {}
    done: dict[int, T] = {}
    started = delivered = 0
    try:
        while delivered < count:
            while started < count and len(running) < at_once:
                receiving, sending = context.Pipe(duplex=False)
                others = [receiving, *running]
                process = context.Process(
                    target=_child, args=(sending, others, train, started, os.getpid()), daemon=True
                )
                with warnings.catch_warnings(), _held_back(*_STOPS):
                    # Python >= 3.12 warns of forks beside threads; the child uses one
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                sending.close()
                running[receiving] = (started, process)
                started += 1
            tick(0)
            for connection in wait(list(running), timeout=0.2):
                assert isinstance(connection, Connection)
                index, process = running[connection]
                message = _received(connection)
                if message is None:
                    process.join()
                    tick(0)  # a signal to all processes has reached this one too
                    raise TicketfindError(_lost(process.exitcode, at_once))
                kind, value = message
                if kind == "tick":
                    tick(value)
                    continue
                if kind == "error":
                    raise value
                done[index] = value
                del running[connection]
                connection.close()
                process.join()
            while delivered in done:
                yield done.pop(delivered)
                delivered += 1
    except BaseException as reason:
        faults = _end({connection: process for connection, (_, process) in running.items()})
        if faults and not isinstance(reason, (Exception, GeneratorExit)):
            raise faults[0] from reason  # it was stopped, and what it has done could not be kept
        raise


def _received(connection: Connection) -> tuple[str, Any] | None:
    """What a process has sent; None if it sends no more."""
    try:
        kind, value = pickle.loads(connection.recv_bytes())
    except (EOFError, OSError):  # OSError: killed in the middle of a message
        return None
    return kind, value


@contextmanager
def _held_back(*signals: signal.Signals) -> Iterator[None]:
    """Signals wait until the end: a process that is forked inside has a moment to say what it does on them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _lost(exit_code: int | None, at_once: int) -> str:
    if exit_code != -signal.SIGKILL:
        return f"a training process ended before its training did (exit code {exit_code})"
    less = f"--arms-at-once {at_once // 2} trains fewer side by side" if at_once > 1 else "try a smaller --batch-size"
    return f"a training process was killed, as the system does where memory runs short; {less}"


def _end(processes: Mapping[Connection, multiprocessing.context.ForkProcess]) -> list[BaseException]:
    """Have them stop between two iterations, where what they do is kept; those that take too long are killed.

    The errors that they end with.
    """
    faults: list[BaseException] = []
    try:
        for process in processes.values():
            process.terminate()
        deadline = time.monotonic() + PATIENCE
        open_still = [*processes]
        while open_still and (left := deadline - time.monotonic()) > 0:
            for connection in wait(open_still, timeout=left):
                assert isinstance(connection, Connection)
                message = _received(connection)
                if message is None:
                    open_still.remove(connection)
                elif message[0] == "error":
                    faults.append(message[1])
        for process in processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for connection, process in processes.items():
            process.kill()
            process.join()
            connection.close()
    return faults


class _Asked(BaseException):
    """The parent wants the training to stop."""


def _child(
    sending: Connection, others: Sequence[Connection], train: Callable[[int, Tick], T], index: int, parent: int
) -> None:
    _die_with(parent)
    for connection in others:
        connection.close()  # inherited: while anybody holds it, sending into it would wait for ever
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    for number in _STOPS:  # Ctrl-C, and the end of a terminal, reach the parent too, which ends this process
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, ask)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    torch.set_num_threads(1)
    pending, last = 0, time.monotonic()

    def tick(iterations: int) -> None:
        nonlocal pending, last
        if asked:
            raise _Asked
        pending += iterations
        now = time.monotonic()
        if now - last > 0.1:
            try:
                sending.send_bytes(pickle.dumps(("tick", pending)))
            except BrokenPipeError:  # nobody waits for it any more
                raise _Asked from None
            pending, last = 0, now

    try:
        result = train(index, tick)
        sending.send_bytes(pickle.dumps(("tick", pending)))
        sending.send_bytes(pickle.dumps(("done", result)))
    except (_Asked, BrokenPipeError):
        pass
    except BaseException as error:
        with suppress(BrokenPipeError):  # nobody waits to hear of it: the parent is on its way out
            sending.send_bytes(_pickled(error))


def _pickled(error: BaseException) -> bytes:
    try:
        return pickle.dumps(("error", error))
    except Exception:
        return pickle.dumps(("error", RuntimeError(f"{type(error).__name__}: {error}")))


def _die_with(parent: int) -> None:
    """End this process when its parent does, however that ends: nothing is left at work on a run's files."""
    die_by = 1  # PR_SET_PDEATHSIG, linux/prctl.h
    ctypes.CDLL(None).prctl(die_by, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
