"""Examples that are read as they are needed. The batches do not depend on how many processes read them.

Legend: n examples.
"""

import contextlib
import functools
import itertools
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ticketfind import TicketfindError
from ticketfind.batches import Batch, Feed, Order, chunk_size, derived_seed, map_inputs, seed_all, seeded
from ticketfind.examples import Source
from ticketfind.outputs import Inputs
from ticketfind.specs import one_line

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stream:
    """Examples of a map-style data set, read as they are needed."""

    source: Source
    indices: Tensor
    """int64 [n]: which of the data set's examples these are."""
    workers: int
    """Processes that read."""
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

    def select(self, names: Sequence[str]) -> "Stream":
        """This stream with these of its named inputs only."""
        return replace(self, source=self.source.select(names))

    def batches(self, order: Order) -> Feed:
        """The batches of a training; what the data set draws at random follows from seed and iteration."""
        rows = itertools.chain.from_iterable(order.indices(len(self)))
        seeds = (derived_seed(order.seed, "read", iteration) for iteration in itertools.count(order.first))
        return Feed.of(self._read((seed, self.indices[row]) for seed, row in zip(seeds, rows, strict=False)))

    def first(self, size: int) -> Batch:
        """The first `size` examples, or as many as there are."""
        return next(self._read([(0, self.indices[:size])], workers=1))

    def first_twice(self, size: int) -> tuple[Batch, Batch]:
        """The first `size` examples, drawn with two seeds: they differ where the data set draws at random."""
        first, second = self._read([(seed, self.indices[:size]) for seed in (0, 1)], workers=1)
        return first, second

    def chunks(self, size: int) -> Iterator[Batch]:
        """Every example once, in order."""
        return self._read(enumerate(torch.split(self.indices, chunk_size(size, self._example))))

    @functools.cached_property
    def _example(self) -> Inputs:
        return self.first(1)[0]

    def _read(self, seeds_and_indices: Iterable[tuple[int, Tensor]], workers: int | None = None) -> Iterator[Batch]:
        """workers: fewer than are usual. Where there are any, this process reads nothing itself: a file that the data
        set opens when it is first read would be shared by all of them."""
        keys = ([seed, *indices.tolist()] for seed, indices in seeds_and_indices)
        count = self.workers if workers is None else min(workers, self.workers)
        # a generator is an iterable of batches' indices, which is all that the loader asks of a batch sampler
        return _load(_Reader(self.source), count, self.device, batch_sampler=keys)


@dataclass(frozen=True)
class Flow:
    """Examples of an iterable data set, in the order in which it gives them, read by one process of its own."""

    source: Source
    length: int
    """Examples in a pass, which is an epoch."""
    classes: int | None = None
    device: torch.device = CPU

    def __len__(self) -> int:
        return self.length

    def to(self, device: torch.device) -> "Flow":
        """This flow with its batches on `device`."""
        return replace(self, device=device)

    def select(self, names: Sequence[str]) -> "Flow":
        """This flow with these of its named inputs only."""
        return replace(self, source=self.source.select(names))

    def batches(self, order: Order) -> Feed:
        """The batches of a training; those before its first are read and passed over."""
        return Feed.of(_load(_FlowReader(self.source, order.batch_size, order), 1, self.device, batch_size=None))

    def first(self, size: int) -> Batch:
        """The first `size` examples, or as many as there are."""
        return next(self.chunks(size))

    def chunks(self, size: int) -> Iterator[Batch]:
        """Every example once, in order."""
        return _load(_FlowReader(self.source, size, None), 1, self.device, batch_size=None)


# ------------------------------------------------------------------------------------ in a reading process


class _Reader(Dataset[Any]):
    """Whole batches from a map-style data set; the first index of each is its seed."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError  # the loader calls the method below

    def __getitems__(self, key: list[int]) -> "Batch | TicketfindError":
        seed, *indices = key
        try:
            with seeded(seed):
                return self._source.read(indices)
        except TicketfindError as error:
            return error  # raised here, it would arrive with a traceback in its text


class _FlowReader(IterableDataset[Any]):
    """Batches from an iterable data set: those of one pass, or those of an order over endless passes."""

    def __init__(self, source: Source, batch_size: int, order: Order | None) -> None:
        self._source, self._size, self._order = source, batch_size, order

    def __iter__(self) -> Iterator["Batch | TicketfindError"]:
        try:
            yield from self.batches()
        except TicketfindError as error:
            yield error  # raised here, it would arrive with a traceback in its text

    def batches(self) -> Iterator[Batch]:
        """Changes the state of torch's, numpy's and Python's generators."""
        order = self._order or Order(0, self._size, 0, sys.maxsize)
        epochs = range(1) if self._order is None else itertools.count()
        examples = itertools.chain.from_iterable(self._one_pass(epoch, order.seed) for epoch in epochs)
        grouped = iter(lambda: list(itertools.islice(examples, self._size)), [])
        for iteration, group in itertools.islice(enumerate(grouped), order.first, order.stop):
            with seeded(derived_seed(order.seed, "batch", iteration)):  # not the state that passed over batches left
                batch = self._source.batch([example for _, example in group], [place for place, _ in group])
            yield batch

    def _one_pass(self, epoch: int, seed: int) -> Iterator[tuple[int, Any]]:
        seed_all(derived_seed(seed, "read", epoch))
        yield from enumerate(self._source.one_pass(epoch))


# ---------------------------------------------------------------------------------- in the training process


def _load(dataset: Any, workers: int, device: torch.device, **how: Any) -> Iterator[Batch]:
    """Batches from a data set of them, read ahead by `workers` processes, which end when the iterator is dropped."""
    if workers:
        how |= {"prefetch_factor": 4}
        how |= {"multiprocessing_context": "fork"} if sys.platform == "linux" else {}  # a user's file is no module
    with _without_interrupts(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads; the workers use one
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores: as asked
        batches: Any = iter(
            DataLoader(
                dataset,
                num_workers=workers,
                collate_fn=_as_it_is,
                pin_memory=device.type == "cuda",
                generator=torch.Generator(),  # not the default one, from which it would draw
                **how,
            )
        )
    try:
        while (batch := _next(batches)) is not None:
            yield _on(device, batch)
    finally:
        if workers:  # now: left to the garbage collector, it may happen in another process after a fork
            with contextlib.suppress(RuntimeError):  # a signal to all processes has ended them already
                batches._shutdown_workers()


def _next(batches: Iterator[Any]) -> Batch | None:
    try:
        batch = next(batches, None)
    except RuntimeError as error:
        raise TicketfindError(
            f"data: a process that reads examples ended; --set data.workers=0 reads without: {one_line(error)}"
        ) from error
    if isinstance(batch, TicketfindError):
        raise batch
    return batch


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started inside never see a Ctrl-C: the training process, which gets it too, ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _on(device: torch.device, batch: Batch) -> Batch:
    inputs, targets = batch
    return map_inputs(lambda t: t.to(device, non_blocking=True), inputs), targets.to(device, non_blocking=True)
