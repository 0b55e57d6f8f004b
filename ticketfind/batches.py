"""Batches: their order, examples held as whole tensors, and what training, validation and test sets have in common.

Legend: n examples; k iterations; b examples in a batch; images [b, channels, height, width].
"""

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ticketfind.augment import augmented
from ticketfind.outputs import Inputs

Batch = tuple[Inputs, Tensor]
"""Inputs and targets."""

_BLOCK = 256
"""Iterations whose order is drawn at once."""


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A seed for one purpose, unrelated to the seeds of others and of neighboring numbers."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int, *devices: torch.device) -> Iterator[None]:
    """Inside, what is drawn from torch's, numpy's and Python's generators follows from `seed`; outside, no change.

    devices: whose generators follow from it too, as the processor's always do.
    """
    import numpy

    before = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device for device in devices if device.type != "cpu"]):
        seed_all(seed, *devices)
        try:
            yield
        finally:
            random.setstate(before[0])
            numpy.random.set_state(before[1])


def seed_all(seed: int, *devices: torch.device) -> None:
    """Start torch's, numpy's and Python's generators from `seed`; and those of devices where one is given."""
    import numpy

    torch.default_generator.manual_seed(seed)
    if any(device.type != "cpu" for device in devices):
        torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """`function` of the input tensor, or of each of them."""
    if isinstance(inputs, dict):
        return {name: function(value) for name, value in inputs.items()}
    return function(inputs)


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """The input tensors, one or several."""
    return list(inputs.values()) if isinstance(inputs, dict) else [inputs]


def chunk_size(size: int, inputs: Inputs) -> int:
    """Examples that are measured together: `size`, or up to 16 times as many where they are small as `inputs` are."""
    per_example = max(1, sum(math.prod(t.shape[1:]) for t in tensors_of(inputs)))
    return max(size, min(2**20 // per_example, 16 * size))


# ------------------------------------------------------------------------------------------- the order


@dataclass(frozen=True)
class Order:
    """Which examples a training sees, and in which order: a function of its seed.

    Iteration i takes places i * batch_size and following of an endless sequence of shuffled epochs, each a function
    of the seed and its number: a training can start anywhere in it, and every batch is full.
    """

    seed: int
    batch_size: int
    first: int
    """The iteration to start with."""
    stop: int
    """The iteration to end before."""

    def indices(self, examples: int) -> Iterator[Tensor]:
        """Examples of the iterations, int64 [k, batch_size], in blocks."""

        def shuffled(generator: torch.Generator) -> Tensor:
            return torch.randperm(examples, generator=generator)

        return self._blocks("order", examples, shuffled)

    def draws(self, examples: int, kinds: int) -> Iterator[Tensor]:
        """Random numbers for each example in the same order, int64 [k, batch_size, kinds] in 0 .. 2**31 - 1."""

        def drawn(generator: torch.Generator) -> Tensor:
            return torch.randint(2**31, (examples, kinds), generator=generator)

        return self._blocks("augment", examples, drawn)

    def _blocks(self, purpose: str, examples: int, epoch: Callable[[torch.Generator], Tensor]) -> Iterator[Tensor]:
        for start in range(self.first, self.stop, _BLOCK):
            stop = min(start + _BLOCK, self.stop)
            begin, end = start * self.batch_size, stop * self.batch_size
            numbers = range(begin // examples, -(-end // examples))
            seeds = (derived_seed(self.seed, purpose, number) for number in numbers)
            sequence = torch.cat([epoch(torch.Generator().manual_seed(seed)) for seed in seeds])
            part = sequence[begin - numbers.start * examples :][: end - begin]
            yield part.view(stop - start, self.batch_size, *part.shape[1:])


@dataclass(frozen=True)
class Feed:
    """The batches of a training, one after another, or as the tensors that they are made from."""

    blocks: Iterator[tuple[Tensor, ...]]
    """Tensors [k, b, ...] of k iterations in a row, on the device."""
    batch: Callable[..., Batch]
    """Each tensor's part [b, ...] of an iteration -> its batch; row by row, and nothing but tensor arithmetic."""

    def __iter__(self) -> Iterator[Batch]:
        for block in self.blocks:
            for row in zip(*block, strict=True):
                yield self.batch(*row)

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> "Feed":
        """Of batches that are read as they come."""
        names: list[str] = []  # of a dict's entries, known once a batch is

        def blocks() -> Iterator[tuple[Tensor, ...]]:
            for inputs, targets in batches:
                names[:] = inputs if isinstance(inputs, dict) else []
                yield tuple(tensor[None] for tensor in (*tensors_of(inputs), targets))

        def batch(*row: Tensor) -> Batch:
            *tensors, targets = row
            return dict(zip(names, tensors, strict=True)) if names else tensors[0], targets

        return cls(blocks(), batch)

    @classmethod
    def merged(cls, feeds: Sequence["Feed"]) -> "Feed":
        """Several feeds of the same data as one: batches [r * b, ...] of the r feeds' batches in order."""
        together = zip(*(feed.blocks for feed in feeds), strict=True)
        blocks = (tuple(torch.cat(parts, dim=1) for parts in zip(*one_each, strict=True)) for one_each in together)
        return cls(blocks, feeds[0].batch)


# ---------------------------------------------------------------------------------------- the examples


class Examples(Protocol):
    """A training, validation or test set."""

    @property
    def classes(self) -> int | None:
        """The highest label + 1; None where the targets are no labels or not known without reading everything."""

    def __len__(self) -> int:
        """How many examples."""

    def to(self, device: torch.device) -> "Examples":
        """The same, with batches on `device`."""

    def batches(self, order: Order) -> Feed:
        """The batches of a training."""

    def first(self, size: int) -> Batch:
        """The first `size` examples, or as many as there are."""

    def chunks(self, size: int) -> Iterator[Batch]:
        """Every example once, in order, `size` (or more, where they are small) at a time."""

    def select(self, names: Sequence[str]) -> "Examples":
        """The same, with these of its named inputs only."""


def _sent(block: Tensor, device: torch.device) -> Tensor:
    """`block` on `device`, without waiting for what the device is still to do."""
    return block.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else block


@dataclass(frozen=True)
class Split:
    """Examples held in memory, or on the device, as whole tensors."""

    inputs: Inputs
    """[n, ...] float32, or int64 for tokens."""
    targets: Tensor
    """int64 labels [n], or whatever the loss takes."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def classes(self) -> int | None:
        """The highest label + 1; None where the targets are no labels."""
        return None if self.targets.is_floating_point() else int(self.targets.max()) + 1

    @property
    def most_frequent(self) -> float | None:
        """The share of the most frequent label; None where the targets are no labels, one for each example."""
        if self.targets.is_floating_point() or self.targets.ndim != 1:
            return None
        _, counts = torch.unique(self.targets, return_counts=True)
        return float(counts.max()) / len(self.targets)

    def batch(self, indices: Tensor) -> Batch:
        """The examples at `indices` [b] (on the split's device)."""
        return map_inputs(lambda t: t.index_select(0, indices), self.inputs), self.targets.index_select(0, indices)

    def to(self, device: torch.device) -> "Split":
        """This split on `device`."""
        return Split(map_inputs(lambda t: t.to(device), self.inputs), self.targets.to(device))

    def batches(self, order: Order) -> Feed:
        """The batches of a training."""
        return Feed(((_sent(block, self.targets.device),) for block in order.indices(len(self))), self.batch)

    def first(self, size: int) -> Batch:
        """The first `size` examples, or as many as there are."""
        return map_inputs(lambda t: t[:size], self.inputs), self.targets[:size]

    def chunks(self, size: int) -> Iterator[Batch]:
        """Every example once, in order."""
        size = chunk_size(size, self.inputs)
        for start in range(0, len(self), size):
            here = slice(start, start + size)
            yield map_inputs(lambda t, here=here: t[here], self.inputs), self.targets[here]  # type: ignore[misc]

    def select(self, names: Sequence[str]) -> "Split":
        """This split with these of its named inputs only."""
        return self if isinstance(self.inputs, Tensor) else Split({n: self.inputs[n] for n in names}, self.targets)


# ------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """Training, validation and test examples."""

    train: Examples
    validation: Examples
    test: Examples
    augment: Sequence[str] = ()
    """What is done to training images: names of `augment.AUGMENTATIONS`."""

    @property
    def classes(self) -> int | None:
        """Number of classes, the highest label + 1; None where the targets are no labels or not known."""
        found = [part.classes for part in (self.train, self.validation, self.test)]
        known = [classes for classes in found if classes is not None]
        return max(known) if len(known) == len(found) else None

    @property
    def outputs(self) -> int | None:
        """Outputs that a network needs: one a class, or one a number of the target; None where that is not known."""
        if self.classes is not None:
            return self.classes
        targets = self.example()[1]
        return math.prod(targets.shape[1:]) if targets.is_floating_point() and targets.ndim <= 2 else None

    def select(self, names: Sequence[str]) -> "Data":
        """This data with these of its named inputs only."""
        return self._each(lambda part: part.select(names))

    def example(self, size: int = 2) -> Batch:
        """The first examples of the test set, `size` of them or as many as there are."""
        return self.test.first(size)

    def to(self, device: torch.device) -> "Data":
        """This data with its batches on `device`."""
        return self._each(lambda part: part.to(device))

    def _each(self, change: Callable[[Examples], Examples]) -> "Data":
        return replace(self, train=change(self.train), validation=change(self.validation), test=change(self.test))

    @property
    def is_resident(self) -> bool:
        """Whether all examples are held in memory: no process is needed to read them."""
        return all(isinstance(part, Split) for part in (self.train, self.validation, self.test))

    @property
    def resident_bytes(self) -> int:
        """Bytes of the examples that are held in memory, or on the device."""
        splits = [part for part in (self.train, self.validation, self.test) if isinstance(part, Split)]
        return sum(t.numel() * t.element_size() for s in splits for t in (*tensors_of(s.inputs), s.targets))

    def training(self, order: Order) -> Feed:
        """The batches of a training, augmented."""
        feed = self.train.batches(order)
        if not self.augment:
            return feed
        draws = itertools.chain.from_iterable(order.draws(len(self.train), 3))

        def blocks() -> Iterator[tuple[Tensor, ...]]:
            for block in feed.blocks:
                drawn = torch.stack([*itertools.islice(draws, len(block[0]))])
                yield *block, _sent(drawn, block[0].device)

        def batch(*row: Tensor) -> Batch:
            *rest, draw = row
            inputs, targets = feed.batch(*rest)
            return map_inputs(lambda t: augmented(t, draw, self.augment), inputs), targets

        return Feed(blocks(), batch)
