"""Training loops that are not ticketfind's: a function of the user's, or any program, trains one arm.

Both are `train.Trainer`s, so that searches and evaluations use them as they use ticketfind's own training.
"""

import copy
import json
import math
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ticketfind import TicketfindError, checkpoint, engine, masks
from ticketfind.batches import derived_seed, seeded
from ticketfind.results import Measured
from ticketfind.specs import one_line
from ticketfind.tensorfile import save_tensors
from ticketfind.ticket import hold
from ticketfind.train import Arm, Outcome, State, Task, Trainer, Work

try:
    import fcntl
except ImportError:  # Windows: no commands there
    fcntl = None  # type: ignore[assignment]

METRICS = ("accuracy", "accuracy_early", "early_stop", "validation_loss", "test_size")
"""What a training of one's own tells; all but the first may be left out (docs/guide.md)."""
_COUNTS = {"early_stop": 0, "test_size": 1}
"""Those that are whole numbers, and the least that they can be."""


def _outcome(metrics: Any, arm: Arm, final: State, kept: State | None, steps: int) -> Outcome:
    """What was trained, checked. steps: iterations, for an early stop that the metrics do not tell."""
    numbers = _numbers(metrics, arm)
    for name, weight in (*final.items(), *(kept or {}).items()):
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise TicketfindError(f"{arm.name}: {name} is not finite after the training; try a lower learning rate")
    revived = masks.nonzero_outside(arm.masks, final)
    if revived:
        raise TicketfindError(
            f"{arm.name}: expected pruned weights to be zero after the training, found others in"
            f" {', '.join(revived[:3])}; call hold(optimizer) before training (in a program: ticketfind.hold)"
        )
    measured = Measured(
        early_stop=int(numbers.get("early_stop", steps)),
        accuracy_early=numbers.get("accuracy_early", numbers["accuracy"]),
        accuracy_end=numbers["accuracy"],
        validation_loss=numbers.get("validation_loss"),
    )
    size = numbers.get("test_size")
    return Outcome((), final, kept, measured, None if size is None else int(size))


def _numbers(metrics: Any, arm: Arm) -> dict[str, float]:
    """The metrics that were told. Raises TicketfindError for what is no metric."""
    if not isinstance(metrics, Mapping) or metrics.get("accuracy") is None:
        names = ", ".join(map(str, metrics)) or "nothing" if isinstance(metrics, Mapping) else repr(metrics)[:80]
        raise TicketfindError(f"{arm.name}: metrics: expected a dict with accuracy (of the test set), found {names}")
    numbers = {}
    for key in METRICS:
        value = metrics.get(key)
        if value is None:
            continue
        with suppress(AttributeError, TypeError, ValueError, RuntimeError):  # a tensor or array that holds one number
            value = value.item()
        number = math.nan
        if isinstance(value, Real) and not isinstance(value, bool):
            with suppress(OverflowError):
                number = float(value)
        least = _COUNTS.get(key)
        if not math.isfinite(number) or (least is not None and (number < least or not number.is_integer())):
            kind = "a finite number" if least is None else f"a whole number from {least}"
            raise TicketfindError(f"{arm.name}: metrics: {key}: expected {kind}, found {repr(value)[:80]}")
        numbers[key] = number
    return numbers


def _fitting(found: Mapping[str, Tensor], arm: Arm, what: str) -> State:
    """The entries of `found` for those that the arm started with, in their types; more are passed over.

    Raises TicketfindError, `what` before it, that names those that are missing or have another shape.
    """
    faults = [f"{name} (none)" for name in arm.start if name not in found]
    faults += [
        f"{name} {tuple(found[name].shape)} in place of {tuple(start.shape)}"
        for name, start in arm.start.items()
        if name in found and found[name].shape != start.shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise TicketfindError(
            f"{arm.name}: {what}: expected the names and shapes that the training started with,"
            f" found {', '.join(faults[:5])}{more}"
        )
    return {name: found[name].to(start.dtype) for name, start in arm.start.items()}


# ------------------------------------------------------------------------------------------- a function


class Hold:
    """What a trainer calls with its optimizer: ``hold(optimizer)`` keeps pruned weights at exactly zero.

    It counts the optimizer's steps, which are the iterations, and notes the weights of the one to rewind to. Of several
    optimizers the one that is furthest counts; one that is held later goes on from there.
    """

    def __init__(self, model: nn.Module, arm: Arm, work: Work) -> None:
        self.steps = arm.first
        self.kept = _state(model) if work.keep_at == arm.first else None
        self._model, self._arm, self._work = model, arm, work
        self._held: list[Optimizer] = []
        self._to_tell = max(1, int(work.how.iterations) - arm.first)

    def __call__(self, optimizer: Optimizer) -> None:
        """Hold the weights that `optimizer` trains."""
        if not isinstance(optimizer, Optimizer):
            raise TicketfindError(
                f"{self._arm.name}: hold: expected a torch.optim.Optimizer, found {type(optimizer).__name__}"
            )
        own = {id(parameter) for parameter in self._model.parameters()}
        if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise TicketfindError(
                f"{self._arm.name}: hold: expected an optimizer of the model's parameters, found none of them in it;"
                " train the model that the function was given, in place"
            )
        if any(optimizer is other for other in self._held):
            return
        self._held.append(optimizer)
        hold(self._model, optimizer, self._arm.masks)
        steps = self.steps

        def count(*_: Any) -> None:
            nonlocal steps
            steps += 1
            if steps > self.steps:
                self.steps = steps
                self._tell(1)
            if steps == self.steps == self._work.keep_at:
                self.kept = _state(self._model)

        optimizer.register_step_post_hook(count)

    def finish(self) -> None:
        """The function is done. Raises TicketfindError where it has not trained as it was to."""
        at = self._work.keep_at
        if not self._held:
            raise TicketfindError(
                f"{self._arm.name}: expected the trainer to call hold(optimizer) before it trains, found no call"
            )
        if self.steps == self._arm.first:
            raise TicketfindError(f"{self._arm.name}: expected steps of the optimizer that is held, found none")
        if at is not None and self.kept is None:
            raise TicketfindError(
                f"{self._arm.name}: prune.rewind: expected {at} optimizer steps under hold(optimizer),"
                f" found {self.steps}"
            )
        self._tell(self._to_tell)

    def _tell(self, iterations: int) -> None:
        """Of no more than the training was announced to have."""
        iterations = min(iterations, self._to_tell)
        self._to_tell -= iterations
        self._work.tick(iterations)


def _state(model: nn.Module) -> State:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def by_function(function: Callable[..., Any]) -> Trainer:
    """A trainer out of ``fn(model, hold, arm) -> metrics``.

    model: in place, under its mask, on the device; trained in place. hold: see `Hold`. arm: see `train.Arm` (seed,
    round, replicate, first iteration). metrics: a dict, see METRICS. What the function draws from torch's, numpy's and
    Python's generators follows from the arm's seed.
    """

    def train(task: Task, arm: Arm, work: Work) -> Outcome:
        model = copy.deepcopy(task.model)
        engine.put(model, arm.start, arm.masks)
        model.train()
        cuda = [task.device] if task.device.type == "cuda" else []
        seed = derived_seed(arm.seed, "draws")
        with torch.random.fork_rng(devices=cuda), seeded(seed), torch.enable_grad():
            torch.manual_seed(seed)
            held = Hold(model, arm, work)
            try:
                metrics = function(model, held, arm)
            except SystemExit as error:
                raise TicketfindError(f"{arm.name}: the trainer ended the program: sys.exit({error.code!r})") from error
        held.finish()

        def weights(state: State) -> State:
            return {name: value.to(task.device) for name, value in _fitting(state, arm, "the trained model").items()}

        kept = None if held.kept is None else weights(held.kept)
        return _outcome(metrics, arm, weights(_state(model)), kept, held.steps)

    return train


# -------------------------------------------------------------------------------------------- a command


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
        folder.mkdir(parents=True, exist_ok=True)
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
    tied = {alias: arm.masks[name] for alias, name in masks.aliases(task.model).items() if name in arm.masks}
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
    return _outcome(metrics, arm, final, kept, int(work.how.iterations))


def _weights(file: Path, task: Task, arm: Arm) -> State:
    if not file.is_file():
        raise TicketfindError(f"{arm.name}: expected the command to write {file}, a state dict, found no such file")
    aliases = masks.aliases(task.model)
    found = checkpoint.read(file)
    return _fitting(
        {**found, **checkpoint.match(found, arm.start, allow=("*",), path=file, aliases=aliases)}, arm, str(file)
    )
