"""Against the same thing written with numpy, an image at a time."""

import numpy as np
import pytest
import torch

from ticketfind import TicketfindError, data
from ticketfind.augment import AUGMENTATIONS, augmented
from ticketfind.batches import Data, Order, Split


def by_hand(image, draw, names):
    """image: [channels, height, width]; draw: three numbers."""
    for name in names:
        if name == "flip" and draw[0] % 2:
            image = image[:, :, ::-1]
        if name == "crop":
            channels, height, width = image.shape
            y, x = height // 8, width // 8
            padded = np.zeros((channels, height + 2 * y, width + 2 * x), image.dtype)
            padded[:, y : y + height, x : x + width] = image
            top, left = draw[1] % (2 * y + 1), draw[2] % (2 * x + 1)
            image = padded[:, top : top + height, left : left + width]
    return image


@pytest.mark.parametrize("names", [(), ("flip",), ("crop",), ("flip", "crop"), ("crop", "flip")])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 24), (2, 5, 9)])
def test_each_image_by_its_own_draw(names, shape):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(60, *shape)).astype(np.float32)
    draws = rng.integers(0, 2**31, (60, 3))
    found = augmented(torch.from_numpy(images), torch.from_numpy(draws), names)
    expected = np.stack([by_hand(image, draw, names) for image, draw in zip(images, draws, strict=True)])
    np.testing.assert_array_equal(found, expected)


def test_half_of_the_images_are_flipped_and_every_place_is_cropped():
    draws = next(Order(0, 400, 0, 1).draws(400, 3))[0]
    images = torch.arange(16.0 * 16).view(1, 1, 16, 16).expand(400, -1, -1, -1)
    flipped = (augmented(images, draws, ["flip"])[:, 0, 0, 0] != 0).sum()
    assert 160 < flipped < 240  # 4 standard deviations
    assert len(torch.unique(augmented(images, draws, ["crop"]), dim=0)) == 25
    assert list(AUGMENTATIONS) == ["flip", "crop"]


def images(n=40):
    return Split(torch.arange(n * 64.0).view(n, 1, 8, 8) + 1, torch.arange(n) % 2)


def test_a_training_is_augmented_anew_in_each_epoch_and_nothing_else_is():
    found = Data(images(), images(), images(), ("flip", "crop"))
    order = Order(3, 20, 0, 6)
    batches = list(found.training(order))
    draws = torch.cat(list(order.draws(40, 3)))
    for (inputs, targets), rows, draw in zip(batches, torch.cat(list(order.indices(40))), draws, strict=True):
        assert torch.equal(targets, rows % 2)
        assert torch.equal(inputs, augmented(found.train.inputs[rows], draw, ("flip", "crop")))
    assert len(torch.unique(torch.cat([inputs for inputs, _ in batches]), dim=0)) > 80  # of 40 images, thrice
    assert torch.equal(torch.cat([inputs for inputs, _ in found.test.chunks(7)]), found.test.inputs)


def test_an_augmented_training_can_start_anywhere():
    found = Data(images(), images(), images(), ("crop",))
    whole = list(found.training(Order(3, 15, 0, 600)))
    for first in (1, 255, 256, 300):
        tail = list(found.training(Order(3, 15, first, 600)))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[first:], tail, strict=True))


@pytest.mark.parametrize("own", [False, True], ids=["held out", "of its own"])
def test_training_images_alone_are_augmented_wherever_the_validation_set_comes_from(own, tmp_path):
    whole, test = (split.inputs.numpy() for split in (images(30), images(5)))
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(4)).numpy()
    validation, train = (test, whole) if own else (whole[shuffled[:6]], whole[shuffled[6:]])
    arrays = {"x_train": whole, "y_train": np.zeros(30, int), "x_test": test, "y_test": np.zeros(5, int)}
    arrays |= {"x_val": test, "y_val": np.zeros(5, int)} if own else {}
    np.savez(tmp_path / "d.npz", **arrays)
    found = data.load(str(tmp_path / "d.npz"), {}, validation=None if own else 6, seed=4, augment=["flip"])
    order = Order(3, 8, 0, 3)
    batches = torch.cat([inputs for inputs, _ in found.training(order)])
    rows, draws = next(order.indices(len(train))).flatten(), next(order.draws(len(train), 3)).flatten(0, 1)
    expected = np.stack([by_hand(train[row], draw, ["flip"]) for row, draw in zip(rows, draws, strict=True)])
    np.testing.assert_array_equal(batches, expected)
    for part, unchanged in ((found.validation, validation), (found.test, test)):
        np.testing.assert_array_equal(torch.cat([inputs for inputs, _ in part.chunks(4)]), unchanged)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ((3,), (), "expected images [channels, height, width] in FILE, found inputs of shape (3,)"),
        ((1, 8, 8), (8, 8), "expected one target an image in FILE, as targets do not move with it, found targets of"),
    ],
)
def test_only_images_are_augmented(tmp_path, inputs, targets, message):
    arrays = {"x_train": np.zeros((9, *inputs)), "y_train": np.zeros((9, *targets), int)}
    arrays |= {"x_test": arrays["x_train"], "y_test": arrays["y_train"]}
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(TicketfindError) as error:
        data.load(str(tmp_path / "d.npz"), {}, validation=2, seed=0, augment=["flip"])
    assert f"data.augment: {message}".replace("FILE", str(tmp_path / "d.npz")) in str(error.value)
