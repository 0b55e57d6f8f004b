import gzip
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_arm import OneArm
from safetensors.numpy import save_file

from ticketfind import TicketfindError, data, formats
from ticketfind.layers import from_layers
from ticketfind.outputs import accuracy, cross_entropy

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def _same_path_afterwards(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])


def shape_of(found):
    return tuple(found.train.inputs.shape[1:])


def load(spec, args=None, validation=None, seed=0):
    return data.load(str(spec), args or {}, validation=validation, seed=seed)


# ------------------------------------------------------------------------------------------------- digits


def test_digits_are_the_1797_of_scikit_learn():
    found = load("digits", validation=200)
    assert [len(split) for split in (found.train, found.validation, found.test)] == [1197, 200, 400]
    assert len(load("digits", validation=None).validation) == 140  # a tenth of 1,397, rounded
    assert (shape_of(found), found.classes) == ((1, 8, 8), 10)
    inputs = torch.cat([split.inputs for split in (found.train, found.validation, found.test)])
    targets = torch.cat([split.targets for split in (found.train, found.validation, found.test)])
    assert targets.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # UCI's class counts
    assert torch.equal(inputs * 16, (inputs * 16).round())
    assert (inputs.min(), inputs.max()) == (0, 1)
    assert int((inputs * 16).sum()) == 561_718  # sklearn.datasets.load_digits().data.sum()


def test_digits_take_no_arguments():
    with pytest.raises(TicketfindError, match=r"data\.args: expected none for 'digits', found scale"):
        load("digits", {"scale": 1})


# ------------------------------------------------------------------------------------------ validation split


def arrays(train=40, test=10, **more):
    """Arrays whose inputs are the examples' numbers."""
    return {
        "x_train": np.arange(train, dtype=np.float32).reshape(-1, 1),
        "y_train": np.arange(train) % 3,
        "x_test": np.zeros((test, 1), np.float32),
        "y_test": np.arange(test) % 3,
    } | more


def npz(folder, **contents):
    np.savez(folder / "d.npz", **contents)
    return folder / "d.npz"


def examples(split):
    return split.inputs.flatten().int().tolist()


@pytest.mark.parametrize(("validation", "held"), [(7, 7), (0.25, 10), (None, 4), (39, 39), (1, 1)])
def test_the_validation_split_is_disjoint_and_complete(tmp_path, validation, held):
    found = load(npz(tmp_path, **arrays()), validation=validation)
    assert len(found.validation) == held
    assert sorted(examples(found.train) + examples(found.validation)) == list(range(40))
    for split in (found.train, found.validation):
        assert split.targets.tolist() == [n % 3 for n in examples(split)]  # inputs keep their targets


def test_the_validation_split_follows_from_the_seed(tmp_path):
    path = npz(tmp_path, **arrays())
    a, b, c = (examples(load(path, validation=10, seed=seed).validation) for seed in (5, 5, 6))
    assert a == b
    assert a != c
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5)).tolist()
    assert a == order[:10]
    assert examples(load(path, validation=10, seed=5).train) == order[10:], "which example a batch takes is its place"


@pytest.mark.parametrize("validation", [40, 41, 0.001, 0.999])
def test_a_split_that_leaves_nothing(tmp_path, validation):
    with pytest.raises(TicketfindError, match=r"data\.validation: expected between 1 and 39 of the 40 training"):
        load(npz(tmp_path, **arrays()), validation=validation)


def test_a_validation_split_of_its_own_is_used(tmp_path):
    path = npz(tmp_path, **arrays(x_val=np.full((5, 1), -1, np.float32), y_val=np.ones(5, int)))
    for validation in (None, 5):
        found = load(path, validation=validation)
        assert [len(split) for split in (found.train, found.validation, found.test)] == [40, 5, 10]
        assert set(examples(found.validation)) == {-1}
    with pytest.raises(TicketfindError, match=r"data\.validation: expected null or 5, as .* found 7"):
        load(path, validation=7)


# ------------------------------------------------------------------------------------- npz and safetensors


def test_pixels_become_fractions_and_channels_come_first(tmp_path):
    pixels = np.arange(40 * 6 * 5 * 3).reshape(40, 6, 5, 3).astype(np.uint8)
    found = load(npz(tmp_path, **arrays(x_train=pixels, x_test=pixels[:10])), validation=1)
    assert (shape_of(found), found.train.inputs.dtype) == ((3, 6, 5), torch.float32)
    np.testing.assert_array_equal(found.test.inputs, pixels[:10].transpose(0, 3, 1, 2).astype(np.float32) / 255)


@pytest.mark.parametrize(
    ("inputs", "shape", "dtype"),
    [
        (np.ones((40, 6, 6), np.uint8), (1, 6, 6), torch.float32),  # gray pixels get their channel
        (np.ones((40, 3, 6, 6), np.uint8), (3, 6, 6), torch.float32),
        (np.ones((40, 9), np.uint8), (9,), torch.float32),
        (np.ones((40, 6, 6), np.float64), (6, 6), torch.float32),  # numbers stay as they are
        (np.ones((40, 6, 6, 3), np.float16), (6, 6, 3), torch.float32),
        (np.ones((40, 12), np.int32), (12,), torch.int64),  # tokens
        (np.ones((40, 12), bool), (12,), torch.float32),
    ],
)
def test_kinds_of_inputs(tmp_path, inputs, shape, dtype):
    found = load(npz(tmp_path, **arrays(x_train=inputs, x_test=inputs[:10])))
    assert (shape_of(found), found.train.inputs.dtype) == (shape, dtype)


@pytest.mark.parametrize(
    ("targets", "classes", "shape"),
    [
        (np.arange(40) % 7, 7, ()),
        (np.arange(40, dtype=np.uint8)[:, None] % 7, 7, ()),  # a column of labels
        (np.arange(40) / 7, None, ()),
        (np.zeros((40, 3)), None, (3,)),
        (np.zeros((40, 1)), None, (1,)),  # as a loss against outputs [n, 1] takes them
        (np.zeros((40, 3), int), 1, (3,)),  # a label for each place
    ],
)
def test_kinds_of_targets(tmp_path, targets, classes, shape):
    found = load(npz(tmp_path, **arrays(y_train=targets, y_test=targets[:10])))
    assert (found.classes, tuple(found.train.targets.shape[1:])) == (classes, shape)


def test_arrays_in_fortran_order_are_those_in_c_order(tmp_path):
    numbers = np.arange(40 * 6, dtype=np.float32).reshape(40, 6)
    columns = np.asfortranarray(numbers)
    found = load(npz(tmp_path, **arrays(x_train=columns, x_test=np.asfortranarray(columns[:10]))))
    np.testing.assert_array_equal(found.test.inputs, numbers[:10])


def test_classes_count_labels_of_every_split(tmp_path):
    assert load(npz(tmp_path, **arrays(y_test=np.full(10, 11)))).classes == 12


def test_safetensors(tmp_path):
    save_file(arrays(), tmp_path / "d.safetensors")
    assert len(load(tmp_path / "d.safetensors", validation=4).train) == 36


def test_a_batch_is_examples_by_index(tmp_path):
    inputs, targets = load(npz(tmp_path, **arrays())).test.batch(torch.tensor([4, 2, 4]))
    assert (inputs.shape, targets.tolist()) == ((3, 1), [1, 2, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.r_[np.zeros(11), np.nan, np.zeros(26), np.inf, 0][:, None]}, "NaN or infinity in example 11"),
        ({"x_test": np.full((10, 1), np.inf)}, "test: expected finite inputs, found NaN or infinity in example 0"),
        ({"y_train": np.zeros(39, int)}, "train: expected as many inputs as targets, found 40 and 39"),
        ({"y_test": np.arange(10) - 1}, "test: expected labels from 0 (or -100 for what does not count), found -1"),
        ({"x_test": np.zeros((0, 1)), "y_test": np.zeros(0, int)}, "test: expected examples, found none"),
        ({"x_test": np.zeros((10, 2))}, r"test: expected inputs of shape (1,) as in train, found them of shape (2,)"),
        ({"x_val": np.zeros((2, 1))}, "found no y_val, but x_train"),
        ({"x_train": np.array(3.0)}, "x_train: expected an array with one row per example, found a single number"),
        ({"y_train": np.array(["cat"] * 40)}, "y_train: expected numbers, found ndarray: TypeError"),
    ],
)
def test_inconsistent_arrays_are_named(tmp_path, change, message):
    with pytest.raises(TicketfindError) as error:
        load(npz(tmp_path, **arrays(**change)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_arrays_are_listed_with_those_found(tmp_path):
    with pytest.raises(TicketfindError, match="found no x_test, y_test, but x_train, y_train, images"):
        load(npz(tmp_path, x_train=np.ones(3), y_train=np.ones(3), images=np.ones(3)))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_in_an_npz_is_refused_and_not_run(tmp_path):
    pwned = tmp_path / "pwned"
    objects = np.empty(40, object)
    objects[:] = Payload(pwned)
    path = npz(tmp_path, **arrays(y_train=objects))
    with pytest.raises(TicketfindError, match=r"d\.npz: expected a \.npz file of plain arrays; .*Object arrays cannot"):
        load(path)
    assert not pwned.exists()


@pytest.mark.parametrize("content", ["empty", "half", "a web page", "a .npy file"])
def test_files_that_are_no_npz(tmp_path, content):
    path = npz(tmp_path, **arrays())
    raw = path.read_bytes()
    np.save(tmp_path / "a.npy", np.ones(3))
    contents = {
        "empty": b"",
        "half": raw[: len(raw) // 2],
        "a web page": b"<!DOCTYPE html>",
        "a .npy file": (tmp_path / "a.npy").read_bytes(),
    }
    path.write_bytes(contents[content])
    with pytest.raises(TicketfindError, match=r"d\.npz: expected a \.npz file, found no zip archive"):
        load(path)


def test_an_npz_with_a_damaged_array_is_named(tmp_path):
    path = npz(tmp_path, **arrays())
    raw = bytearray(path.read_bytes())
    raw[300] ^= 0xFF  # in the first array: its checksum no longer fits
    path.write_bytes(raw)
    with pytest.raises(TicketfindError, match=r"d\.npz: expected a \.npz file of plain arrays; reading it failed"):
        load(path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "digit",
            "data 'digit': expected digits, a folder of images (a folder for each class) or of IDX",
        ),
        ("digit", "did you mean digits?"),
        ("/no/such/folder", "found no such file or folder"),
        ("missing.npz", "found no such file or folder"),
    ],
)
def test_unknown_data_is_named(spec, message):
    with pytest.raises(TicketfindError) as error:
        load(spec)
    assert message in str(error.value)


# ---------------------------------------------------------------------------------------------------- IDX

IDX_CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}


def idx(array):
    """The bytes of an IDX file, big-endian as the format wants them."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, IDX_CODES[array.dtype.name], array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def idx_folder(folder, suffix=""):
    rng = np.random.default_rng(0)
    pixels = {"train": rng.integers(0, 256, (30, 5, 4), np.uint8), "t10k": rng.integers(0, 256, (8, 5, 4), np.uint8)}
    for part, images in pixels.items():
        for kind, array in (("images-idx3", images), ("labels-idx1", (np.arange(len(images)) % 4).astype(np.uint8))):
            raw = idx(array)
            (folder / f"{part}-{kind}-ubyte{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)
    return pixels


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_folder_as_mnist_has_it(tmp_path, suffix):
    pixels = idx_folder(tmp_path, suffix)
    found = load(tmp_path, validation=3)
    assert [len(split) for split in (found.train, found.validation, found.test)] == [27, 3, 8]
    assert (shape_of(found), found.classes) == ((1, 5, 4), 4)
    np.testing.assert_array_equal(found.test.inputs[:, 0], pixels["t10k"].astype(np.float32) / 255)
    assert found.test.targets.tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("dtype", IDX_CODES)
def test_idx_numbers_of_every_type(tmp_path, dtype):
    array = (np.arange(12).reshape(3, 4) * 10.5).astype(dtype)
    (tmp_path / "a-idx2").write_bytes(idx(array))
    found = formats.read_idx(tmp_path / "a-idx2")
    assert str(found.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(found.numpy(), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expected an IDX file, found bytes \(none\) at its start"),
        (b"<!DOCTYPE html>", "expected an IDX file, found bytes 3c 21 44 4f at its start"),
        (gzip.compress(b"x" * 99), "expected an IDX file, found bytes 1f 8b 08 00 at its start"),  # without its .gz
        (b"\0\0\x07\x01\0\0\0\0", "expected an IDX file, found bytes 00 00 07 01"),  # no such type
        (b"\0\0\x08\x03\0\0\0\x01", "expected an IDX file, found bytes 00 00 08 03"),  # header cut
        (idx(np.ones((3, 4), np.uint8))[:-1], r"expected 12 bytes after the header \(3, 4\), found 11"),
        (idx(np.ones((3, 4), np.int16)) + b"x", r"expected 24 bytes after the header \(3, 4\), found 25"),
    ],
)
def test_files_that_are_no_idx(tmp_path, content, message):
    (tmp_path / "a-idx3-ubyte").write_bytes(content)
    with pytest.raises(TicketfindError, match=f"a-idx3-ubyte: {message}"):
        formats.read_idx(tmp_path / "a-idx3-ubyte")


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(b"x" * 1000)[:-9]])
def test_damaged_gzip_is_named(tmp_path, content):
    (tmp_path / "a-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(TicketfindError, match=r"a-idx3-ubyte\.gz: expected an IDX file"):
        formats.read_idx(tmp_path / "a-idx3-ubyte.gz")


def test_an_idx_folder_that_lacks_a_file_is_named(tmp_path):
    idx_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(TicketfindError, match=r"expected IDX files as MNIST has them .* found no labels for test"):
        load(tmp_path)


def test_fashion_mnist_is_what_gzip_and_numpy_read():
    if not FASHION_MNIST.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    found = load(FASHION_MNIST, validation=5000)
    assert [len(split) for split in (found.train, found.validation, found.test)] == [55_000, 5_000, 10_000]
    assert (shape_of(found), found.classes) == ((1, 28, 28), 10)
    with gzip.open(FASHION_MNIST / "t10k-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(10_000, 28, 28)
    with gzip.open(FASHION_MNIST / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    np.testing.assert_array_equal(found.test.inputs[:, 0] * 255, pixels)
    np.testing.assert_array_equal(found.test.targets, labels)
    assert torch.cat([found.train.targets, found.validation.targets]).bincount().tolist() == [6000] * 10


# ------------------------------------------------------------------------------------------------ factories

FACTORIES = """
import numpy, torch
from torch.utils.data import Dataset, TensorDataset

def pair(n=20, shape=(2,)):
    return torch.randn(n, *shape), torch.arange(n) % 3

def tensors(n=20): return pair(n), pair(4)
def lists(): return [list(pair()), list(pair(4))]
def arrays(): return tuple((x.numpy(), y.numpy()) for x, y in (pair(), pair(4)))
def three(): return pair(), pair(5), pair(4)
def datasets(): return TensorDataset(*pair()), TensorDataset(*pair(4))

class Plain:  # a map-style data set without torch
    def __len__(self): return 12
    def __getitem__(self, i):
        if i >= 12: raise IndexError
        return [float(i), 0.0], i % 3

def plain(): return Plain(), Plain()

made = tensors()

def none(): return None
def one(): return (pair(),)
def single(): return pair()[0], pair()[0]
def fails(): raise RuntimeError("no\\nnetwork")
def numbers(): return 3, 4

class Other(Dataset):
    def __init__(self, example): self.example = example
    def __len__(self): return 3
    def __getitem__(self, i): return self.example(i)

def ragged(): return (Other(lambda i: (torch.zeros(i + 1), 0)),) * 2
def words(): return (Other(lambda i: ("a cat", 0)),) * 2
def alone(): return (Other(lambda i: torch.zeros(3)),) * 2
def broken(): return (Other(lambda i: 1 / (i - 2)),) * 2
def empty(): return TensorDataset(*pair(0)), TensorDataset(*pair(4))
def other_shape(): return pair(), pair(4, (3,))
"""


@pytest.fixture
def factories(tmp_path):
    (tmp_path / "factories.py").write_text(FACTORIES)
    return f"{tmp_path}/factories.py"


@pytest.mark.parametrize(
    ("name", "args", "sizes"),
    [
        ("tensors", {}, [18, 2, 4]),
        ("tensors", {"n": 30}, [27, 3, 4]),
        ("lists", {}, [18, 2, 4]),
        ("arrays", {}, [18, 2, 4]),
        ("three", {}, [20, 5, 4]),
        ("datasets", {}, [18, 2, 4]),
        ("plain", {}, [11, 1, 12]),
        ("made", {}, [18, 2, 4]),
    ],
)
def test_factories(factories, name, args, sizes):
    found = load(f"{factories}:{name}", args)
    assert [len(split) for split in (found.train, found.validation, found.test)] == sizes
    assert (shape_of(found), found.classes, found.train.targets.dtype) == ((2,), 3, torch.int64)


def test_a_data_set_is_read_in_order(factories):
    found = load(f"{factories}:plain").test
    assert found.inputs.tolist() == [[float(i), 0.0] for i in range(12)]
    assert found.targets.tolist() == [i % 3 for i in range(12)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "expected (train, test) or (train, validation, test), found NoneType"),
        ("one", "expected (train, test) or (train, validation, test), found tuple of 1"),
        ("single", "train: expected (input, target) or dict examples, found Tensor at 0"),
        ("fails", "the factory failed: RuntimeError: no network"),
        (
            "numbers",
            "train: expected a pair or dict of tensors, or a Dataset (map-style or iterable)",
        ),
        ("ragged", "train: input: expected examples of one shape, found (2,) at 1, and (1,) at 0; a DataLoader"),
        ("words", "train: input 0: expected numbers, found str: TypeError"),
        ("alone", "train: expected (input, target) or dict examples, found Tensor at 0"),
        ("broken", "train: example 2 cannot be read: ZeroDivisionError"),
        ("empty", "train: expected examples, found none"),
        ("other_shape", "test: expected inputs of shape (2,) as in train, found them of shape (3,)"),
        ("nothing", "has no 'nothing'"),
    ],
)
def test_factories_that_return_something_else(factories, name, message):
    with pytest.raises(TicketfindError) as error:
        load(f"{factories}:{name}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_arguments_that_the_factory_does_not_take(factories):
    with pytest.raises(TicketfindError, match=r"the factory failed: TypeError: .*unexpected keyword argument 'm'"):
        load(f"{factories}:tensors", {"m": 3})


def test_what_a_factory_draws_does_not_depend_on_what_was_drawn_before(factories):
    before = torch.get_rng_state()
    first = load(f"{factories}:tensors")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(load(f"{factories}:tensors").test.inputs, first.test.inputs)
    torch.set_rng_state(before)


# ---------------------------------------------------------------------------------- resident or streamed

SETS = """
import random, torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

class Map(Dataset):  # 40 bytes an example
    def __init__(self, n, change=None): self.n, self.change, self.targets = n, change, [i % 3 for i in range(n)]
    def __len__(self): return self.n
    def __getitem__(self, i):
        x = torch.full((8,), float(i))
        return (self.change(x, i) if self.change else x), i % 3

class Flow(IterableDataset):
    def __init__(self, n): self.n = n
    def __iter__(self): return (Map(self.n)[i] for i in range(self.n))

class Sized(Flow):
    def __len__(self): return self.n

def maps(n=100): return Map(n), Map(20), Map(20)
def two(n=100): return Map(n), Map(20)
def noise(x, i): return x + torch.rand(())
def noisy(): return Map(100, noise), Map(20), Map(20)
def noisy_test(): return Map(100), Map(20), Map(20, lambda x, i: x + random.random())
def nan(x, i): return x / 0 * 0 if i == 7 else x
def nans(): return Map(100, nan), Map(20), Map(20)
def flows(): return Flow(100), Sized(20), Flow(20)
def two_flows(): return Flow(100), Flow(20)
def mixed(): return Map(100), Flow(20), (torch.zeros(20, 8), torch.arange(20) % 3)
def once(): return tuple((Map(n)[i] for i in range(n)) for n in (100, 20, 20))
def empty(): return Flow(0), Flow(20)
def subset(): return Subset(Map(100), range(0, 100, 2)), Map(20)
def other_labels(): d = Map(100); d.targets = [9] * 100; return d, Map(20), Map(20)
def first_ignored():
    d = Map(100); return [(x, -100 if i < 5 else y) for i, (x, y) in enumerate(d[j] for j in range(100))], Map(20)
def negative(): return [(torch.zeros(8), -1)] * 9, Map(20)
def floats(): return [(torch.zeros(8), i / 2) for i in range(9)], Map(20)
"""


@pytest.fixture
def sets(tmp_path):
    (tmp_path / "sets.py").write_text(SETS)
    return f"{tmp_path}/sets.py"


def kinds(spec, **how):
    found = data.load(spec, {}, validation=None, seed=0, **how)
    names = [type(part).__name__ for part in (found.train, found.validation, found.test)]
    assert found.is_resident == (names == ["Split"] * 3)
    return names


@pytest.mark.parametrize(
    ("name", "how", "expected"),
    [
        ("maps", {}, ["Split"] * 3),
        ("maps", {"memory": 140 * 40}, ["Split"] * 3),
        ("maps", {"memory": 140 * 40 - 1}, ["Stream"] * 3),  # all three together
        ("maps", {"memory": 0, "resident": True}, ["Split"] * 3),
        ("maps", {"resident": False}, ["Stream"] * 3),
        ("noisy", {}, ["Stream"] * 3),
        ("noisy_test", {"workers": 1}, ["Stream"] * 3),
        ("noisy", {"resident": True}, ["Split"] * 3),
        ("flows", {}, ["Split"] * 3),
        ("flows", {"memory": 140 * 40}, ["Split"] * 3),
        ("flows", {"memory": 140 * 40 - 1}, ["Flow"] * 3),
        ("flows", {"resident": False}, ["Flow"] * 3),
        ("two_flows", {}, ["Split"] * 3),
        ("mixed", {}, ["Split"] * 3),
        ("mixed", {"memory": 120 * 40 - 1}, ["Stream", "Flow", "Split"]),
        ("once", {}, ["Split"] * 3),
    ],
)
def test_data_is_read_into_memory_where_it_fits_and_is_the_same_at_each_reading(sets, name, how, expected):
    before = torch.get_rng_state(), random.getstate()
    assert kinds(f"{sets}:{name}", **how) == expected
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_what_is_read_into_memory_is_drawn_the_same_way_always(sets):
    first, second = (
        data.load(f"{sets}:noisy", {}, validation=None, seed=seed, resident=True).train.inputs for seed in (0, 1)
    )
    assert torch.equal(first, second)
    assert len((first[:, 0] % 1).unique()) == 100


def test_an_iterable_data_set_in_memory_can_be_divided(sets):
    found = data.load(f"{sets}:two_flows", {}, validation=None, seed=0)
    assert found.test.inputs[:, 0].tolist() == list(range(20)), "as it gives them"
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.cat([found.validation.inputs, found.train.inputs])[:, 0].tolist() == order


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("two_flows", {"resident": False}, "expected a validation split of its own, (train, validation, test), as no"),
        ("once", {"memory": 100}, "train: expected a data set that can be read more than once, as it is not read into"
         " memory, found a generator"),
        ("empty", {}, "train: expected examples, found none"),
        ("empty", {"resident": False}, "train: expected examples, found none"),
        ("nans", {}, "train: expected finite inputs, found NaN or infinity in example 7"),
        ("negative", {}, "train: expected labels from 0 (or -100 for what does not count), found -1"),
        ("negative", {"resident": False}, "train: expected labels from 0 (or -100 for what does not count), found -1"),
        ("floats", {"stratify": True}, "data.stratify: expected one class label an example in"),
        ("floats", {"stratify": True, "resident": False}, "; a data set that is not resident shows them as .targets"),
    ],
)  # fmt: skip
def test_data_sets_that_do_not_do(sets, name, how, message):
    with pytest.raises(TicketfindError) as error:
        data.load(f"{sets}:{name}", {}, validation=None, seed=0, **how)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_tensors_are_resident(factories):
    with pytest.raises(TicketfindError, match=r"data\.resident: expected null or true, as data .* is tensors already"):
        data.load(f"{factories}:tensors", {}, validation=None, seed=0, resident=False)


def test_the_split_is_the_same_resident_and_streamed(sets):
    for stratify in (False, True):
        how = {"validation": 12, "seed": 5, "stratify": stratify}
        resident, streamed = (data.load(f"{sets}:two", {}, resident=r, **how) for r in (True, False))
        for part in ("train", "validation", "test"):
            split, stream = getattr(resident, part), getattr(streamed, part)
            assert torch.equal(stream.labels, split.targets)
            assert torch.equal(torch.cat([inputs for inputs, _ in stream.chunks(7)]), split.inputs)


def test_labels_beside_the_examples_are_believed_where_they_are_the_examples(sets):
    assert data.load(f"{sets}:subset", {}, validation=5, seed=0, resident=False).classes == 3
    assert data.load(f"{sets}:other_labels", {}, validation=None, seed=0, resident=False).classes is None
    assert data.load(f"{sets}:other_labels", {}, validation=None, seed=0).classes == 3
    assert data.load(f"{sets}:floats", {}, validation=None, seed=0).classes is None


def test_the_first_examples_may_not_count(sets):
    assert kinds(f"{sets}:first_ignored", resident=False) == ["Stream"] * 3


# --------------------------------------------------------------------------------------- what is held out


@settings(deadline=None)
@given(labels=st.lists(st.integers(0, 5), min_size=2, max_size=80), held=st.integers(1, 79), seed=st.integers(0, 99))
def test_a_stratified_split_gives_each_class_its_share(labels, held, seed):
    labels, held = torch.tensor(labels), min(held, len(labels) - 1)
    stays, goes = data.held_out(len(labels), held, seed=seed, labels=labels)
    assert (len(stays), len(goes)) == (len(labels) - held, held)
    assert torch.equal(torch.cat([stays, goes]).sort().values, torch.arange(len(labels)))
    for label in labels.unique():
        exact = held * (labels == label).sum() / len(labels)
        assert abs((labels[goes] == label).sum() - exact) < 1
    left = dict(zip(*(found.tolist() for found in labels[goes].unique(return_counts=True)), strict=True))
    expected: tuple[list[int], list[int]] = ([], [])
    for place in torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist():
        is_out = left.get(label := int(labels[place]), 0) > 0
        left[label] = left.get(label, 0) - is_out
        expected[is_out].append(place)
    assert (stays.tolist(), goes.tolist()) == expected, "the first of each class in a shuffle, as it comes"


def test_of_classes_with_the_same_claim_to_a_place_the_first_has_it():
    labels = torch.arange(9) % 3
    for held, expected in ((4, [2, 1, 1]), (5, [2, 2, 1])):
        assert labels[data.held_out(9, held, seed=1, labels=labels)[1]].bincount().tolist() == expected


@given(examples=st.integers(2, 80), held=st.integers(1, 79), seed=st.integers(0, 2**40))
def test_a_plain_split_is_the_first_of_a_shuffle(examples, held, seed):
    held = min(held, examples - 1)
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    stays, goes = data.held_out(examples, held, seed=seed)
    assert torch.equal(goes, order[:held])
    assert torch.equal(stays, order[held:])


def test_a_stratified_split_of_files(tmp_path):
    labels = np.repeat([0, 1, 2], [24, 12, 4])
    path = npz(tmp_path, **arrays(y_train=labels))
    found = data.load(str(path), {}, validation=10, seed=0, stratify=True)
    assert found.validation.targets.bincount().tolist() == [6, 3, 1]
    assert examples(found.validation) != sorted(examples(found.validation))
    dense = npz(tmp_path, **arrays(y_train=np.zeros((40, 3), int), y_test=np.zeros((10, 3), int)))
    with pytest.raises(
        TicketfindError, match=r"data\.stratify: expected one class label an example in .*, found none$"
    ):
        data.load(str(dense), {}, validation=10, seed=0, stratify=True)


def test_a_small_training_set_gives_at_least_one(tmp_path):
    assert len(load(npz(tmp_path, **arrays(train=3))).validation) == 1


# ---------------------------------------------------------------------------------- targets that do not count


class Identity(torch.nn.Module):
    """Gives its inputs back; with a weight, as training needs one."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.w


@pytest.mark.parametrize("layout", ["labels", "pixels", "tokens"])
def test_ignored_targets_count_in_neither_loss_nor_metric(tmp_path, layout):
    generator = torch.Generator().manual_seed(0)
    shape = {"labels": (), "pixels": (4, 5), "tokens": (7,)}[layout]
    scores = torch.randn(41, *shape, 3, generator=generator)  # classes last
    targets = torch.randint(0, 3, (41, *shape), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = -100
    targets[0] = 1
    inputs = scores.movedim(-1, 1) if layout == "pixels" else scores
    path = npz(tmp_path, x_train=inputs, y_train=targets, x_test=inputs, y_test=targets)
    found = load(path, validation=5)
    assert found.classes == 3

    counted = targets != -100
    rows, labels = scores[counted], targets[counted]
    losses, right = -rows.log_softmax(-1)[range(len(rows)), labels], rows.argmax(-1) == labels
    expected = [losses.mean().item(), right.float().mean().item()]
    whole = found.test.inputs, found.test.targets
    assert [f(*whole).item() for f in (cross_entropy, accuracy)] == pytest.approx(expected)
    lane = OneArm(Identity(), {}, {}, from_layers({}).train, cross_entropy, 0)
    for size in (1, 2, 41):  # chunks hold several targets each that count, and not the same number
        assert lane.measure(found.test, (cross_entropy, accuracy), size) == pytest.approx(expected, rel=1e-5)


def test_nothing_that_counts(tmp_path):
    with pytest.raises(TicketfindError, match="test: expected labels, found nothing but -100, which does not count"):
        load(npz(tmp_path, **arrays(y_test=np.full(10, -100))))


def test_the_embedded_digits_are_not_shadowed_by_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `search --out digits` makes one."""
    (tmp_path / "digits/masks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert data.resolved_args("digits", {}, {"size": 8}) == {} and not data.takes_args("digits")
    assert len(data.load("digits", {}, validation=200, seed=0).test) == 400
