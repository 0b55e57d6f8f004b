"""Examples, as a data set gives them, to batches. An example is (input, target) or a dict of its entries."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ticketfind import TicketfindError, formats
from ticketfind.batches import Batch
from ticketfind.specs import one_line

TARGET_KEYS = ("labels", "label", "targets", "target", "y")
"""Entries of a dict example that may hold its target; the first that is there does."""


def collate(examples: list[Any], what: str) -> Batch:
    """Examples, each (input, target) or a dict of tensors of one shape, as one batch. Errors name the example."""
    if all(isinstance(example, Mapping) for example in examples):
        names = [name for name, value in examples[0].items() if not isinstance(value, (str, bytes))]
        columns = {name: _column([_entry(e, name, what) for e in examples], f"{what}: {name}") for name in names}
        return as_batch(columns, what)
    for index, example in enumerate(examples):
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise TicketfindError(
                f"{what}: expected (input, target) or dict examples, found {type(example).__name__} at {index}"
            )
    inputs = _column([example[0] for example in examples], f"{what}: input")
    targets = _column([example[1] for example in examples], f"{what}: target")
    return as_batch((inputs, targets), what)


def _entry(example: Any, name: str, what: str) -> Any:
    if name not in example:
        raise TicketfindError(f"{what}: expected dict examples with the same entries, found one without {name}")
    return example[name]


def _column(values: list[Any], what: str) -> Tensor:
    tensors = [formats.to_tensor(value, f"{what} {index}") for index, value in enumerate(values)]
    for index, found in enumerate(tensors):
        if found.shape != tensors[0].shape:
            raise TicketfindError(
                f"{what}: expected examples of one shape, found {tuple(found.shape)} at {index}, and"
                f" {tuple(tensors[0].shape)} before; a DataLoader's collate_fn may pad them"
            )
    return torch.stack(tensors)


def collate_by(examples: list[Any], collate_fn: Callable[[list[Any]], Any], what: str) -> Batch:
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
        is_flag = getattr(value, "dtype", None) == torch.bool
        inputs[str(name)] = value if is_flag else formats.to_inputs(value, f"{what}: {name}")
    target = next((key for key in TARGET_KEYS if key in inputs), None)
    if target is None:
        raise TicketfindError(
            f"{what}: expected an entry {', '.join(TARGET_KEYS[:-1])} or {TARGET_KEYS[-1]} for the target,"
            f" found {', '.join(inputs) or 'nothing'}"
        )
    inputs[target] = formats.to_targets(raw[target], f"{what}: {target}")
    return inputs, inputs[target]
