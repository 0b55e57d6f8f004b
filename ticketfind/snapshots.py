"""Trainings under way, kept in files: written beside the training, and seldom enough to cost next to nothing.

NN-R.safetensors in the folder holds the arms of round NN that are trained in step, of which R is the first replicate.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from ticketfind import TicketfindError, limits
from ticketfind.arms import Arm
from ticketfind.course import Snapshot
from ticketfind.tensorfile import read_metadata, read_tensors, save_tensors

SHARE = 0.01
"""Of the time, which snapshots take at most."""
_KEY = "snapshot"


class Snapshots:
    """As `train` wants them. A forked process goes on with a copy, for the arms that it trains."""

    def __init__(self, folder: Path, seconds: float | None, check: Callable[[], None] = lambda: None) -> None:
        """seconds: from one to the next; None: only what is asked for at once. check: raises TicketfindError where
        the folder is no place to write to any more."""
        self._folder, self._seconds, self._check = folder, seconds, check
        self._next = 0.0
        self._writing: Thread | None = None
        self._fault: TicketfindError | None = None

    def find(self, arms: Sequence[Arm]) -> Snapshot | None:
        """What was kept last of these arms, which begin now. Raises TicketfindError for a file that is damaged."""
        self._next = time.monotonic() + (self._seconds or 0.0)
        file = self._file(arms)
        if not file.exists():
            return None
        tensors, metadata = read_tensors(file, "snapshot")
        about = _about(metadata)
        is_theirs = about.get("replicates") == [arm.replicate for arm in arms]
        return Snapshot(tensors, about.get("facts", {})) if is_theirs else None

    def offer(self, arms: Sequence[Arm], take: Callable[[], Snapshot], *, now: bool = False) -> None:
        """Keep what `take` gives if it is time; with `now` in any case, and on disk when this returns.

        Raises TicketfindError where that, or what was offered before, cannot be written.
        """
        began = time.monotonic()
        if not now and (self._seconds is None or began < self._next or self._is_writing):
            return
        self.settle()
        self._check()
        taken = take()
        in_the_way = time.monotonic() - began
        about = {"replicates": [arm.replicate for arm in arms], "done": _done(arms, taken), "facts": taken.facts}

        def write() -> None:
            try:
                self._check()
                about_it = {_KEY: json.dumps(about)}
                save_tensors(self._file(arms), taken.tensors, about_it, root=self._folder.parent)
            except TicketfindError as error:
                self._fault = error
            cost = in_the_way + time.thread_time()  # the thread does nothing else
            self._next = began + max(self._seconds or 0.0, cost / SHARE)

        # not waited for by a process that is on its way out; a file half written is swept away by the next search
        self._writing = Thread(target=write, name="snapshot", daemon=True)
        self._writing.start()
        if now:
            self.settle()

    @property
    def _is_writing(self) -> bool:
        return self._writing is not None and self._writing.is_alive()

    def settle(self) -> None:
        """Wait for what is being written. Raises TicketfindError where it could not be."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._fault is not None:
            fault, self._fault = self._fault, None
            self._check()  # a folder that has gone is the better reason
            raise fault

    def done(self, round: int, replicates: Iterable[int]) -> int:
        """The iterations, over all arms, that what is kept of these trainings stands for; of a damaged file, none."""
        done = 0
        for replicate in replicates:
            with suppress(TicketfindError):
                found = _about(read_metadata(self._name(round, replicate), "snapshot")).get("done")
                done += found if isinstance(found, int) and 0 <= found < 2**63 else 0
        return done

    def clear(self, round: int) -> None:
        """Forget what is kept of a round, which is over."""
        with suppress(OSError):
            for file in self._folder.glob(f"{round:02}-*.safetensors"):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            self._folder.rmdir()  # but for those of other rounds

    def _file(self, arms: Sequence[Arm]) -> Path:
        return self._name(arms[0].round, arms[0].replicate)

    def _name(self, round: int, replicate: int) -> Path:
        return self._folder / f"{round:02}-{replicate}.safetensors"


def _done(arms: Sequence[Arm], taken: Snapshot) -> int:
    return (int(taken.facts["at"]) - arms[0].first) * len(arms)


def _about(metadata: dict[str, str]) -> dict[str, Any]:
    try:
        found = limits.read_json(metadata.get(_KEY, "").encode(), finite=False)  # a training that has failed has NaN
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}
