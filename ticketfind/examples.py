"""Data sets of examples, as their makers give them, to batches. An example is (input, target) or a dict of entries."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from ticketfind import TicketfindError, formats
from ticketfind.batches import Batch
from ticketfind.specs import one_line

TARGET_KEYS = ("labels", "label", "targets", "target", "y")
"""Entries of a dict example that may hold its target; the first that is there does."""


@dataclass(frozen=True)
class Source:
    """A data set, and how its examples become batches. Errors name the example by its place in the data set."""

    dataset: Any
    """Index -> example, or an iterable of examples."""
    what: str
    """For messages: "data SPEC: train"."""
    is_iterable: bool = False
    collate_fn: Callable[[list[Any]], Any] | None = None
    """A DataLoader's own."""
    names: tuple[str, ...] | None = None
    """Of a dict's entries those that are inputs; None: all."""

    def read(self, places: Sequence[int]) -> Batch:
        """The examples at these places of a map-style data set."""
        return self.batch([self._example(place) for place in places], places)

    def _example(self, place: int) -> Any:
        try:
            return self.dataset[place]
        except TicketfindError:
            raise
        except Exception as error:
            raise TicketfindError(f"{self.what}: example {place} cannot be read: {one_line(error)}") from error

    def one_pass(self, epoch: int) -> Iterator[Any]:
        """Every example of an iterable data set, of which there must be some."""
        count = 0
        try:
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            for example in self.dataset:
                yield example
                count += 1
        except TicketfindError:
            raise
        except Exception as error:
            raise TicketfindError(f"{self.what}: example {count} cannot be read: {one_line(error)}") from error
        if not count:
            again = " when it is read again" if epoch else ""
            raise TicketfindError(f"{self.what}: expected examples, found none{again}")

    def batch(self, examples: list[Any], places: Sequence[int]) -> Batch:
        """These examples, which are at `places`, as one batch."""
        if self.collate_fn is None:
            inputs, targets = collate(examples, places, self.what)
        else:
            inputs, targets = _collate_by(self.collate_fn, examples, self.what)
        if self.names is not None and isinstance(inputs, dict):
            inputs = {name: inputs[name] for name in self.names}
        return inputs, targets

    def select(self, names: Sequence[str]) -> "Source":
        """This data set with these of its named inputs only."""
        return replace(self, names=tuple(names))


def source_of(dataset: Any, what: str) -> Source:
    """Where the examples of a map-style or iterable data set, or of a DataLoader's, come from."""
    collate_fn = None
    if isinstance(dataset, DataLoader):  # its batches and their order are not used
        if dataset.batch_sampler is None:
            raise TicketfindError(
                f"{what}: expected a DataLoader that makes batches of examples, found one with batch_size=None;"
                " give a data set of single examples"
            )
        collate_fn = None if dataset.collate_fn is default_collate else dataset.collate_fn
        dataset = dataset.dataset
    if isinstance(dataset, IterableDataset) or (hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")):
        return Source(dataset, what, is_iterable=True, collate_fn=collate_fn)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TicketfindError(
            f"{what}: expected a pair or dict of tensors, or a Dataset (map-style or iterable) of (input, target) or"
            f" dict examples, found {type(dataset).__name__}"
        )
    if not len(dataset):
        raise TicketfindError(f"{what}: expected examples, found none")
    return Source(dataset, what, collate_fn=collate_fn)


def labels_beside(dataset: Any) -> Tensor | None:
    """Labels int64 [n] that a map-style data set holds beside its examples, as torchvision's do; None: none found."""
    if isinstance(dataset, Subset):
        labels = labels_beside(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    columns = getattr(dataset, "column_names", None) or ()  # as the data sets of Hugging Face have them
    key = next((key for key in TARGET_KEYS if key in columns), None)
    found = getattr(dataset, "targets", getattr(dataset, "labels", None)) if key is None else dataset[key]
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels.long() if labels.shape == (len(dataset),) and not labels.is_floating_point() else None


# ------------------------------------------------------------------------------------------------ batches


def collate(examples: Sequence[Any], places: Sequence[int], what: str) -> Batch:
    """Examples, each (input, target) or a dict of tensors of one shape, as one batch. Errors name the place."""

    def column(values: list[Any], name: str) -> Tensor:
        return _column(values, places, f"{what}: {name}")

    if all(isinstance(example, Mapping) for example in examples):
        names = [name for name, value in examples[0].items() if not isinstance(value, (str, bytes))]
        rows = list(zip(examples, places, strict=True))
        return as_batch({name: column([_entry(e, name, at, what) for e, at in rows], name) for name in names}, what)
    for example, place in zip(examples, places, strict=True):
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise TicketfindError(
                f"{what}: expected (input, target) or dict examples, found {type(example).__name__}"
                f"{f' of {len(example)}' if isinstance(example, (tuple, list)) else ''} at {place}"
            )
    inputs, targets = zip(*examples, strict=True)
    return as_batch((column(list(inputs), "input"), column(list(targets), "target")), what)


def _entry(example: Any, name: str, place: int, what: str) -> Any:
    if name not in example:
        raise TicketfindError(
            f"{what}: expected dict examples with the same entries, found one without {name}: {place}"
        )
    return example[name]


def _column(values: list[Any], places: Sequence[int], what: str) -> Tensor:
    tensors = [formats.to_tensor(value, f"{what} {place}") for value, place in zip(values, places, strict=True)]
    for found, place in zip(tensors, places, strict=True):
        if found.shape != tensors[0].shape:
            raise TicketfindError(
                f"{what}: expected examples of one shape, found {tuple(found.shape)} at {place}, and"
                f" {tuple(tensors[0].shape)} at {places[0]}; a DataLoader's collate_fn may pad them"
            )
    return torch.stack(tensors)


def _collate_by(collate_fn: Callable[[list[Any]], Any], examples: list[Any], what: str) -> Batch:
    """Examples as the batch that a DataLoader's own function makes of them."""
    try:
        batch = collate_fn(examples)
    except Exception as error:
        raise TicketfindError(f"{what}: the collate function failed: {one_line(error)}") from error
    return as_batch(batch, what)


def as_batch(raw: Any, what: str) -> Batch:
    """A pair or dict of arrays with a row for each example -> (inputs, targets)."""
    if isinstance(raw, (tuple, list)) and len(raw) == 2:
        return formats.to_inputs(raw[0], what), formats.to_targets(raw[1], what)
    if not isinstance(raw, Mapping):
        raise TicketfindError(f"{what}: expected batches (inputs, targets) or dicts, found {type(raw).__name__}")
    inputs: dict[str, Tensor] = {}
    for name, value in raw.items():
        inputs[str(name)] = _named_input(value, f"{what}: {name}")
    target = next((key for key in TARGET_KEYS if key in inputs), None)
    if target is None:
        raise TicketfindError(
            f"{what}: expected an entry {', '.join(TARGET_KEYS[:-1])} or {TARGET_KEYS[-1]} for the target,"
            f" found {', '.join(inputs) or 'nothing'}"
        )
    inputs[target] = formats.to_targets(raw[target], f"{what}: {target}")
    return inputs, inputs[target]


def _named_input(value: Any, what: str) -> Tensor:
    """As `formats.to_inputs`, but flags stay flags, and bytes are pixels in images only: a mask may be of bytes."""
    found = formats.to_tensor(value, what)
    if found.dtype == torch.bool:
        return found
    return formats.to_inputs(found.long() if found.dtype == torch.uint8 and found.ndim < 3 else found, what)
