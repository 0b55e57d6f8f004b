"""How several arms are trained on one device: one after another, side by side, stacked, recorded, compiled.

This and `devices` are all that knows about devices. Knows no epochs, rounds, files or data-set names.
"""

import copy
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ticketfind import TicketfindError, forks, memory
from ticketfind.batches import Batch, Examples, Feed, seed_all
from ticketfind.devices import SMALL_MODEL, Way, autocast
from ticketfind.forks import Tick
from ticketfind.lanes import (
    NO_EXTRA,
    Context,
    Extra,
    Lane,
    Loss,
    Member,
    Stack,
    State,
    functional,
    learning_rate,
    replaced_buffers,
)
from ticketfind.masks import Masks
from ticketfind.outputs import OutputFn, counted
from ticketfind.recipe import Train
from ticketfind.specs import one_line

T = TypeVar("T")

UNROLLED = 8
"""Steps of a small model in one CUDA graph."""


# --------------------------------------------------------------------------------------- arms in lockstep


class Lockstep:
    """Arms under way together, one iteration of each at a time, eagerly."""

    def __init__(
        self,
        members: Sequence[Member],
        feeds: Sequence[Feed],
        how: Train,
        first: int = 0,
        context: Context = nullcontext,
    ) -> None:
        """feeds: of each member. first: the iteration to begin with."""
        self._members, self._how, self._at, self._context = members, how, first, context
        self._feeds = feeds
        self._batches: list[Iterator[Batch]] = [iter(feed) for feed in feeds]
        self._prepare()

    def _prepare(self) -> None:
        """What there is to do before the first step."""

    def advance(self, iterations: int) -> list[list[float]]:
        """Train on; each arm's losses, fetched once at the end."""
        for member in self._members:
            member.ready(to_train=True)
        losses = self._train(iterations).tolist()
        self._at += iterations
        return [list(of_arm) for of_arm in zip(*losses, strict=True)]

    def _train(self, iterations: int) -> Tensor:
        """The losses, [iterations, arms]."""
        losses = []
        for iteration in range(self._at, self._at + iterations):
            rate = learning_rate(self._how, iteration)
            of_members = zip(self._members, self._batches, strict=True)
            losses.append(torch.cat([member.step(next(batches), rate) for member, batches in of_members]))
        return torch.stack(losses)

    @torch.no_grad()
    def measure(
        self,
        examples: Examples,
        functions: Sequence[OutputFn],
        batch_size: int,
        between: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """The mean of each function over all examples, in evaluation mode: float64 [arms, functions], on the device.

        between: called between batches.
        """
        sums = weight = torch.zeros((), dtype=torch.float64)
        for member in self._members:
            member.ready(to_train=False)
        networks = [network for member in self._members for network in member.networks()]
        for inputs, targets in examples.chunks(batch_size):
            here = torch.as_tensor(counted(targets), device=targets.device)
            means = []
            for network in networks:
                with self._context():
                    outputs = network(inputs)
                    means.append(torch.stack([f(outputs, targets).double() for f in functions]))
            values = torch.stack(means)
            sums = sums.to(values.device) + torch.where(here > 0, here * values, 0.0)  # the mean of none is NaN
            weight = weight.to(values.device) + here
            between()
        return sums / weight

    def states(self) -> list[dict[str, Tensor]]:
        """A copy of every parameter and buffer of each arm."""
        return [state for member in self._members for state in member.states()]

    def everything(self) -> list[Tensor]:
        """Every tensor that training changes, in an order of the members' own."""
        return [tensor for member in self._members for tensor in member.everything()]

    def paths(self) -> list[dict[str, Tensor]]:
        """Of each arm, by trained parameter: the sum of |w_t - w_(t-1)| so far."""
        return [path for member in self._members for path in member.paths()]

    def tighten(self, masks: Sequence[Masks]) -> None:
        """Go on under masks that keep less, one for each arm."""
        each = iter(masks)
        for member in self._members:
            member.tighten([*itertools.islice(each, member.arms)])


class Rehearsed(Lockstep):
    """The same, where it is not known that the members can be trained: tried when it is made, and undone."""

    def _prepare(self) -> None:
        batches = [next(each) for each in self._batches]
        self._batches = [itertools.chain([batch], rest) for batch, rest in zip(batches, self._batches, strict=True)]
        with unchanged(self.everything):
            for member, batch in zip(self._members, batches, strict=True):
                member.ready(to_train=True)
                member.step(batch, 0.0)


@contextmanager
@torch.no_grad()
def unchanged(tensors: Callable[[], Sequence[Tensor]]) -> Iterator[None]:
    """What is done inside to these tensors is undone."""
    before = [tensor.clone() for tensor in tensors()]
    yield
    for tensor, value in zip(tensors(), before, strict=True):
        tensor.copy_(value)


class Replayed(Lockstep):
    """Arms whose step is recorded once as a CUDA graph and replayed: batches, losses, gradients, updates, masks.

    What changes from step to step is in tensors of fixed places: what the next batches are made from, their learning
    rates, and the row of both that is next, which each step moves on. So no schedule needs another recording, and the
    host waits for the device where losses are fetched, and nowhere else. Several members are branches of one graph,
    which the device may run at the same time. Without CUDA the same is done step by step, for tests.
    """

    def _prepare(self) -> None:
        self._batch, self._blocks = [feed.batch for feed in self._feeds], [feed.blocks for feed in self._feeds]
        self._rows = [[t.clone() for t in next(blocks)] for blocks in self._blocks]
        self._filled, self._done = len(self._rows[0][0]), 0
        device = self._rows[0][0].device
        self._rates = torch.zeros(self._filled, device=device)
        self._losses = torch.zeros(self._filled, sum(member.arms for member in self._members), device=device)
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        cuda = device.type == "cuda"
        self._streams = [_stream(device) for _ in self._members] if cuda and len(self._members) > 1 else []
        for member in self._members:
            member.ready(to_train=True)
        changed = sum(t.numel() for t in self.everything())  # the weights, and up to two moments of each
        several = self._filled >= UNROLLED and changed <= 3 * SMALL_MODEL * self._losses.shape[1]
        with unchanged(self.everything):
            with _beside(device):  # before a recording libraries must be warm, on another stream than the usual one
                for waits in ("allowed", "allowed", "refused"):
                    self._next.zero_()
                    with _no_waiting() if cuda and waits == "refused" else nullcontext():
                        self._step()
            pool = torch.cuda.graph_pool_handle() if cuda else None  # both recordings work in the same memory
            self._replays = {steps: self._recorded(steps, pool) for steps in ((UNROLLED, 1) if several else (1,))}
        self._begin_rows(self._at)

    def _recorded(self, steps: int, pool: Any) -> Callable[[], None]:
        """So many steps as one call."""

        def run() -> None:
            for _ in range(steps):
                self._step()

        if pool is None:
            return run
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # which a recording that fails may leave changed
            torch.cuda.graph(graph, pool, capture_error_mode="thread_local"),  # other threads may pin memory
        ):
            run()
        return graph.replay

    def _step(self) -> None:
        """One iteration of each member, of the next row; tensors of fixed places in, and out."""
        rate = self._rates.index_select(0, self._next).squeeze(0)
        losses = []
        for number, member in enumerate(self._members):
            with self._branch(number):
                row = (t.index_select(0, self._next).squeeze(0) for t in self._rows[number])
                losses.append(member.step(self._batch[number](*row), rate))
        for stream in self._streams:
            torch.cuda.current_stream().wait_stream(stream)
        self._losses.index_copy_(0, self._next, torch.cat(losses).to(self._losses.dtype)[None])
        self._next += 1

    def _branch(self, member: int) -> AbstractContextManager[object]:
        if not self._streams:
            return nullcontext()
        stream = self._streams[member]
        stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(stream)

    def _train(self, iterations: int) -> Tensor:
        found, at, stop = [], self._at, self._at + iterations
        while at < stop:
            if self._done == self._filled:
                self._load_rows(at)
            begin, end = self._done, min(self._done + stop - at, self._filled)
            for steps, replay in self._replays.items():
                while end - self._done >= steps:
                    replay()
                    self._done += steps
            found.append(self._losses[begin:end].clone())
            at += end - begin
        return torch.cat(found)

    def _load_rows(self, iteration: int) -> None:
        for rows, blocks in zip(self._rows, self._blocks, strict=True):
            block = next(blocks)
            self._filled = len(block[0])
            for row, new in zip(rows, block, strict=True):
                row[: self._filled].copy_(new)
        self._begin_rows(iteration)

    def _begin_rows(self, iteration: int) -> None:
        rates = [learning_rate(self._how, iteration + ahead) for ahead in range(self._filled)]
        there = torch.tensor(rates, pin_memory=self._rates.device.type == "cuda")
        self._rates[: self._filled].copy_(there, non_blocking=True)
        self._next.zero_()
        self._done = 0


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside, a host that waits for the device is an error: told here, it leaves no recording half done."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is said to be a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """On CUDA, inside is a stream of its own."""
    if device.type != "cuda":
        yield
        return
    usual, side = torch.cuda.current_stream(device), _stream(device)
    side.wait_stream(usual)
    try:
        with torch.cuda.stream(side):
            yield
    except BaseException:
        torch.cuda.synchronize(device)  # what was begun is over before its memory is used again
        raise
    usual.wait_stream(side)


# ------------------------------------------------------------------------------------------ beginning


@dataclass
class _Known:
    """What has been found out about a network."""

    failed: set[str]
    """Ways that cannot train it."""
    compiled: dict[OutputFn, Loss]
    replaced: list[str] | None = None
    """Buffers that it replaces; None until that is looked at."""


_known: "WeakKeyDictionary[nn.Module, _Known]" = WeakKeyDictionary()


def begin(
    way: Way,
    model: nn.Module,
    starts: Sequence[tuple[State, Masks]],
    feeds: Callable[[], list[Feed]],
    how: Train,
    loss: OutputFn,
    *,
    device: torch.device,
    seed: int = 0,
    first: int = 0,
    note: Callable[[str], None] = lambda text: None,
    extra: Extra = NO_EXTRA,
) -> Lockstep:
    """Arms of `model`, which is copied, from `starts` under masks, at iteration `first`; fresh optimizer state.

    feeds: makes the arms' batches anew. seed: of what networks draw at random. Where the way cannot train this network,
    the next best can: eagerly, one after another, at last. note: told why, once. extra: for the mask that is drawn.
    """
    context = autocast(way, device)
    known = _known.setdefault(model, _Known(set(), {}))

    def lanes(compiled: Loss | None = None) -> list[Member]:
        return [
            Lane(
                copy.deepcopy(model), start, masks, how, loss,
                compiled=compiled, context=context, channels_last=way.channels_last, extra=extra,
            )
            for start, masks in starts
        ]  # fmt: skip

    def stacked() -> list[Member]:
        return [Stack(copy.deepcopy(model), starts, how, loss, context=context, extra=extra)]

    def compiled() -> list[Member]:
        if loss not in known.compiled:
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no CUDA
            known.compiled[loss] = torch.compile(functional(copy.deepcopy(model).train(), loss), dynamic=False)
        return lanes(known.compiled[loss])

    def fed() -> list[Feed]:
        return [Feed.merged(feeds())] if way.name == "stacked" else feeds()

    make = {"stacked": stacked, "compile": compiled}.get(way.name, lanes)
    kinds: list[type[Lockstep]] = [] if make is lanes else [Rehearsed]
    if device.type == "cuda" and way.name != "eager":
        kinds = [Replayed, *kinds]
    try:
        for kind in kinds:
            what = f"--engine {way.name}" + (", recorded as a CUDA graph," if kind is Replayed else "")
            if what in known.failed:
                continue
            try:
                if known.replaced is None:
                    known.replaced = replaced_buffers(model, next(iter(feeds()[0]))[0])
                if known.replaced:
                    raise TicketfindError(f"it replaces {', '.join(known.replaced)} rather than change them in place")
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="TensorFloat32")  # fp32 is what was asked for
                    return kind(make(), fed(), how, first, context)
            except Exception as error:  # vmap, compiler and recording have limits of many kinds
                if memory.has_run_out(error):
                    raise
                known.failed.add(what)
                note(f"{what} cannot train this model, which is trained without it: {one_line(error)[:200]}")
        return Lockstep(lanes(), feeds(), how, first, context)
    finally:
        seed_all(seed, device)


def each(way: Way, count: int, train: Callable[[int, Tick], T], tick: Tick) -> Iterator[T]:
    """``train(i, tick)`` for i from 0 to count - 1, in this order: side by side, or one after another."""
    if way.name == "processes":
        yield from forks.side_by_side(count, way.at_once, train, tick)
    else:
        for index in range(count):
            yield train(index, tick)
