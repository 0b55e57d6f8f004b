"""Training loops that are not ticketfind's: a function of the user's, or any program, trains one arm.

Both are `train.Trainer`s, so that searches and evaluations use them as they use ticketfind's own training.
"""

import copy
import json
import math
import os
import shlex
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ticketfind import TicketfindError, checkpoint, engine, files, masks
from ticketfind.batches import derived_seed
from ticketfind.masks import Masks
from ticketfind.results import Measured
from ticketfind.specs import one_line
from ticketfind.tensorfile import save_tensors
from ticketfind.ticket import hold
from ticketfind.train import Arm, Outcome, State, Task, Trainer, Work

METRICS = ("accuracy", "accuracy_early", "early_stop", "validation_loss", "test_size")
"""What a training of one's own tells; all but the first may be left out (docs/guide.md)."""


def _outcome(metrics: Any, arm: Arm, work: Work, final: State, kept: State | None, steps: int) -> Outcome:
    """What was trained, checked. steps: iterations, for an early stop that the metrics do not tell."""
    if not isinstance(metrics, Mapping) or "accuracy" not in metrics:
        found = f"no accuracy among {', '.join(map(str, metrics))}" if isinstance(metrics, Mapping) else repr(metrics)
        raise TicketfindError(f"{arm.name}: metrics: expected a dict with accuracy (of the test set), found {found}")
    numbers: dict[str, float] = {}
    for key in METRICS:
        value = metrics.get(key)
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise TicketfindError(f"{arm.name}: metrics: {key}: expected a finite number, found {value!r}")
        numbers[key] = value
    for name, weight in final.items():
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
        accuracy_early=float(numbers.get("accuracy_early", numbers["accuracy"])),
        accuracy_end=float(numbers["accuracy"]),
        validation_loss=numbers.get("validation_loss"),
    )
    size = numbers.get("test_size")
    return Outcome((), final, kept, measured, None if size is None else int(size))


# ------------------------------------------------------------------------------------------- a function


class Hold:
    """What a trainer calls with its optimizer: ``hold(optimizer)`` keeps pruned weights at exactly zero.

    It counts the optimizer's steps, which are the iterations, and notes the weights of the one to rewind to.
    """

    def __init__(self, model: nn.Module, masks: Masks, work: Work, first: int) -> None:
        self.steps = first
        self.kept = _state(model) if work.keep_at == first else None
        self._model, self._masks, self._work = model, masks, work

    def __call__(self, optimizer: Optimizer) -> None:
        """Hold the weights that `optimizer` trains."""
        hold(self._model, optimizer, self._masks)
        optimizer.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.steps += 1
        self._work.tick(1 if self.steps <= int(self._work.how.iterations) else 0)
        if self.steps == self._work.keep_at:
            self.kept = _state(self._model)


def _state(model: nn.Module) -> State:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def by_function(function: Callable[..., Any]) -> Trainer:
    """A trainer out of ``fn(model, hold, arm) -> metrics``.

    model: in place, under its mask, on the device; trained in place. hold: see `Hold`. arm: see `train.Arm` (seed,
    round, replicate, first iteration). metrics: a dict, see METRICS.
    """

    def train(task: Task, arm: Arm, work: Work) -> Outcome:
        model = copy.deepcopy(task.model)
        engine.put(model, arm.start, arm.masks)
        model.train()
        cuda = [task.device] if task.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(derived_seed(arm.seed, "draws"))
            held = Hold(model, arm.masks, work, arm.first)
            metrics = function(model, held, arm)
        if work.keep_at is not None and held.kept is None:
            raise TicketfindError(
                f"{arm.name}: prune.rewind: expected {work.keep_at} optimizer steps under hold(optimizer),"
                f" found {held.steps}"
            )
        work.tick(max(0, int(work.how.iterations) - held.steps))
        final = {name: value.to(task.device) for name, value in _state(model).items()}
        return _outcome(metrics, arm, work, final, held.kept, held.steps)

    return train


# -------------------------------------------------------------------------------------------- a command


FIELDS = ("init", "mask", "out", "seed", "first", "rewind", "round", "replicate", "iterations", "device")
"""What a command may have in braces."""


def by_command(template: str) -> Trainer:
    """A trainer out of a command: files in, files out (docs/guide.md).

    {init}, {mask}: safetensors files, the start (pruned weights zero) and the masks by parameter. {out}: a folder, into
    which the command writes final.safetensors, metrics.json and, where {rewind} is above 0, rewind.safetensors. What
    has finished there is not run again. Raises TicketfindError for a template that cannot be filled in.
    """
    words = _words(template)

    def train(task: Task, arm: Arm, work: Work) -> Outcome:
        assert work.folder is not None
        folder = work.folder / "".join(c if c.isalnum() or c in "=.-" else "-" for c in arm.name.replace(",", ""))
        done = folder / "finished"
        if not done.exists():
            values = _fill_in(folder, task, arm, work)
            _run([word.format(**values) for word in words], folder / "log.txt", arm.name, work)
            found = _read(folder, task, arm, work)
            files.write_text(done, "")
        else:
            found = _read(folder, task, arm, work)
        work.tick(max(0, int(work.how.iterations) - arm.first))
        return found

    return train


def _words(template: str) -> list[str]:
    try:
        words = shlex.split(template)
        names = [name for word in words for _, name, _, _ in string.Formatter().parse(word) if name is not None]
    except ValueError as error:
        raise TicketfindError(f"train.command: expected a command, found {template!r}: {error}") from error
    unknown = [name for name in names if name not in FIELDS]
    if unknown or "out" not in names:
        raise TicketfindError(
            f"train.command: expected {{out}} and others of {', '.join(FIELDS)} in braces,"
            f" found {', '.join('{' + name + '}' for name in unknown or names) or 'none'}"
        )
    return words


def _fill_in(folder: Path, task: Task, arm: Arm, work: Work) -> dict[str, Any]:
    """Write the files that the command reads; what it may have in braces."""
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    save_tensors(folder / "init.safetensors", masks.masked(arm.start, arm.masks))
    save_tensors(folder / "mask.safetensors", arm.masks)
    return {
        "init": folder / "init.safetensors",
        "mask": folder / "mask.safetensors",
        "out": folder,
        "seed": arm.seed,
        "first": arm.first,
        "rewind": work.keep_at or 0,
        "round": arm.round,
        "replicate": arm.replicate,
        "iterations": int(work.how.iterations),
        "device": task.device,
    }


def _run(words: list[str], log: Path, name: str, work: Work) -> None:
    """Run a command to its end; its output goes to `log`. It ends with this process's training."""
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                words, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
    except OSError as error:
        raise TicketfindError(f"{name}: train.command: cannot run {words[0]}: {error.strerror}") from error
    try:
        while process.poll() is None:
            work.tick(0)
            time.sleep(0.05)
    finally:
        _end(process)
    if process.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-10:]
        code = process.returncode
        how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
        shown = "\n  ".join(last) or "(nothing)"
        raise TicketfindError(f"{name}: the command {words[0]} ended {how}; the last that it printed:\n  {shown}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The command and all it has started: SIGTERM, and SIGKILL for what is left after five seconds."""
    if process.poll() is not None:
        return
    stop: Callable[[int], None] = (
        (lambda number: os.killpg(process.pid, number)) if sys.platform != "win32" else process.send_signal
    )
    with suppress(ProcessLookupError):
        stop(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            stop(signal.SIGKILL)
            process.wait()


def _read(folder: Path, task: Task, arm: Arm, work: Work) -> Outcome:
    """What the command has written, checked."""
    final = _weights(folder / "final.safetensors", arm)
    kept = None
    if work.keep_at is not None:
        kept = arm.start if work.keep_at == arm.first else _weights(folder / "rewind.safetensors", arm)
    file = folder / "metrics.json"
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TicketfindError(
            f"{arm.name}: expected the command to write {file}, an object with accuracy: {one_line(error)}"
        ) from error
    return _outcome(metrics, arm, work, final, kept, int(work.how.iterations))


def _weights(file: Path, arm: Arm) -> State:
    if not file.is_file():
        raise TicketfindError(f"{arm.name}: expected the command to write {file}, a state dict, found no such file")
    return checkpoint.match(checkpoint.read(file), arm.start, allow=(), path=file)
