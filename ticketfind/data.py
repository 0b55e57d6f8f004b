"""Specs of data -> training, validation and test examples, checked, and resident or read as they are needed."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from ticketfind import TicketfindError, formats, images
from ticketfind.batches import Batch, Data, Examples, Flow, Split, Stream, ToBatch, map_inputs, seeded, tensors_of
from ticketfind.examples import as_batch, collate, collate_by
from ticketfind.outputs import IGNORED, Inputs
from ticketfind.specs import is_code, load_object, one_line, suggest
from ticketfind.tensorfile import read_tensors


def load(
    spec: str,
    args: Mapping[str, Any],
    *,
    validation: float | int | None,
    seed: int,
    stratify: bool = False,
    augment: Sequence[str] = (),
    resident: bool | None = None,
    workers: int = 0,
    memory: float = math.inf,
) -> Data:
    """The data that `spec` names.

    validation: examples (or share) of the training set held out, drawn with `seed`, of every class alike with
    `stratify`; None: the data's own validation split, else a tenth. resident: whether the examples of a data set are
    read into memory; None: unless they take more than `memory` bytes, or differ from one reading to the next.
    Raises TicketfindError for unknown, missing, damaged or inconsistent data.
    """
    splits = _settled(_read(spec, args), f"data {spec}", resident, workers, memory)
    for part, examples in splits.items():
        _check(f"data {spec}: {part}", examples, splits["train"])
    if augment:
        _check_images(spec, splits["train"])
    if "validation" in splits:
        found = len(splits["validation"])
        if validation is not None and validation != found:
            raise TicketfindError(
                f"data.validation: expected null or {found}, as {spec} has a validation split of its own,"
                f" found {validation}"
            )
        return Data(splits["train"], splits["validation"], splits["test"], augment)
    train = splits["train"]
    share = 0.1 if validation is None else validation
    held = round(share * len(train)) if isinstance(share, float) else share
    if not 0 < held < len(train):
        raise TicketfindError(
            f"data.validation: expected between 1 and {len(train) - 1} of the {len(train)} training examples of {spec},"
            f" found {validation if validation is not None else held}; --set data.validation=0.1 takes a share"
        )
    if not isinstance(train, (Split, Stream)):
        raise TicketfindError(
            f"data {spec}: expected a validation split of its own, (train, validation, test), as no examples can be"
            " held out of an iterable data set that is not read into memory"
        )
    rest, out = held_out(len(train), held, seed=seed, labels=_labels(spec, train) if stratify else None)
    return Data(_part(train, rest), _part(train, out), splits["test"], augment)


def resolved_args(spec: str, args: Mapping[str, Any], image_settings: Mapping[str, Any]) -> dict[str, Any]:
    """`args`, completed by how images are prepared for the model where `spec` names images."""
    if spec.startswith("timm:") or _is_image_folder(Path(spec).expanduser()):
        return {**image_settings, **args}
    return dict(args)


def held_out(examples: int, held: int, *, seed: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Places of those that stay and of the `held` that do not, both shuffled; int64 [examples - held], [held].

    labels: int64 [examples]; if given, each class gives its share, rounded so that the number is exact (largest
    remainders first).
    """
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    if labels is None:
        return order[held:], order[:held]
    classes, sizes = torch.unique(labels, return_counts=True)
    shares = sizes.double() * held / examples
    counts = shares.floor().long()
    largest = (shares - counts).argsort(descending=True, stable=True)
    counts[largest[: held - int(counts.sum())]] += 1
    shuffled = labels[order]
    out = torch.zeros(examples, dtype=torch.bool)
    for label, count in zip(classes, counts.tolist(), strict=True):
        out[(shuffled == label).nonzero()[:count, 0]] = True
    return order[~out], order[out]


def _part(examples: Split | Stream, places: Tensor) -> Split | Stream:
    return examples.part(places) if isinstance(examples, Stream) else Split(*examples.batch(places))


def _labels(spec: str, train: Split | Stream) -> Tensor:
    labels = train.targets if isinstance(train, Split) else train.labels
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        raise TicketfindError(
            f"data.stratify: expected one class label an example in {spec}, found none"
            + ("" if labels is not None else "; a data set that is not resident shows them as .targets")
        )
    return labels


# ------------------------------------------------------------------------------------------ reading specs


@dataclass(frozen=True)
class _Raw:
    """A data set as its maker gives it: examples, not yet read."""

    dataset: Any
    to_batch: ToBatch
    is_iterable: bool = False
    labels: Tensor | None = None


def _read(spec: str, args: Mapping[str, Any]) -> dict[str, Split | _Raw]:
    path = Path(spec).expanduser()
    if spec.startswith("timm:"):
        return _raw_images(spec, images.timm_datasets(spec.removeprefix("timm:"), args))
    if is_code(spec) and not path.exists():
        return _from_factory(spec, args)
    if _is_image_folder(path):
        return _raw_images(spec, images.folder(path, args))
    if args:
        raise TicketfindError(f"data.args: expected none for {spec!r}, found {', '.join(args)}")
    if spec == "digits":
        return {**formats.from_arrays(spec, formats.read_npz(Path(__file__).parent / "digits.npz"), scale=16)}
    if path.is_dir():
        return {**formats.from_idx_folder(path)}
    if path.suffix == ".npz" and path.is_file():
        return {**formats.from_arrays(spec, formats.read_npz(path))}
    if path.suffix == ".safetensors" and path.is_file():
        return {**formats.from_arrays(spec, read_tensors(path, "data")[0])}
    raise TicketfindError(
        f"data {spec!r}: expected digits, a folder of images (a folder for each class) or of IDX files, a .npz or"
        f" .safetensors file, timm:NAME, or module:factory; found no such file or folder{suggest(spec, ['digits'])}"
    )


def _is_image_folder(path: Path) -> bool:
    return path.is_dir() and any(child.is_dir() and not child.name.startswith(".") for child in path.iterdir())


def _raw_images(spec: str, datasets: Mapping[str, Any]) -> dict[str, Split | _Raw]:
    return {part: _from_dataset(dataset, f"data {spec}: {part}") for part, dataset in datasets.items()}


def _from_factory(spec: str, args: Mapping[str, Any]) -> dict[str, Split | _Raw]:
    factory = load_object(spec, "data")
    try:
        made = factory(**args) if callable(factory) else factory
    except Exception as error:
        raise TicketfindError(f"data {spec!r}: the factory failed: {one_line(error)}") from error
    if not isinstance(made, (tuple, list)) or len(made) not in (2, 3):
        raise TicketfindError(
            f"data {spec!r}: expected (train, test) or (train, validation, test), found {type(made).__name__}"
            + (f" of {len(made)}" if isinstance(made, (tuple, list)) else "")
        )
    names = ("train", "test") if len(made) == 2 else ("train", "validation", "test")
    return {name: _given(part, f"data {spec}: {name}") for name, part in zip(names, made, strict=True)}


def _given(part: Any, what: str) -> Split | _Raw:
    """A pair or dict of arrays is whole; anything else is a data set of examples."""
    if isinstance(part, (tuple, list)) and len(part) == 2 and all(hasattr(side, "shape") for side in part):
        return Split(*as_batch(part, what))
    if isinstance(part, Mapping):
        return Split(*as_batch(part, what))
    return _from_dataset(part, what)


def _from_dataset(dataset: Any, what: str) -> _Raw:
    to_batch: ToBatch = functools.partial(collate, what=what)
    if isinstance(dataset, DataLoader):  # its batches and their order are not used
        if dataset.collate_fn is not default_collate:
            to_batch = functools.partial(collate_by, collate_fn=dataset.collate_fn, what=what)
        dataset = dataset.dataset
    if isinstance(dataset, IterableDataset) or (hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")):
        return _Raw(dataset, to_batch, is_iterable=True)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TicketfindError(
            f"{what}: expected a pair or dict of tensors, or a Dataset (map-style or iterable) of (input, target) or"
            f" dict examples, found {type(dataset).__name__}"
        )
    if not len(dataset):
        raise TicketfindError(f"{what}: expected examples, found none")
    return _Raw(dataset, to_batch, labels=_known_labels(dataset))


def _known_labels(dataset: Any) -> Tensor | None:
    """Labels that a data set holds beside its examples, as torchvision's do."""
    if isinstance(dataset, Subset):
        labels = _known_labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    found = getattr(dataset, "targets", getattr(dataset, "labels", None))
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels.long() if labels.shape == (len(dataset),) and not labels.is_floating_point() else None


# ---------------------------------------------------------------------------------- resident or streamed


def _settled(
    parts: Mapping[str, Split | _Raw], what: str, resident: bool | None, workers: int, memory: float
) -> dict[str, Examples]:
    raw = {part: found for part, found in parts.items() if isinstance(found, _Raw)}
    if not raw:
        if resident is False:
            raise TicketfindError(f"data.resident: expected null or true, as {what} is tensors already, found false")
        return {part: found for part, found in parts.items() if isinstance(found, Split)}
    lists = {part: _listed(found, what, resident, memory) for part, found in raw.items() if found.is_iterable}
    if resident is None:
        fits = all(examples is not None for examples in lists.values()) and _fits(raw, memory)
        resident = fits and not any(_is_random(found) for found in raw.values() if not found.is_iterable)
    settled: dict[str, Examples] = {}
    for part, found in parts.items():
        if isinstance(found, Split):
            settled[part] = found
        elif resident:
            settled[part] = Split(*found.to_batch(_all(found, lists.get(part), f"{what}: {part}")))
        elif found.is_iterable:
            settled[part] = _flow(found, lists[part], f"{what}: {part}")
        else:
            indices = torch.arange(len(found.dataset))
            settled[part] = Stream(found.dataset, found.to_batch, indices, workers, found.labels)
    return settled


def _all(raw: _Raw, examples: list[Any] | None, what: str) -> list[Any]:
    return examples if examples is not None else [_example(raw, index, what) for index in range(len(raw.dataset))]


def _example(raw: _Raw, index: int, what: str) -> Any:
    try:
        return raw.dataset[index]
    except TicketfindError:
        raise
    except Exception as error:
        raise TicketfindError(f"{what}: example {index} cannot be read: {one_line(error)}") from error


def _listed(raw: _Raw, what: str, resident: bool | None, memory: float) -> list[Any] | None:
    """The examples of an iterable data set; None where they are not to be, or do not fit, in memory."""
    if resident is False:
        return None
    examples: list[Any] = []
    with seeded(0):
        for example in _iterated(raw, what):
            if not examples:
                each = _size(raw.to_batch([example]))
            examples.append(example)
            if resident is None and len(examples) * each > memory:
                return None
    if not examples:
        raise TicketfindError(f"{what}: expected examples, found none")
    return examples


def _iterated(raw: _Raw, what: str) -> Iterator[Any]:
    try:
        yield from raw.dataset
    except TicketfindError:
        raise
    except Exception as error:
        raise TicketfindError(f"{what}: the data set cannot be read: {one_line(error)}") from error


def _flow(raw: _Raw, examples: list[Any] | None, what: str) -> Flow:
    """Its length is counted where the data set does not tell it."""
    try:
        length = len(raw.dataset)
    except TypeError:
        length = len(examples) if examples is not None else sum(1 for _ in _iterated(raw, what))
    if not length:
        raise TicketfindError(f"{what}: expected examples, found none")
    return Flow(raw.dataset, raw.to_batch, length)


def _size(batch: Batch) -> int:
    return sum(t.numel() * t.element_size() for t in (*tensors_of(batch[0]), batch[1]))


def _fits(raw: Mapping[str, _Raw], memory: float) -> bool:
    maps = {part: found for part, found in raw.items() if not found.is_iterable}
    return sum(len(r.dataset) * _size(r.to_batch([_example(r, 0, part)])) for part, r in maps.items()) <= memory


def _is_random(raw: _Raw) -> bool:
    """True if reading an example again gives another one: in memory it would be drawn once and for all."""

    def read(seed: int) -> Batch:
        with seeded(seed):
            return raw.to_batch([_example(raw, index, "data") for index in range(min(16, len(raw.dataset)))])

    (inputs, targets), (others, other_targets) = read(0), read(1)
    pairs = [*zip(tensors_of(inputs), tensors_of(others), strict=True), (targets, other_targets)]
    return not all(torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------------------------------------ checks


def _check(what: str, examples: Examples, train: Examples) -> None:
    inputs, targets = (examples.inputs, examples.targets) if isinstance(examples, Split) else next(examples.chunks(2))
    for found in tensors_of(inputs):
        if len(found) != len(targets):
            raise TicketfindError(f"{what}: expected as many inputs as targets, found {len(found)} and {len(targets)}")
    if not len(examples):
        raise TicketfindError(f"{what}: expected examples, found none")
    first = train.inputs if isinstance(train, Split) else next(train.chunks(2))[0]
    if _shape(inputs) != _shape(first):
        raise TicketfindError(f"{what}: expected inputs {_shape(first)} as in train, found them {_shape(inputs)}")
    map_inputs(lambda t: _check_finite(what, t), inputs)
    if not targets.is_floating_point() and bool(((targets < 0) & (targets != IGNORED)).any()):
        lowest = int(targets[targets != IGNORED].min())
        raise TicketfindError(f"{what}: expected labels from 0 (or {IGNORED} for what does not count), found {lowest}")
    if not targets.is_floating_point() and not bool((targets != IGNORED).any()):
        raise TicketfindError(f"{what}: expected labels, found nothing but {IGNORED}, which does not count")


def _shape(inputs: Inputs) -> str:
    """Of one input, for a message; of a dict its names, as lengths of texts may differ."""
    return f"of shape {tuple(inputs.shape[1:])}" if isinstance(inputs, Tensor) else f"called {', '.join(inputs)}"


def _check_finite(what: str, inputs: Tensor) -> Tensor:
    if inputs.is_floating_point():
        bad = ~torch.isfinite(inputs).flatten(1).all(1) if inputs.ndim > 1 else ~torch.isfinite(inputs)
        if bool(bad.any()):
            raise TicketfindError(
                f"{what}: expected finite inputs, found NaN or infinity in example {int(bad.nonzero()[0])}"
            )
    return inputs


def _check_images(spec: str, train: Examples) -> None:
    inputs, _ = next(train.chunks(1))
    if not isinstance(inputs, Tensor) or inputs.ndim != 4:
        raise TicketfindError(
            f"data.augment: expected images [channels, height, width] in {spec}, found inputs {_shape(inputs)}"
        )
