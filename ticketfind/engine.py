"""Training steps, and how several arms share a device. The only file that knows about devices.

Knows no epochs, rounds, files or data-set names.
"""

import math
import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from ticketfind import TicketfindError
from ticketfind.batches import Batch, Examples
from ticketfind.masks import Masks, masked
from ticketfind.outputs import OutputFn, call, counted
from ticketfind.prunable import aliases
from ticketfind.recipe import Train

T = TypeVar("T")
Tick = Callable[[int], None]
"""Called with the number of iterations done since the last call."""

SMALL_MODEL = 1_000_000
"""Parameters up to which one core is enough for a training step (docs/performance.md has the measurement)."""

PROCESSES_PER_CORE = 4
"""Small trainings under way at once, for each CPU core."""


class Diverged(TicketfindError):
    """The loss is no longer a finite number."""

    def __init__(self, iteration: int) -> None:
        super().__init__(iteration)
        self.iteration = iteration


def resolve_device(name: str) -> torch.device:
    """The device of a recipe's `run.device`; auto: CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise TicketfindError(f"run.device: expected auto, cpu or cuda (cuda:1), found {name!r}")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).split("\n", 1)[0]
        raise TicketfindError(f"run.device: expected a device that works here, found {name!r}: {first}") from error
    return device


def total_memory(device: torch.device) -> float:
    """Bytes of memory that the device and this machine have, the smaller of the two; a container's limit counts."""
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else 2.0**33
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with suppress(OSError, ValueError):  # no such file, or "max"
            memory = min(memory, float(limit.read_text()))
    return min(memory, torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else memory


# -------------------------------------------------------------------------------------- one arm, step by step


def learning_rate(how: Train, iteration: int) -> float:
    """The learning rate of an iteration (from 0): linear warmup, then the schedule."""
    warmup, total = int(how.warmup), int(how.iterations)
    if iteration < warmup:
        return how.lr * (iteration + 1) / warmup
    if how.schedule == "cosine":
        return how.lr * 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / max(1, total - warmup)))
    return float(how.lr * 0.1 ** sum(iteration >= int(milestone) for milestone in how.milestones))


class _Optimizer:
    """PyTorch's own update rules, called as functions on lists of tensors.

    As ``torch.optim``'s classes do, but without their bookkeeping, which costs a small network a fifth of its step
    (and a second at start-up). A parameter without a gradient is left alone, as there.
    """

    def __init__(self, parameters: Sequence[Tensor], how: Train) -> None:
        self._parameters = parameters
        self._how = how
        self._first: list[Tensor | None] = [None] * len(parameters)
        self._second: list[Tensor] = []
        self._steps: list[Tensor] = []
        if how.optimizer != "sgd" or how.momentum:  # from zero, momentum's first step is the gradient, as there
            self._first = [torch.zeros_like(p) for p in parameters]
        if how.optimizer != "sgd":
            self._second = [torch.zeros_like(p) for p in parameters]
            self._steps = [torch.zeros((), device=p.device) for p in parameters]

    def step(self, grads: Sequence[Tensor | None], lr: float) -> None:
        live = [i for i, grad in enumerate(grads) if grad is not None]
        whole = len(live) == len(grads)

        def pick(values: Sequence[T]) -> list[T]:
            return list(values) if whole else [values[i] for i in live]

        parameters, gradients, first = (
            pick(self._parameters),
            [g for g in grads if g is not None],
            pick(self._first),
        )
        decay = self._how.weight_decay
        if self._how.optimizer == "sgd":
            sgd(
                parameters, gradients, first, fused=True, weight_decay=decay, momentum=self._how.momentum, lr=lr,
                dampening=0.0, nesterov=False, maximize=False,
            )  # fmt: skip
            return
        update = adamw if self._how.optimizer == "adamw" else adam
        update(
            parameters, gradients, first, pick(self._second), [], pick(self._steps), fused=True, amsgrad=False,  # type: ignore[arg-type]
            beta1=0.9, beta2=0.999, lr=lr, weight_decay=decay, eps=1e-8, maximize=False,
        )  # fmt: skip


@torch.no_grad()
def put(model: nn.Module, start: Mapping[str, Tensor], masks: Masks) -> None:
    """Put `start` under `masks` into `model`; of tied parameters the one that has the mask counts."""
    state, tied = model.state_dict(), aliases(model)
    for name, value in masked(start, masks).items():
        if name not in tied:
            state[name].copy_(value)


class Lane:
    """One arm's training under way. Pruned weights are exactly zero at all times."""

    def __init__(
        self, model: nn.Module, start: Mapping[str, Tensor], masks: Masks, how: Train, loss: OutputFn, seed: int
    ) -> None:
        """Put `start` under `masks` into `model`, which the lane owns from here on; fresh optimizer state."""
        torch.manual_seed(seed)
        self._model, self._how, self._loss = model, how, loss
        put(model, start, masks)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._leaves = list(named.values())
        self._weights = [p.detach() for p in self._leaves]
        pruning = {name: mask for name, mask in masks.items() if name in named and not bool(mask.all())}
        self._pruned_weights = [w for w, name in zip(self._weights, named, strict=True) if name in pruning]
        self._keep = [pruning[name].to(device=p.device, dtype=p.dtype) for name, p in named.items() if name in pruning]
        self._optimizer = _Optimizer(self._weights, how)

    def advance(self, batches: Iterable[Batch], first: int, tick: Tick) -> list[float]:
        """Train on `batches`, the first of which is iteration `first`; the losses, fetched once at the end.

        Raises Diverged at the first loss that is not finite.
        """
        self._model.train()
        losses = []
        iteration = first
        for inputs, targets in batches:
            loss = self._loss(call(self._model, inputs), targets)
            grads = self._own(torch.autograd.grad(loss, self._leaves, allow_unused=True))
            self._optimizer.step(grads, learning_rate(self._how, iteration))
            if self._keep:
                torch._foreach_mul_(self._pruned_weights, self._keep)
            losses.append(loss.detach())
            iteration += 1
            tick(1)
        values: list[float] = torch.stack(losses).tolist()
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                raise Diverged(first + offset)
        return values

    def _own(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients in their weights' memory layout, as ``backward`` leaves them: the fused updates rely on it."""
        dense = [g.to_dense() if g is not None and g.layout != torch.strided else g for g in grads]  # of embeddings
        return [
            g if g is None or g.stride() == w.stride() else torch.empty_like(w).copy_(g)
            for g, w in zip(dense, self._weights, strict=True)
        ]

    @torch.no_grad()
    def measure(self, examples: Examples, functions: Sequence[OutputFn], batch_size: int) -> list[float]:
        """The mean of each function over all examples, in evaluation mode; fetched from the device once."""
        self._model.eval()
        device = self._weights[0].device
        sums = torch.zeros(len(functions), dtype=torch.float64, device=device)
        weight = torch.zeros((), dtype=torch.float64, device=device)
        for inputs, targets in examples.chunks(batch_size):
            outputs, here = call(self._model, inputs), counted(targets)
            values = torch.stack([f(outputs, targets).double() for f in functions])
            sums += torch.where(torch.as_tensor(here, device=device) > 0, here * values, 0.0)  # the mean of none is NaN
            weight += here
        means: list[float] = (sums / weight).tolist()
        return means

    def state(self) -> dict[str, Tensor]:
        """A copy of every parameter and buffer."""
        return {k: v.detach().clone() for k, v in self._model.state_dict().items() if isinstance(v, Tensor)}


# --------------------------------------------------------------------------------- several arms on a device


def choose(requested: str, device: torch.device, *, arms: int, parameters: int, forks: bool = True) -> str:
    """The way that `arms` trainings share `device`: "eager", one after another, or "processes", side by side.

    auto: side by side for small models (up to SMALL_MODEL parameters) on a CPU with several cores, where a training
    step has no work for a second core. forks: False for trainings that start processes of their own, which cannot
    go side by side. Raises TicketfindError where side by side is asked for and not possible.
    """
    possible = can_fork(device) and forks
    if requested == "processes" and not possible:
        raise TicketfindError(
            "run.engine: processes needs Linux, several CPU cores and resident data, found"
            + (f" device {device.type}" if forks else " data that is streamed, or a training of your own")
        )
    if requested != "auto":
        return requested
    return "processes" if possible and arms > 1 and parameters <= SMALL_MODEL else "eager"


def can_fork(device: torch.device) -> bool:
    """True if trainings on `device` can go side by side in forked processes."""
    return device.type == "cpu" and sys.platform == "linux" and cores() > 1


def at_once(way: str, arms: int) -> int:
    """How many of `arms` trainings are in memory together."""
    return min(arms, PROCESSES_PER_CORE * cores()) if way == "processes" else 1


def each(way: str, count: int, train: Callable[[int, Tick], T], tick: Tick) -> Iterator[T]:
    """``train(i, tick)`` for i from 0 to count - 1, in this order, by the way that `choose` named."""
    if way == "processes":
        yield from _side_by_side(count, train, tick)
    else:
        for index in range(count):
            yield train(index, tick)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _side_by_side(count: int, train: Callable[[int, Tick], T], tick: Tick) -> Iterator[T]:
    """Each training in a forked process with one thread; results in order.

    One thread each, so that the numbers do not depend on how many cores there are; more processes than cores, so
    that five replicates keep two cores busy to the end.
    """
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[int, multiprocessing.context.ForkProcess]] = {}
    done: dict[int, T] = {}
    started = delivered = 0
    try:
        while delivered < count:
            while started < count and len(running) < at_once("processes", count):
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
