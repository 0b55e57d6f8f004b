"""Data sets of images: folders with a folder for each class, and the data sets that timm knows by name.

The only file that names torchvision, PIL and timm's data sets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from ticketfind import TicketfindError
from ticketfind.specs import one_line, suggest

PARTS = {"train": ("train", "training"), "validation": ("val", "validation", "valid"), "test": ("test", "testing")}
"""Names of the folders that hold the splits."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an image becomes an input; keys of data.args. Where the model has settings of its own, they are filled in."""

    size: int | tuple[int, int] | None = None
    """Height and width; None: as the images are."""
    crop: float = 1.0
    """Share of the resized image's side that is kept, at its center."""
    interpolation: str = "bicubic"
    mean: tuple[float, ...] | None = None
    """Of each channel, subtracted; None: inputs are 0..1."""
    std: tuple[float, ...] | None = None
    channels: int = 3
    """3: color; 1: gray."""


def _settings(args: Mapping[str, Any], others: tuple[str, ...], what: str) -> tuple[Settings, dict[str, Any]]:
    """The settings in `args`, and the rest, which must be among `others`."""
    known = {field.name for field in fields(Settings)}
    for key in args:
        if key not in known and key not in others:
            raise TicketfindError(f"data.args: {key}: unknown for {what}{suggest(key, [*known, *others])}")
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in args.items() if key in known
    }
    settings = Settings(**given)
    try:
        channels = len(torch.zeros(1, settings.channels, 1, 1).flatten())
        for values in (settings.mean, settings.std):
            assert values is None or len([float(v) for v in values]) == channels
        assert settings.channels in (1, 3) and 0 < float(settings.crop) <= 1
        assert settings.size is None or all(int(side) > 0 for side in _sides(settings.size))
    except (AssertionError, TypeError, ValueError, RuntimeError):
        raise TicketfindError(
            "data.args: expected size (a number or [height, width]), crop (above 0, at most 1), interpolation,"
            f" channels (1 or 3), mean and std (a number for each channel), found {dict(given)}"
        ) from None
    return settings, {key: value for key, value in args.items() if key not in known}


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def transform(settings: Settings) -> Any:
    """PIL image -> float32 [channels, height, width], as timm prepares images for evaluation."""
    from torchvision import transforms

    steps: list[Any] = [transforms.Lambda(_Converted(settings.channels))]
    if settings.size is not None:
        from timm import data

        made = data.create_transform(  # type: ignore[attr-defined]
            (settings.channels, *_sides(settings.size)),
            is_training=False,
            interpolation=settings.interpolation,
            mean=settings.mean or (0.0,) * settings.channels,
            std=settings.std or (1.0,) * settings.channels,
            crop_pct=settings.crop,
        )
        return transforms.Compose([*steps, made])
    steps.append(transforms.ToTensor())
    if settings.mean is not None or settings.std is not None:
        ones = (1.0,) * settings.channels
        steps.append(transforms.Normalize(settings.mean or (0.0,) * settings.channels, settings.std or ones))
    return transforms.Compose(steps)


@dataclass(frozen=True)
class _Converted:
    """In color or gray, whatever the file has."""

    channels: int

    def __call__(self, image: Any) -> Any:
        return image.convert("L" if self.channels == 1 else "RGB")


def folder(path: Path, args: Mapping[str, Any]) -> dict[str, Any]:
    """The data sets of a folder: train, test and, where it is there, validation.

    The folder holds the splits (train, val, test; without test, val is the test set) or, without splits, the classes;
    then the share `test` (a fifth) of each class is set aside as the test set, always the same. Raises
    TicketfindError where classes differ between splits, are fewer than two or empty.
    """
    settings, rest = _settings(args, ("test",), "a folder of images")
    found = {part: path / name for part, names in PARTS.items() for name in names if (path / name).is_dir()}
    if not found:
        return _divided(_Folder(path, settings), rest.get("test", 0.2), path)
    if rest:
        raise TicketfindError(f"data.args: test: expected none, as {path} has its own splits, found {rest['test']}")
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    if "train" not in found or "test" not in found:
        raise TicketfindError(
            f"data {path}: expected folders train and test (or val), found {', '.join(p.name for p in found.values())}"
        )
    made = {part: _Folder(place, settings) for part, place in found.items()}
    for part, dataset in made.items():
        if dataset.classes != made["train"].classes:
            differing = ", ".join(sorted(set(dataset.classes) ^ set(made["train"].classes))[:5])
            raise TicketfindError(
                f"data {path}: expected the same classes in train and {part}, found {differing} in one only"
            )
    return made


def _divided(dataset: "_Folder", share: Any, path: Path) -> dict[str, Any]:
    if not isinstance(share, float) or not 0 < share < 1:
        raise TicketfindError(f"data.args: test: expected a share between 0 and 1, found {share!r}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor(dataset.targets)[order]
    test = torch.zeros(len(dataset), dtype=torch.bool)
    for label in range(len(dataset.classes)):
        mine = (labels == label).nonzero()[:, 0]
        if len(mine) < 2:
            name = dataset.classes[label]
            raise TicketfindError(f"data {path}: expected at least two images of each class, found one of {name}")
        test[mine[: max(1, round(share * len(mine)))]] = True
    return {"train": Subset(dataset, order[~test].tolist()), "test": Subset(dataset, order[test].tolist())}


class _Folder(Dataset[Any]):
    """A map-style data set over a folder of class folders."""

    def __init__(self, path: Path, settings: Settings) -> None:
        from torchvision.datasets import ImageFolder

        try:
            files = ImageFolder(str(path))
        except (FileNotFoundError, OSError) as error:
            raise TicketfindError(
                f"data {path}: expected a folder of images for each class; {one_line(error)}"
            ) from error
        if len(files.classes) < 2:
            raise TicketfindError(
                f"data {path}: expected at least two folders, one for each class, found {', '.join(files.classes)}"
            )
        self.classes, self.targets, self._files = files.classes, files.targets, files.samples
        self._transform, self._sized = transform(settings), settings.size is not None
        self._first = None if self._sized else self._open(0).size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Any:
        image = self._open(index)
        if not self._sized and image.size != self._first:
            raise TicketfindError(
                f"{self._files[index][0]}: expected {_by(self._first)} pixels as in {self._files[0][0]},"
                f" found {_by(image.size)}; --data-arg size=N brings all to one size"
            )
        return self._transform(image), self.targets[index]

    def _open(self, index: int) -> Any:
        from PIL import Image

        path = self._files[index][0]
        try:
            with Image.open(path) as file:
                file.load()
                return file
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise TicketfindError(f"{path}: expected an image; reading it failed: {one_line(error)}") from error


def _by(size: Any) -> str:
    return f"{size[0]}x{size[1]}"


def timm_datasets(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The data sets that timm knows by a name (torch/cifar10, wds/..., hfds/...); nothing is downloaded.

    args: root (the folder that holds it), train_split, validation_split, test_split, and the image settings.
    """
    others = ("root", "train_split", "validation_split", "test_split")
    settings, rest = _settings(args, others, f"timm:{name}")
    splits = {"train": rest.get("train_split", "train"), "test": rest.get("test_split", "validation")}
    if "validation_split" in rest:
        splits["validation"] = rest["validation_split"]
    return {part: _timm_dataset(name, rest.get("root"), split, settings) for part, split in splits.items()}


def _timm_dataset(name: str, root: Any, split: str, settings: Settings) -> Any:
    from timm import data

    try:
        dataset = data.create_dataset(  # type: ignore[attr-defined]
            name, root=root, split=split, is_training=False, download=False
        )
    except ImportError as error:
        raise TicketfindError(f"data timm:{name}: its reader needs a package that is not installed: {error}") from error
    except Exception as error:
        raise TicketfindError(
            f"data timm:{name}: expected the {split} split in --data-arg root=FOLDER, found {root}: {one_line(error)}"
        ) from error
    dataset.transform = transform(settings)
    return dataset
