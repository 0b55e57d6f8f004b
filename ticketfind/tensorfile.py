"""Tensors in safetensors files, whole or absent."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ticketfind import TicketfindError, files


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises TicketfindError where that fails, and leaves nothing half written."""
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu()
        place = value.untyped_storage().data_ptr()
        if not value.is_contiguous() or place in storages:  # the format has neither strides nor shared tensors
            value = value.clone(memory_format=torch.contiguous_format)
        storages.add(place)
        ready[name] = value
    with files.whole(path) as temporary:
        try:
            save_file(ready, temporary, metadata)
        except SafetensorError as error:
            raise TicketfindError(f"{path}: cannot write: {error}") from error


def read_metadata(path: Path, what: str) -> dict[str, str]:
    """As `read_tensors`, without the tensors."""
    with _opened(path, what) as file:
        return dict(file.metadata() or {})


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file; `what` it is ("ticket") is for messages.

    Raises TicketfindError where it is missing or damaged.
    """
    with _opened(path, what) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Any]:
    if not path.is_file():
        raise TicketfindError(f"{what} {path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError, ValueError) as error:
        raise TicketfindError(f"{what} {path}: expected a safetensors file; reading it failed: {error}") from error
