import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from ticketfind import TicketfindError
from ticketfind.examples import as_batch, collate, labels_beside, source_of


class Map(Dataset):
    """A map-style data set of the examples that a function gives."""

    def __init__(self, example, size=6):
        self.example, self.size = example, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.example(index)


class Stream(IterableDataset):
    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


def batch(dataset, places=(0, 1, 2)):
    source = source_of(dataset, "data d: train")
    return source.read(places)


def fails(function, *args):
    with pytest.raises(TicketfindError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    ("example", "dtype", "shape"),
    [
        (lambda i: ([float(i), 0.0], i), torch.float32, (3, 2)),
        (lambda i: ([i, 7], i), torch.int64, (3, 2)),
        (lambda i: (torch.full((2, 2), float(i), dtype=torch.bfloat16), torch.tensor(i)), torch.float32, (3, 2, 2)),
        (lambda i: (np.full((4, 4), i, np.uint8), np.int64(i)), torch.float32, (3, 1, 4, 4)),
        (lambda i: (np.full((6, 5, 3), i, np.uint8), [i]), torch.float32, (3, 3, 6, 5)),
        (lambda i: (float(i), i), torch.float32, (3,)),
    ],
)
def test_pairs_of_anything_that_is_numbers(example, dtype, shape):
    inputs, targets = batch(Map(example))
    assert (inputs.dtype, tuple(inputs.shape)) == (dtype, shape)
    assert (targets.dtype, targets.tolist()) == (torch.int64, [0, 1, 2])
    scale = 255 if shape[1:2] in ((1,), (3,)) else 1
    assert inputs.flatten(1)[2, 0] * scale == 2 if len(shape) > 1 else inputs[2] == 2


def test_dicts_of_lists_tensors_and_arrays_without_their_texts():
    def example(i):
        return {
            "text": "a cat", "raw": b"x", "input_ids": [i, 2, 3], "mask": torch.tensor([True, True, False]),
            "scores": np.array([i / 2, 1.0]), "length": 3, "label": i,
        }  # fmt: skip

    inputs, targets = batch(Map(example))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in inputs.items()} == {
        "input_ids": (torch.int64, (3, 3)),
        "mask": (torch.bool, (3, 3)),
        "scores": (torch.float32, (3, 2)),
        "length": (torch.int64, (3,)),
        "label": (torch.int64, (3,)),
    }
    assert targets is inputs["label"]
    assert targets.tolist() == [0, 1, 2]


@pytest.mark.parametrize("key", ["labels", "label", "targets", "target", "y"])
def test_names_of_targets(key):
    inputs, targets = as_batch({"x": np.zeros((4, 2)), key: np.arange(4, dtype=np.uint8)[:, None]}, "data")
    assert (targets.tolist(), targets.dtype, list(inputs)) == ([0, 1, 2, 3], torch.int64, ["x", key])


def test_of_several_names_of_targets_the_first_listed_counts():
    names = ["labels", "label", "targets", "target", "y"]
    for first, later in itertools.combinations(names, 2):
        _, targets = as_batch({"x": np.zeros((4, 2)), later: np.zeros(4), first: np.arange(4)}, "data")
        assert targets.tolist() == [0, 1, 2, 3], (first, later)


def test_bytes_by_name_are_pixels_in_images_only():
    raw = {"mask": np.ones((2, 5), np.uint8), "pixels": np.full((2, 3, 4, 4), 255, np.uint8), "y": [0, 1]}
    inputs, _ = as_batch(raw, "data")
    assert inputs["mask"].dtype == torch.int64 and bool((inputs["mask"] == 1).all())
    assert inputs["pixels"].shape == (2, 3, 4, 4), "channels come first already"
    assert inputs["pixels"].dtype == torch.float32 and bool((inputs["pixels"] == 1).all())


def test_errors_name_the_example_by_its_place_in_the_data_set():
    odd = {41: torch.zeros(3)}
    source = source_of(Map(lambda i: (odd.get(i, torch.zeros(2)), 0), 99), "data d: train")
    assert fails(source.read, [70, 41, 3]) == (
        "data d: train: input: expected examples of one shape, found (3,) at 41, and (2,) at 70;"
        " a DataLoader's collate_fn may pad them"
    )
    source = source_of(Map(lambda i: (0, {5: None}.get(i, 1)), 99), "data d: train")
    assert "data d: train: target 5: expected numbers, found NoneType" in fails(source.read, [4, 5])
    source = source_of(Map(lambda i: (1, 2, 3) if i == 8 else (1, 2), 99), "data d: train")
    assert "expected (input, target) or dict examples, found tuple of 3 at 8" in fails(source.read, [4, 8])
    source = source_of(Map(lambda i: {"x": 1, "y": 2} if i else {"x": 1, "y": 2, "z": 3}, 99), "data d: train")
    assert "with the same entries, found one without z: 4" in fails(source.read, [0, 4])
    source = source_of(Map(lambda i: [][i], 99), "data d: train")
    assert fails(source.read, [7]) == "data d: train: example 7 cannot be read: IndexError: list index out of range"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (torch.zeros(3), "expected batches (inputs, targets) or dicts, found Tensor"),
        ({"x": torch.zeros(3)}, "expected an entry labels, label, targets, target or y for the target, found x"),
        ({}, "for the target, found nothing"),
        ((["a"], [1]), "expected numbers, found list"),
        ((torch.zeros(2, dtype=torch.complex64), torch.zeros(2)), "expected real numbers, found torch.complex64"),
    ],
)
def test_batches_that_are_none(raw, message):
    assert message in fails(as_batch, raw, "data")


# -------------------------------------------------------------------------------------------- data sets


def test_a_data_loader_gives_its_data_set_and_its_collate_function():
    def padded(examples):
        width = max(len(tokens) for tokens, _ in examples)
        tokens = [list(tokens) + [0] * (width - len(tokens)) for tokens, _ in examples]
        return {"input_ids": torch.tensor(tokens), "labels": torch.tensor([label for _, label in examples])}

    ragged = Map(lambda i: ([1] * (i + 1), i % 2))
    inputs, targets = batch(DataLoader(ragged, batch_size=2, shuffle=True, collate_fn=padded), [3, 0])
    assert inputs["input_ids"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert targets.tolist() == [1, 0]
    plain = TensorDataset(torch.arange(6.0), torch.arange(6))
    assert batch(DataLoader(plain, batch_size=4, shuffle=True), [5, 0])[1].tolist() == [5, 0]
    source = source_of(DataLoader(Stream([(1, 2)]), batch_size=2, collate_fn=default_collate), "data")
    assert source.is_iterable
    assert source.collate_fn is None
    assert "found one with batch_size=None" in fails(source_of, DataLoader(plain, batch_size=None), "data")
    broken = DataLoader(plain, batch_size=2, collate_fn=lambda examples: 1 / 0)
    assert fails(batch, broken) == "data d: train: the collate function failed: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("dataset", "is_iterable"),
    [
        (Map(int), False),
        ([(1, 2), (3, 4), (5, 6)], False),
        (Stream([]), True),
        (({"x": i} for i in range(3)), True),
        ({(1, 2), (3, 4)}, True),  # any object with __iter__ and no __getitem__
    ],
)
def test_kinds_of_data_sets(dataset, is_iterable):
    assert source_of(dataset, "data").is_iterable == is_iterable


def test_what_is_no_data_set():
    assert "expected a pair or dict of tensors, or a Dataset" in fails(source_of, 3, "data d: train")
    assert fails(source_of, [], "data d: train") == "data d: train: expected examples, found none"


def test_a_pass_over_an_iterable_data_set():
    class Epochs(Stream):
        def set_epoch(self, epoch):
            self.examples = [(epoch, i) for i in range(3)] if epoch < 2 else []

    source = source_of(Epochs([]), "data d: train")
    assert list(source.one_pass(1)) == [(1, 0), (1, 1), (1, 2)]
    assert fails(list, source.one_pass(2)) == "data d: train: expected examples, found none when it is read again"
    broken = source_of(Stream(1 / (2 - i) for i in range(3)), "data d: train")
    assert "example 2 cannot be read: ZeroDivisionError" in fails(list, broken.one_pass(0))


class Columns(Map):
    """As the data sets of Hugging Face: an example is a dict, and a name gives a column."""

    column_names = ("text", "label")

    def __getitem__(self, key):
        return [i % 3 for i in range(6)] if key == "label" else {"ids": [key, key], "text": "", "label": key % 3}


def labelled(name, labels):
    dataset = Map(lambda i: (0.0, i))
    setattr(dataset, name, labels)
    return dataset


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (labelled("targets", [3, 4, 5, 6, 7, 8]), [3, 4, 5, 6, 7, 8]),
        (labelled("labels", np.arange(6, dtype=np.uint8)), [0, 1, 2, 3, 4, 5]),
        (Subset(labelled("targets", torch.arange(6)), [4, 1]), [4, 1]),
        (Subset(Subset(labelled("targets", torch.arange(6)), [4, 1, 0]), torch.tensor([2, 0])), [0, 4]),
        (Columns(None), [0, 1, 2, 0, 1, 2]),
        (labelled("targets", torch.arange(5)), None),
        (labelled("targets", torch.rand(6)), None),
        (labelled("targets", list("abcdef")), None),
        (labelled("targets", torch.zeros(6, 2, dtype=int)), None),
        (Map(int), None),
    ],
)
def test_labels_beside_the_examples(dataset, expected):
    found = labels_beside(dataset)
    assert (found if found is None else found.tolist()) == expected


def test_examples_with_columns():
    inputs, targets = batch(Columns(None), [4, 5])
    assert inputs["ids"].tolist() == [[4, 4], [5, 5]]
    assert (list(inputs), targets.tolist()) == (["ids", "label"], [1, 2])


def test_collate_takes_an_example_twice():
    inputs, _ = collate([(1.0, 0), (1.0, 0)], [9, 9], "data")
    assert inputs.tolist() == [1, 1]
