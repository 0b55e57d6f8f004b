"""Where batches come from: tensors on the device, or a data set that is read as it is needed.

Legend: n examples; k iterations; b examples in a batch; images [b, channels, height, width].
"""

import hashlib
import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ticketfind import TicketfindError
from ticketfind.augment import augmented
from ticketfind.outputs import Inputs
from ticketfind.specs import one_line

Batch = tuple[Inputs, Tensor]
"""Inputs and targets."""
ToBatch = Callable[[list[Any]], Batch]
"""Examples, as a data set gives them -> the batch of them."""

CPU = torch.device("cpu")

_BLOCK = 256
"""Iterations whose order is drawn at once."""


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A seed for one purpose, unrelated to the seeds of others and of neighboring numbers."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """`function` of the input tensor, or of each of them."""
    if isinstance(inputs, dict):
        return {name: function(value) for name, value in inputs.items()}
    return function(inputs)


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """The input tensors, one or several."""
    return list(inputs.values()) if isinstance(inputs, dict) else [inputs]


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


# ------------------------------------------------------------------------------------------ the sources


class Examples(Protocol):
    """A training, validation or test set."""

    @property
    def classes(self) -> int | None:
        """The highest label + 1; None where the targets are no labels or not known without reading everything."""

    def __len__(self) -> int:
        """How many examples."""

    def to(self, device: torch.device) -> "Examples":
        """The same, with batches on `device`."""

    def batches(self, order: Order) -> Iterator[Batch]:
        """The batches of a training."""

    def chunks(self, size: int) -> Iterator[Batch]:
        """Every example once, in order, `size` (or more, where they are small) at a time."""


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

    def batch(self, indices: Tensor) -> Batch:
        """The examples at `indices` [b] (on the split's device)."""
        return map_inputs(lambda t: t.index_select(0, indices), self.inputs), self.targets.index_select(0, indices)

    def to(self, device: torch.device) -> "Split":
        """This split on `device`."""
        return Split(map_inputs(lambda t: t.to(device), self.inputs), self.targets.to(device))

    def batches(self, order: Order) -> Iterator[Batch]:
        """The batches of a training."""
        for block in order.indices(len(self)):
            for indices in block.to(self.targets.device):
                yield self.batch(indices)

    def chunks(self, size: int) -> Iterator[Batch]:
        """Every example once, in order."""
        per_example = max(1, sum(math.prod(t.shape[1:]) for t in tensors_of(self.inputs)))
        size = max(size, min(2**20 // per_example, 16 * size))
        for start in range(0, len(self), size):
            here = slice(start, start + size)
            yield map_inputs(lambda t, here=here: t[here], self.inputs), self.targets[here]  # type: ignore[misc]


@dataclass(frozen=True)
class Stream:
    """Examples of a map-style data set, read as they are needed."""

    dataset: Any
    """Index -> example."""
    to_batch: ToBatch
    indices: Tensor
    """int64 [n]: which of the data set's examples these are."""
    workers: int
    """Processes that read; the batches do not depend on it."""
    labels: Tensor | None = None
    """int64 [n], where they are known."""
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def classes(self) -> int | None:
        """The highest label + 1, where labels are known."""
        return None if self.labels is None else int(self.labels.max()) + 1

    def part(self, places: Tensor) -> "Stream":
        """The examples at `places` of this one."""
        return replace(self, indices=self.indices[places], labels=None if self.labels is None else self.labels[places])

    def to(self, device: torch.device) -> "Stream":
        """This stream with its batches on `device`."""
        return replace(self, device=device)

    def batches(self, order: Order) -> Iterator[Batch]:
        """The batches of a training; what the data set draws at random follows from seed and iteration."""
        rows = itertools.chain.from_iterable(order.indices(len(self)))
        numbered = zip(itertools.count(order.first), rows, strict=False)
        return self._read(
            [derived_seed(order.seed, "read", iteration), *self.indices[row].tolist()] for iteration, row in numbered
        )

    def chunks(self, size: int) -> Iterator[Batch]:
        """Every example once, in order."""
        return self._read([0, *part.tolist()] for part in torch.split(self.indices, size))

    def _read(self, keys: Iterator[list[int]]) -> Iterator[Batch]:
        reader = _Reader(self.dataset, self.to_batch)
        # a generator is an iterable of batches' indices, which is all that the loader asks of a batch sampler
        return _load(reader, self.workers, self.device, batch_sampler=keys, prefetch_factor=4 if self.workers else None)


@dataclass(frozen=True)
class Flow:
    """Examples of an iterable data set, in the order in which it gives them, read by one process of its own."""

    dataset: Any
    """Iterable of examples; one pass is an epoch."""
    to_batch: ToBatch
    length: int
    classes: int | None = None
    device: torch.device = CPU

    def __len__(self) -> int:
        return self.length

    def to(self, device: torch.device) -> "Flow":
        """This flow with its batches on `device`."""
        return replace(self, device=device)

    def batches(self, order: Order) -> Iterator[Batch]:
        """The batches of a training; those before its first are read and passed over."""
        return _load(_FlowReader(self, order.batch_size, order), 1, self.device, batch_size=None)

    def chunks(self, size: int) -> Iterator[Batch]:
        """Every example once, in order."""
        return _load(_FlowReader(self, size, None), 1, self.device, batch_size=None)


class _Reader(Dataset[Any]):
    """Whole batches from a map-style data set; the first index of each is its seed."""

    def __init__(self, dataset: Any, to_batch: ToBatch) -> None:
        self._dataset, self._to_batch = dataset, to_batch

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]

    def __getitems__(self, key: list[int]) -> "Batch | TicketfindError":
        seed, *indices = key
        with seeded(seed):
            return _tried(self._to_batch, (self._example(index) for index in indices))

    def _example(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except Exception as error:
            raise TicketfindError(f"data: example {index} cannot be read: {one_line(error)}") from error


class _FlowReader(IterableDataset[Any]):
    """Batches from an iterable data set: one pass, or those of an order over endless passes."""

    def __init__(self, flow: Flow, batch_size: int, order: Order | None) -> None:
        self._flow, self._size, self._order = flow, batch_size, order

    def __iter__(self) -> Iterator["Batch | TicketfindError"]:
        examples = self._one_pass(0, 0) if self._order is None else self._endless(self._order)
        batches = iter(lambda: list(itertools.islice(examples, self._size)), [])
        if self._order is not None:
            batches = itertools.islice(batches, self._order.first, self._order.stop)
        for batch in batches:
            yield _tried(self._flow.to_batch, batch)

    def _endless(self, order: Order) -> Iterator[Any]:
        for epoch in itertools.count():
            yield from self._one_pass(epoch, order.seed)

    def _one_pass(self, epoch: int, seed: int) -> Iterator[Any]:
        dataset = self._flow.dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        _seed_all(derived_seed(seed, "read", epoch))  # in a process of its own
        example = None
        for example in dataset:
            yield example
        if example is None:
            raise RuntimeError("data: the iterable data set gave nothing in a further pass")


def _tried(to_batch: ToBatch, examples: Iterable[Any]) -> "Batch | TicketfindError":
    """The batch, or the error: raised in a worker, it would arrive with a traceback in its text."""
    try:
        return to_batch(list(examples))
    except TicketfindError as error:
        return error


def _load(dataset: Any, workers: int, device: torch.device, **how: Any) -> Iterator[Batch]:
    cuda = device.type == "cuda"
    loader: Any = DataLoader(
        dataset, num_workers=workers, collate_fn=_as_it_is, pin_memory=cuda, generator=torch.Generator(), **how
    )
    with warnings.catch_warnings():  # Python >= 3.12 warns of forks beside threads; the workers use one
        warnings.simplefilter("ignore", DeprecationWarning)
        batches = iter(loader)
    for batch in batches:
        if isinstance(batch, TicketfindError):
            raise batch
        inputs, targets = batch
        if cuda:
            yield map_inputs(lambda t: t.to(device, non_blocking=True), inputs), targets.to(device, non_blocking=True)
        else:
            yield inputs, targets


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, what is drawn from torch's, numpy's and Python's generators follows from `seed`; outside, no change."""
    import numpy

    before = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        _seed_all(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            numpy.random.set_state(before[1])


def _seed_all(seed: int) -> None:
    import numpy

    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


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
        return replace(
            self,
            train=_select(self.train, names),
            validation=_select(self.validation, names),
            test=_select(self.test, names),
        )

    def example(self, size: int = 2) -> Batch:
        """The first examples of the test set, `size` of them or as many as there are."""
        inputs, targets = next(self.test.chunks(size))
        return map_inputs(lambda t: t[:size], inputs), targets[:size]

    def to(self, device: torch.device) -> "Data":
        """This data with its batches on `device`."""
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )

    @property
    def resident_bytes(self) -> int:
        """Bytes of the examples that are held in memory, or on the device."""
        splits = [part for part in (self.train, self.validation, self.test) if isinstance(part, Split)]
        return sum(t.numel() * t.element_size() for s in splits for t in (*tensors_of(s.inputs), s.targets))

    def training(self, order: Order) -> Iterator[Batch]:
        """The batches of a training, augmented."""
        batches = self.train.batches(order)
        if not self.augment:
            return batches
        draws = itertools.chain.from_iterable(order.draws(len(self.train), 3))
        return (
            (map_inputs(lambda t, draw=draw: augmented(t, draw, self.augment), inputs), targets)  # type: ignore[misc]
            for (inputs, targets), draw in zip(batches, draws, strict=False)
        )


def _select(examples: Examples, names: Sequence[str]) -> Examples:
    if isinstance(examples, Split) and isinstance(examples.inputs, dict):
        return Split({name: examples.inputs[name] for name in names}, examples.targets)
    if isinstance(examples, (Stream, Flow)):
        return replace(examples, to_batch=_Selected(examples.to_batch, tuple(names)))
    return examples


@dataclass(frozen=True)
class _Selected:
    """`to_batch`, but with some of the named inputs only."""

    to_batch: ToBatch
    names: tuple[str, ...]

    def __call__(self, examples: list[Any]) -> Batch:
        inputs, targets = self.to_batch(examples)
        assert isinstance(inputs, dict)
        return {name: inputs[name] for name in self.names}, targets
