"""Streamed examples: the same batches as resident ones, whoever reads them, and no trace of the readers."""

import multiprocessing
import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ticketfind import TicketfindError, train
from ticketfind.batches import Data, Order, Split
from ticketfind.devices import EAGER
from ticketfind.examples import Source, source_of
from ticketfind.streams import Flow, Stream


def source(dataset):
    return source_of(dataset, "data d: train")


def stream(dataset, workers=0):
    return Stream(source(dataset), torch.arange(len(dataset)), workers)


def flow(dataset, length):
    return Flow(source(dataset), length)


def pair(n=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 4


class Noisy(Dataset):
    """Draws from all three generators."""

    targets = torch.arange(40) % 4

    def __len__(self):
        return 40

    def __getitem__(self, index):
        noise = [torch.rand(()).item(), random.random(), np.random.rand()]
        return torch.tensor([index, *noise]), index % 4


class Counting(IterableDataset):
    """Passes that differ, of examples with something drawn; none from pass `empty_from` on."""

    def __init__(self, count=10, empty_from=99):
        self.count, self.empty_from, self.epoch = count, empty_from, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for i in range(self.count if self.epoch < self.empty_from else 0):
            yield torch.tensor([100.0 * self.epoch + i, torch.rand(()).item()]), i % 2


class Broken(Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, index):
        if index == 33:
            raise ValueError("a bad\nfile")
        return torch.zeros(2), 0


def equal(found, expected):
    found, expected = list(found), list(expected)
    return len(found) == len(expected) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(found, expected, strict=True)
    )


@pytest.fixture(autouse=True)
def _no_trace():
    """No process is left, and the generators of this process are where they were."""

    def state():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = state()
    yield
    assert state() == before
    assert not multiprocessing.active_children()


# ------------------------------------------------------------------------------------------- map-style


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_and_chunks_are_those_of_resident_data(workers):
    split, streamed = Split(*pair()), stream(TensorDataset(*pair()), workers)
    assert equal(streamed.batches(Order(3, 8, 5, 21)), split.batches(Order(3, 8, 5, 21)))
    assert equal(streamed.chunks(3), split.chunks(3))
    assert equal([streamed.first(4)], [split.first(4)])
    places = torch.tensor([9, 4, 30, 0, 8, 22])
    assert equal(
        streamed.part(places).batches(Order(3, 2, 1, 6)), Split(*split.batch(places)).batches(Order(3, 2, 1, 6))
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 4)

    def forward(self, x):
        return self.fc(nn.functional.dropout(self.norm(self.conv(x)).relu().flatten(1), 0.2, self.training))


def fitted(make_task, make_train, wrap, first=0, start_seed=0):
    """The points and final weights of a training of data that `wrap` holds."""
    parts = [wrap(TensorDataset(*pair(n, n))) for n in (50, 23, 31)]
    task = make_task(Net, data=Data(*parts, ("flip", "crop")))
    arm = train.Arm("a", task.start(start_seed), {}, 7, first)
    ((_, outcome),) = train.fit([arm], task, make_train(momentum=0.9, batch_size=9), way=EAGER, keep_at=first + 1)
    return outcome


@pytest.mark.parametrize("first", [0, 5])
def test_a_training_is_the_same_to_the_bit_resident_and_streamed(make_task, make_train, first):
    expected = fitted(make_task, make_train, lambda d: Split(*d.tensors), first)
    for workers in (0, 1, 2):
        found = fitted(make_task, make_train, lambda d, w=workers: stream(d, w), first)
        assert found.points == expected.points
        assert found.measured == expected.measured
        for state, wanted in ((found.final, expected.final), (found.kept, expected.kept)):
            assert all(torch.equal(value, wanted[name]) for name, value in state.items())


def test_what_is_drawn_at_random_follows_from_seed_and_iteration():
    expected = list(stream(Noisy()).batches(Order(3, 8, 0, 12)))
    for workers in (0, 1, 3):
        assert equal(stream(Noisy(), workers).batches(Order(3, 8, 0, 12)), expected)
        assert equal(stream(Noisy(), workers).batches(Order(3, 8, 7, 12)), expected[7:])
    other = list(stream(Noisy()).batches(Order(4, 8, 0, 12)))
    drawn = torch.cat([inputs[:, 1:] for inputs, _ in (*expected, *other)]).flatten()
    assert len(drawn.unique()) == len(drawn)
    chunks = list(stream(Noisy()).chunks(1))
    assert equal(stream(Noisy(), 2).chunks(1), chunks)
    drawn = torch.cat([inputs[:, 1:] for inputs, _ in chunks]).flatten()
    assert len(chunks) > 1 and len(drawn.unique()) == len(drawn)


def test_first_twice_tells_what_is_drawn():
    first, second = stream(Noisy(), 1).first_twice(16)
    assert torch.equal(first[0][:, 0], second[0][:, 0])
    assert not (first[0][:, 1:] == second[0][:, 1:]).any()
    assert equal(*[[batch] for batch in stream(TensorDataset(*pair())).first_twice(5)])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_one_line_that_names_the_data_sets_own_example(workers):
    with pytest.raises(TicketfindError) as error:
        list(stream(Broken(), workers).chunks(4))
    assert str(error.value) == "data d: train: example 33 cannot be read: ValueError: a bad file"


def test_an_error_of_ones_own_comes_as_it_is():
    class Own(Broken):
        def __getitem__(self, index):
            raise TicketfindError("img.png: expected an image")

    for workers in (0, 1):
        with pytest.raises(TicketfindError, match=r"^img.png: expected an image$"):
            stream(Own(), workers).first(1)


def test_a_reading_process_that_is_killed():
    class Killed(Broken):
        def __getitem__(self, index):
            if multiprocessing.parent_process():
                os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(
        TicketfindError, match=r"^data: a process that reads examples ended; --set data\.workers=0"
    ) as error:
        list(stream(Killed(), 1).chunks(4))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "begin",
    [
        lambda: stream(TensorDataset(*pair()), 2).batches(Order(0, 5, 0, 10**9)).blocks,
        lambda: flow(Counting(), 10).chunks(1),
    ],
    ids=["training", "measuring"],
)
def test_an_iterator_dropped_early_ends_its_processes(begin):
    batches = begin()
    next(batches)
    assert multiprocessing.active_children()
    del batches
    assert not multiprocessing.active_children()


def test_reading_processes_leave_ctrl_c_to_the_training():
    def is_blocked():
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    class Interrupted(Broken):
        def __getitem__(self, index):
            if multiprocessing.parent_process():
                os.kill(os.getpid(), signal.SIGINT)
            return float(is_blocked()), 0

    assert stream(Interrupted(), 1).first(2)[0].tolist() == [1, 1]
    assert stream(Interrupted(), 0).first(2)[0].tolist() == [0, 0]
    assert not is_blocked()


def test_with_workers_the_training_process_reads_nothing():
    """A file that a data set opens at the first reading would be shared by all processes."""

    class Where(Broken):
        def __getitem__(self, index):
            return float(os.getpid()), 0

    found = stream(Where(), 2)
    batches = [found.first(2), *found.first_twice(2), *found.chunks(20), *found.batches(Order(0, 5, 0, 3))]
    assert not any((inputs == os.getpid()).any() for inputs, _ in batches)


# -------------------------------------------------------------------------------------------- iterables


def test_a_flow_goes_over_the_data_set_again_and_again():
    found = list(flow(Counting(), 10).batches(Order(3, 4, 0, 7)))
    assert torch.cat([inputs[:, 0] for inputs, _ in found]).tolist() == [*range(10), *range(100, 110), *range(200, 208)]
    assert [len(targets) for _, targets in found] == [4] * 7  # batches go across the ends of passes
    drawn = torch.cat([inputs[:, 1] for inputs, _ in found])
    assert len(drawn.unique()) == 28, "what a pass draws, no other pass does"


def test_classes_are_one_more_than_the_highest_label_that_is_known():
    assert stream(Noisy()).classes is None
    assert replace(stream(Noisy()), labels=Noisy.targets).classes == 4


def masking(examples):
    """A collate function that draws."""
    inputs, targets = torch.utils.data.default_collate(examples)
    return inputs * (torch.rand(inputs.shape) < 0.5), targets


@pytest.mark.parametrize("collate_fn", [None, masking])
def test_a_flow_can_start_anywhere(collate_fn):
    def make():
        return flow(DataLoader(Counting(), batch_size=1, collate_fn=collate_fn), 10)

    whole = list(make().batches(Order(3, 4, 0, 9)))
    for first in (1, 5, 8):
        assert equal(make().batches(Order(3, 4, first, 9)), whole[first:])
    assert not equal(make().batches(Order(4, 4, 0, 9)), whole)


def test_what_a_flows_collate_function_draws_is_another_in_each_batch_and_for_each_seed():
    def noise(examples):
        return torch.rand(len(examples), 3), torch.zeros(len(examples), dtype=torch.int64)

    found = flow(DataLoader(Counting(), batch_size=1, collate_fn=noise), 10)
    every = (*found.batches(Order(3, 5, 0, 6)), *found.batches(Order(4, 5, 0, 6)), *found.chunks(5))
    drawn = torch.cat([inputs for inputs, _ in every]).flatten()
    assert len(drawn.unique()) == len(drawn) == (6 * 5 + 6 * 5 + 10) * 3


def test_chunks_of_a_flow_are_one_pass_always_the_same():
    found = flow(Counting(), 10)
    chunks = list(found.chunks(4))
    assert torch.cat([inputs[:, 0] for inputs, _ in chunks]).tolist() == [*range(10)]
    assert equal(found.chunks(4), chunks)
    assert equal([found.first(4)], chunks[:1])


def test_a_flow_that_dries_up_is_an_error_and_no_hang():
    with pytest.raises(TicketfindError) as error:
        list(flow(Counting(empty_from=2), 10).batches(Order(0, 4, 0, 9)))
    assert str(error.value) == "data d: train: expected examples, found none when it is read again"
    with pytest.raises(TicketfindError, match=r"expected examples, found none$"):
        list(flow(Counting(empty_from=0), 10).chunks(4))


def test_an_error_in_a_flow_names_the_example():
    class Bad(Counting):
        def __iter__(self):
            yield from ((torch.zeros(2), 0), (torch.zeros(3), 0))
            raise OSError("gone")

    with pytest.raises(TicketfindError, match=r"train: input: expected examples of one shape, found \(3,\) at 1"):
        list(flow(Bad(), 2).chunks(2))
    with pytest.raises(TicketfindError, match=r"^data d: train: example 2 cannot be read: OSError: gone$"):
        list(flow(Bad(), 2).chunks(1))


def test_a_training_on_a_flow(make_task, make_train):
    data = Data(*[flow(Counting(40), 40)] * 3)

    class Two(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)

    task = make_task(Two, data=data)
    whole, again = (
        next(train.fit([train.Arm("a", task.start(0), {}, 7)], task, make_train(lr=1e-4), way=EAGER))[1] for _ in "ab"
    )
    assert whole.points == again.points
    assert whole.test_size == 40


def test_only_the_inputs_asked_for():
    class Dicts(Broken):
        def __getitem__(self, index):
            return {"a": [index], "b": [0], "y": index % 2}

    found = Stream(Source(Dicts(), "data"), torch.arange(6), 1).select(["a", "y"])
    assert found.first(2)[0].keys() == {"a", "y"}
    assert [inputs.keys() for inputs, _ in found.chunks(99)] == [{"a", "y"}]
    found = flow([{"a": 1, "b": 2, "y": 0}] * 3, 3)
    assert [inputs.keys() for inputs, _ in found.select(["b"]).chunks(99)] == [{"b"}]
