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
from ticketfind.limits import MOST_HEADER, MOST_TENSORS, short


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, *, root: Path | None = None
) -> None:
    """Write a safetensors file. Raises TicketfindError where that fails, and leaves nothing half written.

    root: the folder that must be there, as `files.whole` has it.
    """
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu()
        place = value.untyped_storage().data_ptr()
        if not value.is_contiguous() or place in storages:  # the format has neither strides nor shared tensors
            value = value.clone(memory_format=torch.contiguous_format)
        storages.add(place)
        ready[name] = value
    with files.whole(path, root) as temporary:
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
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, value in tensors.items():
            if value.dtype == torch.bool and value.numel() and int(value.view(torch.uint8).max()) > 1:
                raise ValueError(f"{short(name)} has other bytes than 0 and 1 where it says true or false")
        return tensors, dict(file.metadata() or {})


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Any]:
    try:
        if not path.is_file():
            raise TicketfindError(f"{what} {path}: no such file")
        _check_header(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            count = len(file.keys())
            if count > MOST_TENSORS:
                raise ValueError(f"it holds {count:,} tensors, of which {MOST_TENSORS:,} would be read")
            yield file
    except TicketfindError:
        raise
    except Exception as error:  # safetensors and torch raise whatever damaged bytes lead them to
        raise TicketfindError(
            f"{what} {path}: expected a safetensors file; reading it failed: {short(str(error))}"
        ) from error


def _check_header(path: Path) -> None:
    """Raise ValueError for a header that would take much memory to read. safetensors checks the rest."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length <= path.stat().st_size - 8 and length > MOST_HEADER:
            raise ValueError(f"its header has {length:,} bytes, of which {MOST_HEADER:,} would be read")
