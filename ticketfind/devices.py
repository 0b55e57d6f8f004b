"""What a device has and does well: its memory, its precisions, which way of training several arms pays on it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from ticketfind import TicketfindError, forks, memory
from ticketfind.lanes import Context
from ticketfind.recipe import Run

SMALL_MODEL = 1_000_000
"""Parameters up to which one core is enough for a training step (docs/performance.md has the measurement)."""

PROCESSES_PER_CORE = 4
"""Small trainings under way at once, for each CPU core."""

NARROW = 128
"""Output channels up to which a network's convolutions are faster with channels last on a CPU."""

COMPILE_SECONDS = 30.0
"""What compiling a training step costs, about."""

COMPILE_SAVES = {"cpu": 0.0, "cuda": 0.0}
"""Seconds that a compiled step saves: none on the CPUs measured; on CUDA not measured, and so not counted on."""


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
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


# ------------------------------------------------------------------------------------------ choosing a way


@dataclass(frozen=True)
class Way:
    """How arms are trained on a device."""

    name: str = "eager"
    """eager, processes, stacked, graph or compile: see docs/architecture.md."""
    at_once: int = 1
    """Arms that are in memory together, at most."""
    precision: str = "fp32"
    channels_last: bool = False

    @classmethod
    def of(cls, run: Run) -> "Way":
        """As a resolved recipe says."""
        return cls(run.engine, run.arms_at_once or 1, run.precision, bool(run.channels_last))

    @property
    def in_step(self) -> int:
        """How many arms, that begin at the same iteration, are trained step by step together."""
        return self.at_once if self.name in ("stacked", "graph") else 1


EAGER = Way()


def choose(
    requested: str,
    device: torch.device,
    *,
    arms: int,
    parameters: int,
    steps: int = 0,
    forks: bool = True,
    own: bool = True,
) -> str:
    """The name of the way that `arms` trainings share `device`.

    auto, on a CPU: processes for small models (up to SMALL_MODEL parameters) where there are several cores, as their
    training steps have no work for a second core; else eager. On CUDA: graph. Anywhere: compile, where `steps`
    iterations, all trainings counted, save more time than compiling costs.
    forks: False for trainings that start processes of their own, which cannot go side by side. own: False for
    trainings that are not ticketfind's. Raises TicketfindError for a way that is not possible.
    """
    side_by_side = forks and can_fork(device)
    if requested == "processes" and not side_by_side:
        raise TicketfindError(
            "run.engine: processes needs Linux, several CPU cores and resident data, found"
            + (f" device {device.type}" if forks else " data that is streamed, or a training of your own")
        )
    if requested == "graph" and device.type != "cuda":
        raise TicketfindError(f"run.engine: graph needs a CUDA device, found {device.type}")
    if requested not in ("auto", "eager") and not own:
        raise TicketfindError(f"run.engine: expected auto or eager for a training of your own, found {requested}")
    if requested != "auto":
        return requested
    if not own:
        return "eager"
    if steps * COMPILE_SAVES[device.type] > COMPILE_SECONDS:
        return "compile"
    if device.type == "cuda":
        return "graph"
    return "processes" if side_by_side and arms > 1 and parameters <= SMALL_MODEL else "eager"


def can_fork(device: torch.device) -> bool:
    """True if trainings on `device` can go side by side in forked processes."""
    return device.type == "cpu" and forks.possible()


def check_precision(precision: str, device: torch.device) -> None:
    """Raise TicketfindError for one that the device does not have."""
    if precision == "tf32" and device.type != "cuda":
        raise TicketfindError(f"run.precision: tf32 needs a CUDA device, found {device.type}; use fp32 or bf16")


def is_faster_with_channels_last(model: nn.Module, way: str, device: torch.device, precision: str) -> bool:
    """A stated rule: networks of narrow 2-d convolutions on a CPU; any 2-d convolutions with tensor cores."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if way == "stacked" or not convolutions:
        return False
    if device.type == "cuda":
        return precision != "fp32"
    return max(module.out_channels for module in convolutions) <= NARROW


def most_at_once(
    way: str,
    asked: int | None,
    arms: int,
    device: torch.device,
    arm_bytes: Callable[[], float],
) -> int:
    """How many of `arms` trainings are in memory together: as many as asked for, or as fit into half of the memory.

    processes: up to PROCESSES_PER_CORE for each core; eager and compile: one. arm_bytes: memory that one takes.
    """
    if way == "processes":
        return min(arms, asked or PROCESSES_PER_CORE * forks.cores())
    if way not in ("stacked", "graph") or arms == 1:
        return 1
    return min(arms, asked or max(1, int(memory.total(device) / 2 / arm_bytes())))


# ---------------------------------------------------------------------------------------------- precision


@contextmanager
def no_denormals() -> Iterator[None]:
    """Inside, numbers below 1e-38 count as zero on the CPU, which computes many times slower with them.

    Adam's moments of weights whose gradients have died out decay to such numbers. Threads take the setting from the
    one that starts them: a program does well to enter this before it computes anything.
    """
    already = float(torch.tensor(1e-38) / 10) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(already)


@contextmanager
def arithmetic(way: Way, device: torch.device, model: nn.Module) -> Iterator[None]:
    """Inside, matrix products and convolutions are computed in the way's precision, and without denormal numbers."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with no_denormals():
        try:
            if device.type == "cuda":
                torch.set_float32_matmul_precision("highest" if way.precision == "fp32" else "high")
                torch.backends.cudnn.allow_tf32 = way.precision != "fp32"
            else:
                quick = _has_large_products(model) and onednn_keeps_fp32()
                torch.set_float32_matmul_precision("medium" if quick else "highest")
            yield
        finally:
            torch.set_float32_matmul_precision(products)
            torch.backends.cudnn.allow_tf32 = convolutions


def _has_large_products(model: nn.Module) -> bool:
    """Whether oneDNN's products were faster than MKL's, where they were: one thread, and 100,000 weights in a layer."""
    return torch.get_num_threads() == 1 and any(
        isinstance(module, nn.Linear) and module.weight.numel() >= 100_000 for module in model.modules()
    )


@functools.cache
def onednn_keeps_fp32() -> bool:
    """Whether oneDNN's products, which float32_matmul_precision "medium" turns on, are as exact as fp32 ones here.

    Some processors round to bfloat16 in them (AMX). Tried on products such as a layer's forward and backward pass.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 784, generator=generator), torch.randn(784, 304, generator=generator)
    before = torch.get_float32_matmul_precision()

    def error(precision: str) -> float:
        torch.set_float32_matmul_precision(precision)
        pairs = [(x, weight), (x.t(), torch.mm(x, weight)), (torch.mm(x, weight), weight.t())]
        exact = [a.double() @ b.double() for a, b in pairs]
        return max(float((a @ b - e).abs().max() / e.abs().max()) for (a, b), e in zip(pairs, exact, strict=True))

    try:
        return error("medium") <= 4 * error("highest")
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(way: Way, device: torch.device) -> Context:
    if way.precision == "bf16":
        return functools.partial(torch.autocast, device.type, dtype=torch.bfloat16, cache_enabled=False)
    return nullcontext
