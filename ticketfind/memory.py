"""How much memory trainings need, and a device has; what would fit where it runs short."""

import copy
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ticketfind import TicketfindError
from ticketfind.batches import Batch, tensors_of
from ticketfind.outputs import OutputFn, call
from ticketfind.recipe import Train

_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""A container's limit, and what it has used, where Linux keeps them."""


def total(device: torch.device) -> float:
    """Bytes of memory that the device and this machine have, the smaller of the two; a container's limit counts."""
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else 2.0**33
    for limit, _ in _LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            memory = min(memory, float(Path(limit).read_text()))
    return min(memory, torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else memory


def free(device: torch.device) -> float:
    """Bytes that a program could still get: on a CPU what other programs, and a container's limit, leave, with swap."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    memory = total(device)
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        memory = 1024.0 * (kib["MemAvailable"] + kib["SwapFree"])
    for limit, used in _LIMITS:
        with suppress(OSError, ValueError):
            memory = min(memory, float(Path(limit).read_text()) - _held(Path(used)))
    return memory


def _held(usage: Path) -> float:
    """Of a container's usage what is not cached files, which the system takes back when it needs to."""
    cached = 0
    with suppress(OSError, ValueError):
        for line in (usage.parent / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            cached += int(value) if name in ("inactive_file", "active_file") else 0
    return float(usage.read_text()) - cached


@dataclass(frozen=True)
class Need:
    """Bytes that the training of one arm takes."""

    fixed: int
    """Weights, gradients, moments, masks."""
    per_example: float
    """What the forward pass keeps for the backward pass, for each example of a batch."""

    def of(self, batch_size: int) -> float:
        """With a batch of so many examples, and as much again for what the backward pass makes of it."""
        return self.fixed + 2 * self.per_example * batch_size


def need_of(model: nn.Module, how: Train, loss: OutputFn, batch: Batch) -> Need:
    """What an arm of `model` needs; what a pass keeps is measured on `batch`, of which a few examples are enough."""
    model = copy.deepcopy(model).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss(call(model, batch[0]), batch[1])
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = 2 if how.optimizer != "sgd" else int(how.momentum > 0)
    del value
    return Need(weights * (3 + moments), sum(saved.values()) / len(tensors_of(batch[0])[0]))


def check(need: Need, arms: int, batch_size: int, device: torch.device) -> None:
    """Raise TicketfindError where `arms` trainings at once cannot fit into what is free, by half of the estimate."""
    there = free(device)
    if arms * (need.fixed / 2 + need.per_example * batch_size) > there:
        raise TicketfindError(
            f"memory: {_arms(arms)} with a batch of {batch_size} would need about {_gib(arms * need.of(batch_size))},"
            f" {_gib(there)} are free; {what_fits(need, arms, batch_size, there)}"
        )


def has_run_out(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "out of memory", "Cannot allocate memory")
    )


def what_fits(need: Need | None, arms: int, batch_size: int, there: float) -> str:
    """What to do where `arms` trainings at once do not fit into `there` bytes.

    What is said to fit does by the estimate; where that says that all would, it is off, and the next smaller may fit.
    """
    is_off = need is None or arms * need.of(batch_size) <= there
    fitting = arms - 1 if need is None or is_off else min(arms - 1, int(there / need.of(batch_size)))
    if fitting >= 1:
        return f"--arms-at-once {fitting} {'may' if is_off else 'would'} fit, with the same results"
    if batch_size > 1 and (need is None or is_off):
        return f"a smaller batch may fit: --batch-size {batch_size // 2}"
    if need is None or is_off:
        return "a batch of one example is the smallest: it takes a smaller model, or a device with more memory"
    examples = min(batch_size - 1, int((there - need.fixed) / 2 / max(need.per_example, 1.0)))
    if examples >= 1:
        return f"one arm with --batch-size {examples} would fit"
    return (
        f"one example takes {_gib(need.of(1))}, the model's weights, gradients and moments alone {_gib(need.fixed)}:"
        " it takes a smaller model, or a device with more memory"
    )


def _arms(arms: int) -> str:
    return "one training" if arms == 1 else f"{arms} trainings at once"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
