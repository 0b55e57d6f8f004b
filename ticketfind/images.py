"""Data sets of images: folders with a folder for each class, and the data sets that timm knows by name.

The only file that names torchvision, PIL and timm's data sets.
"""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from ticketfind import TicketfindError
from ticketfind.specs import one_line, suggest

PARTS = {"train": ("train", "training"), "validation": ("val", "validation", "valid"), "test": ("test", "testing")}
"""Names of the folders that hold the splits."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


# ---------------------------------------------------------------------------------- from image to input


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an image becomes an input; keys of data.args. Where the model has settings of its own, they are filled in."""

    size: int | tuple[int, int] | None = None
    """Height and width; None: as the images are."""
    crop: float = 1.0
    """Share of the resized image's side that is kept, at its center."""
    crop_mode: str = "center"
    """What is resized: center: the shorter side; squash: both sides; border: the longer side, with borders."""
    interpolation: str = "bicubic"
    mean: tuple[float, ...] | None = None
    """Of each channel, subtracted; None: inputs are 0..1."""
    std: tuple[float, ...] | None = None
    channels: int = 3
    """3: color; 1: gray."""

    def __post_init__(self) -> None:
        """Raise TicketfindError for the first key that holds something else."""
        each = f"a number for each of the {self.channels} channels"
        checks = (
            ("channels", self.channels in (1, 3), "1 or 3"),
            ("size", self.size is None or _are_sides(self.size), "a number of pixels, or [height, width]"),
            ("crop", _is_number(self.crop) and 0 < self.crop <= 2, "a number above 0, at most 2"),
            ("crop_mode", self.crop_mode in CROP_MODES, f"one of {', '.join(CROP_MODES)}"),
            ("interpolation", self.interpolation in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
            ("mean", self.mean is None or _are_numbers(self.mean, self.channels), each),
            ("std", self.std is None or (_are_numbers(self.std, self.channels) and all(self.std)), f"{each}, not 0"),
        )
        for key, fits, expected in checks:
            if not fits:
                raise TicketfindError(f"data.args: {key}: expected {expected}, found {getattr(self, key)!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, tuple) and len(values) == count and all(map(_is_number, values))


def _are_sides(size: Any) -> bool:
    sides = size if isinstance(size, tuple) else (size, size)
    return len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)


def _settings(args: Mapping[str, Any], others: Sequence[str], what: str) -> tuple[Settings, dict[str, Any]]:
    """The settings in `args`, and the rest, which must be among `others`."""
    known = {field.name for field in fields(Settings)}
    for key in args:
        if key not in known and key not in others:
            raise TicketfindError(f"data.args: {key}: unknown for {what}{suggest(key, [*known, *others])}")
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in args.items() if key in known
    }
    return Settings(**given), {key: value for key, value in args.items() if key not in known}


def transform(settings: Settings) -> Callable[[Any], torch.Tensor]:
    """PIL image -> float32 [channels, height, width], as timm prepares images for evaluation."""
    from torchvision import transforms

    mean = settings.mean or (0.0,) * settings.channels
    std = settings.std or (1.0,) * settings.channels
    convert = transforms.Lambda(_Converted(settings.channels))
    if settings.size is None:
        return transforms.Compose([convert, transforms.ToTensor(), transforms.Normalize(mean, std)])  # type: ignore[no-any-return]
    from timm import data

    size = settings.size if isinstance(settings.size, tuple) else (settings.size, settings.size)
    made = data.create_transform(  # type: ignore[attr-defined]
        (settings.channels, *size),
        is_training=False,
        interpolation=settings.interpolation,
        mean=mean,
        std=std,
        crop_pct=settings.crop,
        crop_mode=settings.crop_mode,
    )
    return transforms.Compose([convert, made])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Converted:
    """In color or gray, whatever the file has."""

    channels: int

    def __call__(self, image: Any) -> Any:
        return image.convert("L" if self.channels == 1 else "RGB")


def _opened(file: Any, name: str) -> Any:
    """The PIL image in a file, which `name` is for messages."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            return image
    except Exception as error:  # a damaged file may raise anything
        raise TicketfindError(f"{name}: expected an image; reading it failed: {one_line(error)}") from error


# ----------------------------------------------------------------------------------------------- folders


def folder(path: Path, args: Mapping[str, Any]) -> dict[str, Any]:
    """The data sets of a folder: train, test and, where it is there, validation.

    The folder holds the splits (train, val, test; without test, val is the test set) or, without splits, the classes;
    then the share `test` (a fifth) of each class is set aside as the test set, always the same. Raises
    TicketfindError where classes differ between splits, are fewer than two or empty.
    """
    settings, rest = _settings(args, ("test",), "a folder of images")
    places = {child.name.lower(): child for child in _folders(path)}
    found = {part: places[name] for part, names in PARTS.items() for name in names if name in places}
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
    _check_classes(f"data {path}", {part: dataset.classes for part, dataset in made.items()})
    return made


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _check_classes(what: str, classes: Mapping[str, Sequence[str]]) -> None:
    for part, names in classes.items():
        differing = sorted(set(names) ^ set(classes["train"]))
        if differing:
            raise TicketfindError(
                f"{what}: expected the same classes in train and {part}, found {', '.join(differing[:5])} in one only"
            )


def _divided(dataset: "_Folder", share: Any, path: Path) -> dict[str, Any]:
    if not isinstance(share, float) or not 0 < share < 1:
        raise TicketfindError(f"data.args: test: expected a share between 0 and 1, found {share!r}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor(dataset.targets)[order]
    test = torch.zeros(len(dataset), dtype=torch.bool)
    for label, name in enumerate(dataset.classes):
        mine = (labels == label).nonzero()[:, 0]
        if len(mine) < 2:
            raise TicketfindError(f"data {path}: expected at least two images of each class, found one of {name}")
        test[mine[: min(max(1, round(share * len(mine))), len(mine) - 1)]] = True
    return {"train": Subset(dataset, order[~test].tolist()), "test": Subset(dataset, order[test].tolist())}


class _Folder(Dataset[Any]):
    """A map-style data set over a folder of class folders."""

    def __init__(self, path: Path, settings: Settings) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        self.classes = [child.name for child in _folders(path)]
        if len(self.classes) < 2:
            raise TicketfindError(
                f"data {path}: expected at least two folders, one for each class, found {', '.join(self.classes) or 0}"
            )
        numbers = {name: label for label, name in enumerate(self.classes)}
        self._files = make_dataset(str(path), numbers, IMG_EXTENSIONS, allow_empty=True)
        self.targets = [label for _, label in self._files]
        empty = [name for name, label in numbers.items() if label not in set(self.targets)]
        if empty:
            raise TicketfindError(
                f"data {path}: expected images ({', '.join(IMG_EXTENSIONS)}) of each class, found none in"
                f" {', '.join(empty[:5])}"
            )
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
        path = self._files[index][0]
        return _opened(path, path)


def _by(size: Any) -> str:
    return f"{size[0]}x{size[1]}"


# ------------------------------------------------------------------------------------------- timm's names


PREFIXES = ("torch", "wds", "hfds", "hfids", "tfds")
"""Of timm's names; "folder" is without one."""
READER_ARGS = ("class_map", "input_key", "target_key")
"""Keys of data.args that go to timm's reader as they are."""


def timm_datasets(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The data sets that timm knows by a name (folder, torch/cifar10, wds/..., hfds/...).

    args: root (the folder that holds it), train_split, validation_split, test_split, those in READER_ARGS, and the
    image settings. Nothing is downloaded, but for names on the Hugging Face hub.
    """
    others = ("root", "train_split", "validation_split", "test_split", *READER_ARGS)
    settings, rest = _settings(args, others, f"timm:{name}")
    prefix, slash, _ = name.partition("/")
    if (prefix.lower() not in PREFIXES) if slash else (name != "folder"):
        close = suggest(name, ["folder", *PREFIXES, *(f"torch/{known}" for known in _TORCH)])
        raise TicketfindError(
            f"data timm:{name}: expected timm:folder or timm:PREFIX/NAME, PREFIX one of {', '.join(PREFIXES)}{close}"
        )
    if isinstance(class_map := rest.get("class_map"), str) and not class_map.endswith(".txt"):
        raise TicketfindError(
            f"data timm:{name}: class_map: expected a mapping or a .txt file, as a pickle may run code,"
            f" found {class_map!r}"
        )
    root = _root(name, rest.get("root"))
    splits = {"train": rest.get("train_split", "train"), "test": rest.get("test_split", "validation")}
    if "validation_split" in rest:
        splits["validation"] = rest["validation_split"]
    more = {key: rest[key] for key in READER_ARGS if key in rest}
    made = {part: _timm_dataset(name, root, split, more) for part, split in splits.items()}
    _check_splits(f"data timm:{name}", root, made)
    return {part: _prepared(dataset, settings) for part, dataset in made.items()}


_TORCH = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "imagenet", "places365", "inaturalist")


def _root(name: str, given: Any) -> str | None:
    if given is None and name.lower().startswith(("hfds/", "hfids/")):
        return None
    if given is None or not Path(str(given)).expanduser().exists():
        found = "none" if given is None else f"no such folder: {given}"
        raise TicketfindError(
            f"data timm:{name}: expected --data-arg root=FOLDER, the folder that holds it, found {found}"
        )
    return str(Path(str(given)).expanduser().resolve())  # absolute: what it is joined to is then no URL, and no pipe:


def _timm_dataset(name: str, root: str | None, split: str, more: Mapping[str, Any]) -> Any:
    from timm import data

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where timm says what to install
            return data.create_dataset(  # type: ignore[attr-defined]
                name, root=root, split=split, is_training=False, download=False, **more
            )
    except ImportError as error:
        raise TicketfindError(
            f"data timm:{name}: its reader needs a package that is not installed: {one_line(error)}"
        ) from error
    except Exception as error:
        raise TicketfindError(
            f"data timm:{name}: expected its {split} split in {root}; timm cannot open it: {one_line(error)};"
            " --data-arg train_split=, test_split= and validation_split= name others"
        ) from error


def _check_splits(what: str, root: str | None, made: Mapping[str, Any]) -> None:
    """Raise TicketfindError where timm took one folder for several splits, or found other classes in one."""
    files = {part: getattr(getattr(dataset, "reader", dataset), "samples", None) for part, dataset in made.items()}
    for part, samples in files.items():
        if part != "train" and samples is not None and samples == files["train"]:
            raise TicketfindError(
                f"{what}: expected a folder for each split in {root}, found the same images in train and {part};"
                " --data FOLDER takes a folder of class folders without splits"
            )
    classes = {p: getattr(getattr(d, "reader", d), "class_to_idx", None) for p, d in made.items()}
    if all(isinstance(names, Mapping) for names in classes.values()):
        _check_classes(what, {part: list(names or ()) for part, names in classes.items()})


def _prepared(dataset: Any, settings: Settings) -> Any:
    if hasattr(dataset, "reader") and not isinstance(dataset, IterableDataset):
        return _Read(dataset.reader, settings)
    dataset.transform = transform(settings)
    return dataset


class _Read(Dataset[Any]):
    """What a reader of timm's finds. timm itself would give another image for one that is damaged."""

    def __init__(self, reader: Any, settings: Settings) -> None:
        self._reader, self._transform = reader, transform(settings)
        self.targets = getattr(reader, "targets", None) or [sample[-1] for sample in getattr(reader, "samples", ())]

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Any:
        file, target, *_ = self._reader[index]
        with file:
            return self._transform(_opened(file, self._reader.filename(index))), target
