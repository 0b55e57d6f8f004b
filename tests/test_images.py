import io
import json
import pickle
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

from ticketfind import TicketfindError, assemble, data, images
from ticketfind.layers import from_layers

CLASSES = ("ant", "bee")


def load(spec, args=None, **how):
    how = {"validation": None, "seed": 0} | how
    return data.load(str(spec), args or {}, **how)


def fails(spec, args=None, **how):
    with pytest.raises(TicketfindError) as error:
        load(spec, args, **how)
    assert "\n" not in str(error.value)
    return str(error.value)


def picture(number, size=(10, 8), mode="RGB"):
    """width x height of noise."""
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, np.uint8))


def write(folder, count=5, classes=CLASSES, **how):
    """`count` images of each class."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture(100 * label + number, **how).save(folder / name / f"{number}.png")
    return folder


def by_hand(folder):
    """float32 [n, 3, h, w] and labels, as torchvision reads them."""
    found = ImageFolder(str(folder))
    return torch.stack([to_tensor(image) for image, _ in found]), torch.tensor(found.targets)


# ---------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("validation", ["val", "validation", None])
@pytest.mark.parametrize("test", ["test", "Testing"])
def test_folders_of_splits(tmp_path, validation, test):
    for part in ("train", test, *([validation] if validation else [])):
        write(tmp_path / part, {"train": 10}.get(part, 3))
    found = load(tmp_path)
    assert [len(p) for p in (found.train, found.validation, found.test)] == ([20, 6, 6] if validation else [18, 2, 6])
    inputs, targets = by_hand(tmp_path / test)
    assert torch.equal(found.test.inputs, inputs)
    assert torch.equal(found.test.targets, targets)
    assert (found.classes, tuple(inputs.shape)) == (2, (6, 3, 8, 10))


def test_without_a_test_folder_val_is_the_test_set(tmp_path):
    write(tmp_path / "train", 10)
    write(tmp_path / "val", 4)
    found = load(tmp_path)
    assert [len(p) for p in (found.train, found.validation, found.test)] == [18, 2, 8]
    assert torch.equal(found.test.inputs, by_hand(tmp_path / "val")[0])


def test_class_folders_without_splits_are_divided_the_same_way_always(tmp_path):
    inputs, targets = by_hand(write(tmp_path, 10))
    (tmp_path / ".hidden").mkdir()
    first, second = load(tmp_path, seed=0), load(tmp_path, seed=1)
    assert first.test.targets.bincount().tolist() == [2, 2]
    assert torch.equal(first.test.inputs, second.test.inputs)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    test = {place for label in (0, 1) for place in [p for p in order if targets[p] == label][:2]}
    train = [place for place in order if place not in test]
    rest = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(first.test.inputs, inputs[[place for place in order if place in test]])
    assert torch.equal(first.train.inputs, inputs[[train[place] for place in rest[2:]]])
    assert not torch.equal(first.validation.inputs, second.validation.inputs)
    every = torch.cat([part.inputs for part in (first.train, first.validation, first.test)])
    assert len(torch.unique(every, dim=0)) == 20
    assert load(tmp_path, {"test": 0.5}).test.targets.bincount().tolist() == [5, 5]
    assert load(tmp_path, {"test": 0.99}).test.targets.bincount().tolist() == [9, 9]  # each keeps one


def test_gray_and_color(tmp_path):
    write(tmp_path, 5, mode="L")
    gray, color = load(tmp_path, {"channels": 1}), load(tmp_path)
    assert gray.test.inputs.shape[1] == 1
    assert torch.equal(color.test.inputs, gray.test.inputs.expand(-1, 3, -1, -1))
    normed = load(tmp_path, {"channels": 1, "mean": [0.5], "std": [0.25]})
    torch.testing.assert_close(normed.test.inputs, (gray.test.inputs - 0.5) / 0.25)


def test_mixed_sizes_need_a_size(tmp_path):
    write(tmp_path, 5)
    picture(0, (12, 8)).save(tmp_path / "bee" / "3.png")
    for how in ({}, {"resident": False}, {"resident": False, "workers": 1}):
        message = fails(tmp_path, **how)
        assert "bee/3.png: expected 10x8 pixels as in" in message
        assert "ant/0.png, found 12x8; --data-arg size=N brings all to one size" in message
    assert load(tmp_path, {"size": 6}).train.inputs.shape[1:] == (3, 6, 6)
    assert load(tmp_path, {"size": [6, 4]}).train.inputs.shape[1:] == (3, 6, 4)


@pytest.mark.parametrize("damage", [b"", b"<!DOCTYPE html>", "cut"])
def test_a_damaged_image_is_named(tmp_path, damage):
    write(tmp_path, 5)
    path = tmp_path / "bee" / "3.png"
    path.write_bytes(path.read_bytes()[:150] if damage == "cut" else damage)
    assert f"{path}: expected an image; reading it failed: " in fails(tmp_path)


def test_folders_that_do_not_fit(tmp_path):
    write(tmp_path / "one", classes=("ant",))
    assert "expected at least two folders, one for each class, found ant" in fails(tmp_path / "one")
    write(tmp_path / "empty")
    (tmp_path / "empty" / "cat").mkdir()
    message = fails(tmp_path / "empty")
    assert "expected images (.jpg, .jpeg, .png" in message
    assert message.endswith("of each class, found none in cat")
    write(tmp_path / "other" / "train")
    write(tmp_path / "other" / "test", classes=("ant", "cat"))
    assert fails(tmp_path / "other").endswith("expected the same classes in train and test, found bee, cat in one only")
    write(tmp_path / "half" / "train")
    assert "expected folders train and test (or val), found train" in fails(tmp_path / "half")
    write(tmp_path / "single", 1)
    assert "expected at least two images of each class, found one of ant" in fails(tmp_path / "single")
    write(tmp_path / "splits" / "train")
    write(tmp_path / "splits" / "test")
    assert "test: expected none, as" in fails(tmp_path / "splits", {"test": 0.3})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"size": 0}, "size: expected a number of pixels, or [height, width], found 0"),
        ({"size": [32]}, "size: expected a number of pixels, or [height, width], found (32,)"),
        ({"size": "32"}, "size: expected a number of pixels, or [height, width], found '32'"),
        ({"size": 32.5}, "size: expected a number of pixels, or [height, width], found 32.5"),
        ({"crop": 0}, "crop: expected a number above 0, at most 2, found 0"),
        ({"crop": "all"}, "crop: expected a number above 0, at most 2, found 'all'"),
        ({"crop_mode": "left"}, "crop_mode: expected one of center, squash, border, found 'left'"),
        ({"interpolation": "cubic"}, "interpolation: expected one of nearest, bilinear, bicubic"),
        ({"channels": 2}, "channels: expected 1 or 3, found 2"),
        ({"mean": [0.5]}, "mean: expected a number for each of the 3 channels, found (0.5,)"),
        ({"std": [1, 1, 0]}, "std: expected a number for each of the 3 channels, not 0, found (1, 1, 0)"),
        ({"std": 1}, "std: expected a number for each of the 3 channels, not 0, found 1"),
        ({"sise": 3}, "sise: unknown for a folder of images; did you mean size"),
        ({"test": 1}, "test: expected a share between 0 and 1, found 1"),
    ],
)
def test_arguments_are_checked(tmp_path, args, message):
    write(tmp_path, 2)
    assert f"data.args: {message}" in fails(tmp_path, args)


# ------------------------------------------------------------------------------- the model's own transform


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [24, (24, 16)])
def test_the_transform_is_timms(size, crop_mode):
    from timm.data import create_transform

    sides = size if isinstance(size, tuple) else (size, size)
    how = {"interpolation": "bilinear", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_mode": crop_mode}
    timms = create_transform((3, *sides), is_training=False, crop_pct=0.8, **how)
    ours = images.transform(images.Settings(size=size, crop=0.8, **how))
    for image in (picture(0, (40, 30)), picture(1, (20, 50))):
        assert torch.equal(ours(image), timms(image))


def test_the_models_own_configuration_prepares_a_folder(tmp_path):
    import timm
    from timm.data import create_transform, resolve_data_config

    write(tmp_path / "train", 4, size=(50, 40))
    write(tmp_path / "test", 1, size=(50, 40))
    base = {"model": {"spec": "resnet10t"}, "train": {"batch_size": 2}, "run": {"device": "cpu", "tolerance": 1}}
    recipe = from_layers(base, {"data": {"spec": str(tmp_path)}})
    resolved, task = assemble.assemble(recipe)
    own = create_transform(**resolve_data_config(model=timm.create_model("resnet10t")), is_training=False)
    expected = torch.stack([own(image) for image, _ in ImageFolder(str(tmp_path / "test"))])
    assert torch.equal(task.data.test.inputs, expected)
    assert resolved.data.args["interpolation"] == "bicubic"
    assert task.model.get_classifier().out_features == 2


def test_a_given_argument_goes_before_the_models(tmp_path):
    write(tmp_path, 3)
    of_the_model = {"size": 224, "channels": 3, "mean": [0.1] * 3, "std": [0.2] * 3}
    assert data.resolved_args(str(tmp_path), {"size": 32}, of_the_model) == of_the_model | {"size": 32}
    assert data.resolved_args(str(tmp_path), {"channels": 1}, of_the_model) == {"size": 224, "channels": 1}
    assert data.resolved_args("digits", {"n": 1}, of_the_model) == {"n": 1}


# -------------------------------------------------------------------------------------------- timm's names


def cifar(root, train=50, test=20):
    """CIFAR-10 in its own layout, but small; the checksums of the real files do not hold."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in {**{f"data_batch_{i}": train // 5 for i in range(1, 6)}, "test_batch": test}.items():
        pixels = rng.integers(0, 256, (count, 3072), np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(count)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return pixels


def test_a_torchvision_data_set(tmp_path, monkeypatch):
    pixels = cifar(tmp_path)
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    found = load("timm:torch/cifar10", {"root": str(tmp_path)})
    assert [len(p) for p in (found.train, found.validation, found.test)] == [45, 5, 20]
    np.testing.assert_array_equal(found.test.inputs, np.float32(pixels.reshape(-1, 3, 32, 32)) / 255)
    streamed = load("timm:torch/cifar10", {"root": str(tmp_path), "size": 16}, resident=False, stratify=True)
    assert streamed.classes == 10
    assert streamed.test.first(2)[0].shape == (2, 3, 16, 16)


def test_a_torchvision_data_set_that_is_not_there(tmp_path):
    message = fails("timm:torch/cifar10", {"root": str(tmp_path)})
    assert "timm cannot open it: RuntimeError: Dataset not found or corrupted" in message


@pytest.mark.parametrize("name", ["folder", "torch/image_folder"])
def test_timms_folders(tmp_path, name):
    write(tmp_path / "train", 10)
    write(tmp_path / "validation", 3)
    write(tmp_path / "holdout", 2)
    inputs, targets = by_hand(tmp_path / "validation")
    found = load(f"timm:{name}", {"root": str(tmp_path)})
    assert [len(p) for p in (found.train, found.validation, found.test)] == [18, 2, 6]
    assert torch.equal(found.test.inputs, inputs)
    assert torch.equal(found.test.targets, targets)
    args = {"root": str(tmp_path), "validation_split": "validation", "test_split": "holdout"}
    streamed = load(f"timm:{name}", args, resident=False)
    assert [len(p) for p in (streamed.train, streamed.validation, streamed.test)] == [20, 6, 4]
    assert streamed.classes == 2


def test_timms_folders_that_do_not_fit(tmp_path):
    write(tmp_path / "flat", 3)
    assert "found the same images in train and test; --data FOLDER takes a folder of class folders" in fails(
        "timm:folder", {"root": str(tmp_path / "flat")}
    )
    write(tmp_path / "a" / "train", 3)
    write(tmp_path / "a" / "val", 3, ("ant", "cat"))
    assert "expected the same classes in train and test, found bee, cat" in fails(
        "timm:folder", {"root": str(tmp_path / "a")}
    )
    write(tmp_path / "b" / "train", 3)
    (write(tmp_path / "b" / "val", 3) / "ant" / "1.png").write_bytes(b"no image")
    assert "1.png: expected an image; reading it failed" in fails("timm:folder", {"root": str(tmp_path / "b")})


def shards(root, splits, image=picture):
    """WebDataset tars of two samples each, and the description that timm reads."""
    root.mkdir(exist_ok=True)
    info = {}
    for split, count in splits.items():
        names = [f"{split}-{i:02d}.tar" for i in range(count // 2)]
        for shard, name in enumerate(names):
            with tarfile.open(root / name, "w") as tar:
                for number in (2 * shard, 2 * shard + 1):
                    file = io.BytesIO()
                    image(number).save(file, "PNG")
                    for suffix, raw in (("png", file.getvalue()), ("cls", str(number % 2).encode())):
                        entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                        entry.size = len(raw)
                        tar.addfile(entry, io.BytesIO(raw))
        info[split] = {"name": split, "num_samples": count, "filenames": names, "shard_lengths": [2] * len(names)}
    (root / "_info.json").write_text(json.dumps({"splits": info}))
    return root


@pytest.fixture
def webdataset():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, at import and of tar files
        yield pytest.importorskip("webdataset", reason="webdataset is not installed: pip install ticketfind[data]")


def test_webdataset(tmp_path, webdataset):
    root = shards(tmp_path, {"train": 20, "validation": 6})
    expected = torch.stack([to_tensor(picture(number)) for number in range(6)])
    found = load("timm:wds/mine", {"root": str(root)})
    assert [len(p) for p in (found.train, found.validation, found.test)] == [18, 2, 6]
    assert torch.equal(found.test.inputs, expected)
    assert found.test.targets.tolist() == [0, 1] * 3

    args = {"root": str(root), "validation_split": "validation"}
    streamed = load("timm:wds/mine", args, resident=False, workers=1)
    assert [len(p) for p in (streamed.train, streamed.validation, streamed.test)] == [20, 6, 6]
    assert torch.equal(torch.cat([inputs for inputs, _ in streamed.test.chunks(4)]), expected)
    by_pattern = load("timm:wds/mine", {**args, "test_split": "validation-{00..02}.tar"}, resident=False)
    assert len(by_pattern.test) == 6  # counted, where no number is given


def test_webdatasets_that_are_not_there(tmp_path, webdataset):
    root = shards(tmp_path, {"train": 4})
    message = fails("timm:wds/mine", {"root": str(root)})
    assert "expected its validation split in" in message
    assert "split validation not found in info" in message
    (root / "train-00.tar").unlink()
    (root / "train-01.tar").unlink()
    assert "train: expected examples, found none" in fails("timm:wds/mine", {"root": str(root), "test_split": "train"})


def test_a_reader_whose_package_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    message = fails("timm:hfds/cifar10", {"root": str(tmp_path)})
    assert "timm:hfds/cifar10: its reader needs a package that is not installed: " in message
    assert "datasets" in message
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("cifar10", {}, "expected timm:folder or timm:PREFIX/NAME, PREFIX one of torch, wds, hfds, hfids, tfds"),
        ("cifar10", {}, "; did you mean torch/cifar10"),
        ("toch/cifar10", {}, "; did you mean torch/cifar10"),
        ("torch/cifar10", {}, "expected --data-arg root=FOLDER, the folder that holds it, found none"),
        ("torch/cifar10", {"root": "/no/such"}, "found no such folder: /no/such"),
        ("torch/cifra", {"root": "."}, "Unknown torchvision dataset cifra"),
        ("torch/cifar10", {"rot": "."}, "data.args: rot: unknown for timm:torch/cifar10; did you mean root"),
    ],
)
def test_timm_names_that_are_no_data(name, args, message):
    assert message in fails(f"timm:{name}", args)


def test_every_mode_is_brought_to_the_channels_asked_for():
    convert = images.transform(images.Settings(channels=3))
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
        assert convert(picture(0).convert(mode)).shape == (3, 8, 10)


def test_a_folder_that_looks_like_a_pipe_is_a_folder(tmp_path, monkeypatch):
    """webdataset runs what follows pipe: in a shell, if that is what a name begins with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe:touch x;").mkdir()
    assert images._root("wds/a", "pipe:touch x;") == f"{tmp_path}/pipe:touch x;"


def test_a_class_map_is_never_unpickled(tmp_path):
    message = fails("timm:folder", {"root": str(tmp_path), "class_map": "map.pkl"})
    assert "class_map: expected a mapping or a .txt file, as a pickle may run code, found 'map.pkl'" in message
