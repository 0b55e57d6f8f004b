"""Random changes to training images, on the device. Images: float32 [b, channels, height, width]."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def augmented(images: Tensor, draw: Tensor, names: Sequence[str]) -> Tensor:
    """Images after each of `names`; draw: int64 [b, 3], random numbers of each image (see `Order.draws`)."""
    draw = draw.to(images.device)
    for name in names:
        images = AUGMENTATIONS[name](images, draw)
    return images


def _flip(images: Tensor, draw: Tensor) -> Tensor:
    """Half of the images mirrored, left to right."""
    return torch.where((draw[:, 0] % 2 == 1).view(-1, 1, 1, 1), images.flip(-1), images)


def _crop(images: Tensor, draw: Tensor) -> Tensor:
    """Images moved by up to an eighth of their size along both axes, zeros where they leave a gap.

    For 32x32 the usual crop from an image padded by 4 (arXiv 1512.03385, section 4.2).
    """
    height, width = images.shape[-2:]
    pad_y, pad_x = height // 8, width // 8
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y))
    rows = draw[:, 1, None] % (2 * pad_y + 1) + torch.arange(height, device=draw.device)
    columns = draw[:, 2, None] % (2 * pad_x + 1) + torch.arange(width, device=draw.device)
    examples = torch.arange(len(images), device=draw.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=draw.device)[None, :, None, None]
    return padded[examples, channels, rows[:, None, :, None], columns[:, None, None, :]]


AUGMENTATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"flip": _flip, "crop": _crop}
