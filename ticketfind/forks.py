"""Trainings side by side, each in a forked process with one thread. Linux; CPU only."""

import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import torch

from ticketfind import TicketfindError

T = TypeVar("T")
Tick = Callable[[int], None]
"""Called with the number of iterations done since the last call."""


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
                process = context.Process(target=_child, args=(sending, train, started, os.getpid()), daemon=True)
                with warnings.catch_warnings():  # Python >= 3.12 warns of forks beside threads; the child uses one
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                sending.close()
                running[receiving] = (started, process)
                started += 1
            tick(0)
            for connection in wait(list(running), timeout=0.2):
                assert isinstance(connection, Connection)
                index, process = running[connection]
                try:
                    kind, value = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):  # OSError: killed in the middle of a message
                    process.join()
                    raise TicketfindError(
                        f"a training process was killed (exit code {process.exitcode});"
                        " where memory ran short, use --engine eager"
                    ) from None
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
    finally:
        for connection, (_, process) in running.items():
            process.kill()
            process.join()
            connection.close()


def _child(sending: Connection, train: Callable[[int, Tick], T], index: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    pending, last = 0, time.monotonic()

    def tick(iterations: int) -> None:
        nonlocal pending, last
        pending += iterations
        now = time.monotonic()
        if now - last > 0.1:
            if os.getppid() != parent:
                os._exit(1)
            sending.send_bytes(pickle.dumps(("tick", pending)))
            pending, last = 0, now

    try:
        result = train(index, tick)
        sending.send_bytes(pickle.dumps(("tick", pending)))
        sending.send_bytes(pickle.dumps(("done", result)))
    except BaseException as error:
        try:
            sending.send_bytes(pickle.dumps(("error", error)))
        except Exception:
            sending.send_bytes(pickle.dumps(("error", RuntimeError(f"{type(error).__name__}: {error}"))))
