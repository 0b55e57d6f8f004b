"""How large and how fast networks are: parameters, multiply-adds, and the time of a call measured side by side."""

import copy
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ticketfind.batches import map_inputs, tensors_of
from ticketfind.outputs import Inputs, call


def parameters(model: nn.Module) -> int:
    """Numbers in all parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def multiply_adds(model: nn.Module, inputs: Inputs) -> int:
    """Of one call, in matrix products and convolutions, as torch's FlopCounterMode counts them.

    It counts none in what is computed as a whole: attention, transformer layers, LSTMs. So they are computed in parts.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the flags speak of Intel's GPUs
            with (
                sdpa_kernel(SDPBackend.MATH),
                torch.backends.mkldnn.flags(enabled=False),
                torch.backends.cudnn.flags(enabled=False),
                FlopCounterMode(display=False) as counter,
            ):
                call(
                    copy.deepcopy(model).requires_grad_(False), inputs
                )  # the counter trips over gradients under no_grad
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a call: median, lower and upper quartile."""

    median: float
    low: float
    high: float

    def is_below(self, other: "Latency") -> bool:
        """Whether it is the faster one, and not by so little that the quartiles overlap."""
        return self.high < other.low


@torch.inference_mode()
def latencies(models: Sequence[nn.Module], inputs: Inputs, *, seconds: float = 1.0) -> list[Latency]:
    """Of each network, called in turns, so that what else the machine does falls on all alike."""
    times: list[list[float]] = [[] for _ in models]
    device = tensors_of(inputs)[0].device
    end = time.monotonic() + seconds
    while len(times[0]) < 12 or time.monotonic() < end:
        for model, own in zip(models, times, strict=True):
            began = time.perf_counter()
            call(model, inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            own.append(1000 * (time.perf_counter() - began))
    quartiles = [statistics.quantiles(own[2:], n=4) for own in times]  # the first calls warm up
    return [Latency(median, low, high) for low, median, high in quartiles]


@dataclass(frozen=True)
class Comparison:
    """Two networks side by side: the first, then the second."""

    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]
    """Of one example."""
    latency: dict[int, tuple[Latency, Latency]]
    """By the number of examples in a call."""


def compared(first: nn.Module, second: nn.Module, batches: Sequence[Inputs], device: str = "cpu") -> Comparison:
    """Two networks with the same inputs and outputs, in the mode that they are in; both are moved to the device.

    batches: one example, and others.
    """
    both = (first.to(device), second.to(device))
    batches = [map_inputs(lambda t: t.to(device), inputs) for inputs in batches]
    timed = {len(tensors_of(inputs)[0]): latencies(both, inputs) for inputs in batches}
    return Comparison(
        (parameters(first), parameters(second)),
        (multiply_adds(first, batches[0]), multiply_adds(second, batches[0])),
        {size: (one, other) for size, (one, other) in timed.items()},
    )
