import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ticketfind.batches import Data, Feed, Order, Split, chunk_size, derived_seed, seeded


def rows(order, examples):
    return torch.cat([*order.indices(examples), torch.zeros(0, order.batch_size, dtype=torch.int64)])


@settings(deadline=None, max_examples=30)
@given(
    examples=st.integers(20, 70),
    batch_size=st.integers(1, 30),
    first=st.sampled_from([0, 1, 255, 256, 257, 300]),  # orders are drawn in blocks of 256 iterations
    count=st.integers(0, 300),
    seed=st.integers(0, 9),
)
def test_an_order_is_the_tail_of_the_one_from_the_start(examples, batch_size, first, count, seed):
    whole = rows(Order(seed, batch_size, 0, first + count), examples)
    assert torch.equal(rows(Order(seed, batch_size, first, first + count), examples), whole[first:])


@settings(deadline=None)
@given(examples=st.integers(1, 70), batch_size=st.integers(1, 70), seed=st.integers(0, 9))
def test_every_epoch_holds_every_example_once(examples, batch_size, seed):
    epochs = 4
    sequence = rows(Order(seed, batch_size, 0, -(-epochs * examples // batch_size)), examples).flatten()
    for epoch in sequence[: epochs * examples].view(epochs, examples):
        assert torch.equal(epoch.sort().values, torch.arange(examples))


def test_orders_of_seeds_and_epochs_differ():
    first, second = (rows(Order(seed, 50, 0, 2), 50) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_draws_belong_to_the_same_iterations_whatever_the_start():
    order = Order(4, 30, 0, 600)
    whole = torch.cat(list(order.draws(70, 3)))
    assert whole.shape == (600, 30, 3)
    tail = torch.cat(list(dataclasses.replace(order, first=257).draws(70, 3)))
    assert torch.equal(tail, whole[257:])


def test_draws_have_seeds_of_their_own():
    """Those of the order would tie what is done to an image to its place in it."""
    generators = [torch.Generator().manual_seed(derived_seed(4, "augment", epoch)) for epoch in (0, 1)]
    expected = torch.cat([torch.randint(2**31, (30, 3), generator=generator) for generator in generators])
    assert torch.equal(torch.cat([*Order(4, 20, 0, 3).draws(30, 3)]).flatten(0, 1), expected)


def test_seeds_of_purposes_are_unrelated_and_fit_every_generator():
    made = {derived_seed(seed, purpose, n) for seed in range(5) for purpose in ("order", "read") for n in range(5)}
    assert len(made) == 50
    assert all(0 <= seed < 2**63 for seed in made)


def test_chunks_are_every_example_in_order():
    split = Split({"a": torch.arange(100.0).view(50, 2), "b": torch.arange(50)}, torch.arange(50))
    for size in (1, 3, 49, 50, 51):
        chunks = list(split.chunks(size))
        assert torch.equal(torch.cat([targets for _, targets in chunks]), split.targets)
        assert torch.equal(torch.cat([inputs["a"] for inputs, _ in chunks]), split.inputs["a"])
    assert [len(targets) for _, targets in split.chunks(2)] == [32, 18]
    assert (chunk_size(4, torch.zeros(1, 2**20)), chunk_size(4, torch.zeros(1, 2**17))) == (4, 8)


def test_only_the_inputs_asked_for():
    split = Split({"a": torch.zeros(5, 2), "b": torch.ones(5)}, torch.arange(5))
    found = Data(split, split, split).select(["b"])
    assert found.example(3)[0].keys() == {"b"}
    assert (found.resident_bytes, Data(split, split, split).resident_bytes) == (3 * 60, 3 * 100)
    plain = Data(*[Split(torch.zeros(5, 2), torch.arange(5))] * 3)
    assert plain.select(["x"]).example(9)[0].shape == (5, 2)


@pytest.mark.parametrize(
    ("targets", "outputs"),
    [(torch.tensor([0, 4, 1]), 5), (torch.zeros(3, 7), 7), (torch.zeros(3), 1), (torch.zeros(3, 2, 2), None)],
)
def test_outputs_follow_from_the_targets(targets, outputs):
    assert Data(*[Split(torch.zeros(3, 2), targets)] * 3).outputs == outputs


@pytest.mark.parametrize(
    ("targets", "share"),
    [(torch.tensor([0, 4, 1, 4, 4]), 0.6), (torch.zeros(3), None), (torch.zeros(3, 7, dtype=torch.int64), None)],
)
def test_the_share_of_the_most_frequent_label(targets, share):
    assert Split(torch.zeros(len(targets), 2), targets).most_frequent == share


def test_seeded_leaves_no_trace():
    import random

    import numpy

    def state():
        return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()

    def drawn():
        return torch.rand(()).item(), random.random(), numpy.random.rand()

    before = state()
    with seeded(3):
        first = drawn()
    with pytest.raises(KeyError), seeded(3):
        assert drawn() == first
        raise KeyError
    assert state() == before


def test_a_feed_gives_batches_and_what_they_are_made_from() -> None:
    split = Split(torch.arange(40.0).view(20, 2), torch.arange(20))
    order = Order(3, 5, 2, 600)
    rows = [row for block in order.indices(20) for row in block]
    batches = [*split.batches(order)]
    assert len(batches) == 598
    for (inputs, targets), row in zip(batches, rows, strict=True):
        assert torch.equal(targets, row) and torch.equal(inputs, split.inputs[row])
    feed = split.batches(order)
    sizes = []
    for (block,) in feed.blocks:
        sizes.append(len(block))
        assert torch.equal(feed.batch(block[-1])[1], rows[sum(sizes) - 1])
    assert sizes == [256, 256, 86]


@pytest.mark.parametrize("named", [False, True])
def test_a_feed_of_batches_that_are_read_as_they_come(named: bool) -> None:
    given = [(torch.full((4, 3), float(n)), torch.full((4,), n)) for n in range(5)]
    batches = [({"a": x, "b": x + 1}, y) for x, y in given] if named else given
    for (inputs, targets), (expected, labels) in zip(Feed.of(batches), batches, strict=True):
        assert torch.equal(targets, labels)
        if named:
            assert all(torch.equal(inputs[name], expected[name]) for name in ("a", "b"))
        else:
            assert torch.equal(inputs, expected)
    feed = Feed.of(batches)
    assert [[len(t) for t in block] for block in feed.blocks] == [[1] * (3 if named else 2)] * 5


def test_merged_feeds_give_the_batches_of_all_one_after_another() -> None:
    split = Split(torch.arange(40.0).view(20, 2), torch.arange(20))
    orders = [Order(seed, 5, 0, 300) for seed in range(3)]
    merged = [*Feed.merged([split.batches(order) for order in orders])]
    apart = zip(*(split.batches(order) for order in orders), strict=True)
    for (inputs, targets), each in zip(merged, apart, strict=True):
        assert torch.equal(inputs, torch.cat([batch[0] for batch in each]))
        assert torch.equal(targets, torch.cat([batch[1] for batch in each]))
    assert len(merged) == 300
