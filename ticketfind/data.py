"""Specs of data -> training, validation and test examples, checked, and resident or read as they are needed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ticketfind import TicketfindError, formats, images
from ticketfind.batches import Batch, Data, Examples, Split, map_inputs, seeded, tensors_of
from ticketfind.examples import Source, as_batch, labels_beside, source_of
from ticketfind.outputs import IGNORED, Inputs
from ticketfind.specs import is_code, load_object, one_line, suggest
from ticketfind.streams import Flow, Stream
from ticketfind.tensorfile import read_tensors

DIGITS = "digits"
"""The spec of the embedded handwritten digits."""


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
    read into memory; None: unless they take more than `memory` bytes, or those of a map-style data set differ from
    one reading to the next (the first 16 are read twice). workers: processes that read what is not resident.
    What a factory or a data set draws at random here follows from a fixed seed.
    Raises TicketfindError for unknown, missing, damaged or inconsistent data.
    """
    with seeded(0):
        splits = _settled(_read(spec, args), spec, resident, workers, memory)
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
        if stratify:
            raise TicketfindError(
                f"data.stratify: expected false, as {spec} has a validation split of its own, found true"
            )
        return Data(splits["train"], splits["validation"], splits["test"], augment)
    train = splits["train"]
    share = 0.1 if validation is None else validation
    held = round(share * len(train)) if isinstance(share, float) else share
    held = max(1, held) if validation is None else held
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


def takes_args(spec: str) -> bool:
    """True if `spec` names data that data.args can say something about: a factory's, or images."""
    path = Path(spec).expanduser()
    return spec.startswith("timm:") or _is_image_folder(spec) or (is_code(spec) and not path.exists())


def resolved_args(spec: str, args: Mapping[str, Any], image_settings: Mapping[str, Any]) -> dict[str, Any]:
    """`args`, completed by how images are prepared for the model where `spec` names images."""
    if not (spec.startswith("timm:") or _is_image_folder(spec)):
        return dict(args)
    if args.get("channels", image_settings.get("channels")) != image_settings.get("channels"):
        image_settings = {key: value for key, value in image_settings.items() if key not in ("mean", "std")}
    return {**image_settings, **args}


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


def _read(spec: str, args: Mapping[str, Any]) -> dict[str, Split | Source]:
    path = Path(spec).expanduser()
    if spec.startswith("timm:"):
        return _sources(spec, images.timm_datasets(spec.removeprefix("timm:"), args))
    if is_code(spec) and not path.exists():
        return _from_factory(spec, args)
    if _is_image_folder(spec):
        return _sources(spec, images.folder(path, args))
    if args:
        raise TicketfindError(f"data.args: expected none for {spec!r}, found {', '.join(args)}")
    if spec == DIGITS:
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


def _is_image_folder(spec: str) -> bool:
    path = Path(spec).expanduser()
    if spec == DIGITS:  # the embedded data, whatever is called so here; ./digits is a folder
        return False
    return path.is_dir() and any(child.is_dir() and not child.name.startswith(".") for child in path.iterdir())


def _sources(spec: str, datasets: Mapping[str, Any]) -> dict[str, Split | Source]:
    return {part: source_of(dataset, f"data {spec}: {part}") for part, dataset in datasets.items()}


def _from_factory(spec: str, args: Mapping[str, Any]) -> dict[str, Split | Source]:
    factory = load_object(spec, "data")
    if args and not callable(factory):
        raise TicketfindError(f"data.args: expected none, as {spec} is no function, found {', '.join(args)}")
    try:
        with seeded(0):  # again: importing it may have drawn something
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


def _given(part: Any, what: str) -> Split | Source:
    """A pair or dict of arrays is whole; anything else is a data set of examples."""
    if (
        isinstance(part, (tuple, list))
        and len(part) == 2
        and isinstance(part[0], Mapping)
        and not isinstance(part[1], Mapping)
    ):
        raise TicketfindError(f"{what}: expected the target inside of the dict, as an entry labels, found it beside it")
    is_pair = isinstance(part, (tuple, list)) and len(part) == 2 and all(hasattr(side, "shape") for side in part)
    if is_pair or isinstance(part, Mapping):
        return Split(*as_batch(part, what))
    return source_of(part, what)


# ---------------------------------------------------------------------------------- resident or streamed


def _settled(
    parts: Mapping[str, Split | Source], spec: str, resident: bool | None, workers: int, memory: float
) -> dict[str, Examples]:
    sources = [part for part in parts.values() if isinstance(part, Source)]
    if resident is False and not sources:
        raise TicketfindError(f"data.resident: expected null or true, as data {spec} is tensors already, found false")
    probes = {source.what: _probe(source, workers) for source in sources if not source.is_iterable}
    room = math.inf if resident else memory - sum(probe.bytes for probe in probes.values())
    fits = resident is not False and room >= 0 and (resident or not any(probe.is_random for probe in probes.values()))
    lists = _listed([source for source in sources if source.is_iterable], room) if fits else None

    def settled(part: Split | Source) -> Examples:
        if isinstance(part, Split):
            return part
        if lists is not None:
            return _in_memory(part, lists.get(part.what))
        return _flow(part) if part.is_iterable else probes[part.what].stream

    return {name: settled(part) for name, part in parts.items()}


@dataclass(frozen=True)
class _Probe:
    """What the first examples of a map-style data set tell."""

    stream: Stream
    bytes: float
    """That all examples take."""
    is_random: bool
    """Reading an example again gives another one: in memory it would be drawn once and for all."""


def _probe(source: Source, workers: int) -> _Probe:
    count = len(source.dataset)
    stream = Stream(source, torch.arange(count), workers)
    first, second = stream.first_twice(16)
    labels, targets = labels_beside(source.dataset), first[1]
    if labels is not None and torch.equal(labels[: len(targets)], targets):  # else they are something else
        stream = dataclasses.replace(stream, labels=labels)
    pairs = zip((*tensors_of(first[0]), targets), (*tensors_of(second[0]), second[1]), strict=True)
    return _Probe(stream, count * _size(first) / len(targets), not all(_same(a, b) for a, b in pairs))


def _size(batch: Batch) -> int:
    return sum(t.numel() * t.element_size() for t in (*tensors_of(batch[0]), batch[1]))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # NaN is no more random than 0


def _listed(sources: Sequence[Source], room: float) -> dict[str, list[Any]] | None:
    """The examples of iterable data sets, by what they are; None where they take more than `room` bytes."""
    lists: dict[str, list[Any]] = {}
    for source in sources:
        examples, each = lists.setdefault(source.what, []), 0
        for example in source.one_pass(0):
            each = each or _size(source.batch([example], [0]))
            examples.append(example)
            room -= each
            if room < 0:
                return None
    return lists


def _in_memory(source: Source, examples: list[Any] | None) -> Split:
    if examples is None:
        return Split(*source.read(range(len(source.dataset))))
    return Split(*source.batch(examples, range(len(examples))))


def _flow(source: Source) -> Flow:
    if hasattr(source.dataset, "__next__"):
        raise TicketfindError(
            f"{source.what}: expected a data set that can be read more than once, as it is not read into memory,"
            f" found a {type(source.dataset).__name__}; an IterableDataset can"
        )
    return Flow(source, _length(source))


def _length(source: Source) -> int:
    """What an iterable data set says, or else is counted."""
    try:
        said = len(source.dataset)
    except TypeError:
        said = 0
    return said or sum(1 for _ in source.one_pass(0))


# ------------------------------------------------------------------------------------------------ checks


def _check(what: str, examples: Examples, train: Examples) -> None:
    inputs, targets = _seen(examples)
    for found in tensors_of(inputs):
        if len(found) != len(targets):
            raise TicketfindError(f"{what}: expected as many inputs as targets, found {len(found)} and {len(targets)}")
    if not len(examples):
        raise TicketfindError(f"{what}: expected examples, found none")
    expected = _shape(_seen(train)[0])
    if _shape(inputs) != expected:
        raise TicketfindError(f"{what}: expected inputs {expected} as in train, found them {_shape(inputs)}")
    map_inputs(lambda t: _check_finite(what, t), inputs)
    if targets.is_floating_point():
        return
    labels = targets[targets != IGNORED]
    if bool((labels < 0).any()):
        lowest = int(labels.min())
        raise TicketfindError(f"{what}: expected labels from 0 (or {IGNORED} for what does not count), found {lowest}")
    if isinstance(examples, Split) and not len(labels):
        raise TicketfindError(f"{what}: expected labels, found nothing but {IGNORED}, which does not count")


def _seen(examples: Examples) -> Batch:
    """All examples in memory; of those that are not, two."""
    return (examples.inputs, examples.targets) if isinstance(examples, Split) else examples.first(2)


def _shape(inputs: Inputs) -> str:
    """Of one input, for a message; of a dict its names, as lengths of texts may differ."""
    return f"of shape {tuple(inputs.shape[1:])}" if isinstance(inputs, Tensor) else f"called {', '.join(inputs)}"


def _check_finite(what: str, inputs: Tensor) -> Tensor:
    if inputs.is_floating_point() and not bool(inputs.sum().isfinite()):  # the sum of many may overflow, too
        bad = ~torch.isfinite(inputs).flatten(1).all(1) if inputs.ndim > 1 else ~torch.isfinite(inputs)
        if bool(bad.any()):
            raise TicketfindError(
                f"{what}: expected finite inputs, found NaN or infinity in example {int(bad.nonzero()[0])}"
            )
    return inputs


def _check_images(spec: str, train: Examples) -> None:
    inputs, targets = train.first(1)
    if not isinstance(inputs, Tensor) or inputs.ndim != 4:
        raise TicketfindError(
            f"data.augment: expected images [channels, height, width] in {spec}, found inputs {_shape(inputs)}"
        )
    if targets.ndim > 2:
        raise TicketfindError(
            f"data.augment: expected one target an image in {spec}, as targets do not move with it,"
            f" found targets {_shape(targets)}"
        )
