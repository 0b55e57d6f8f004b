"""Arrays and files of arrays -> tensors: .npz, .safetensors, IDX (the MNIST format).

Inputs [n, ...] are float32 (images [n, channels, height, width] in 0..1) or int64 (tokens); targets [n] int64 for
classes, else whatever the loss takes.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ticketfind import TicketfindError
from ticketfind.batches import Split
from ticketfind.specs import one_line

# ------------------------------------------------------------------------------------------- to tensors


def to_inputs(raw: Any, what: str, scale: float = 255) -> Tensor:
    """float32 or int64; bytes are pixels and become 0..1; channels come first."""
    found = _rows(raw, what)
    if found.dtype == torch.uint8:
        if found.ndim == 3:
            found = found.unsqueeze(1)
        elif found.ndim == 4 and found.shape[3] in (1, 3, 4) and found.shape[1] not in (1, 3, 4):
            found = found.permute(0, 3, 1, 2)
        return (found.float() / scale).contiguous()
    if found.is_floating_point() or found.dtype == torch.bool:
        return found.float().contiguous()
    return found.long().contiguous()


def to_targets(raw: Any, what: str) -> Tensor:
    """int64 or float32; a column of labels becomes a row of them."""
    found = _rows(raw, what)
    if found.ndim == 2 and found.shape[1] == 1 and not found.is_floating_point():
        found = found[:, 0]
    return found.float() if found.is_floating_point() else found.long()


def to_tensor(raw: Any, what: str) -> Tensor:
    """Numbers of any kind; a PIL image gives its bytes. Raises TicketfindError for anything else."""
    try:
        if hasattr(raw, "getbands"):
            import numpy

            raw = numpy.array(raw)
        return torch.as_tensor(raw)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TicketfindError(f"{what}: expected numbers, found {type(raw).__name__}: {one_line(error)}") from error


def _rows(raw: Any, what: str) -> Tensor:
    found = to_tensor(raw, what)
    if found.is_complex():
        raise TicketfindError(f"{what}: expected real numbers, found {found.dtype}")
    if found.ndim == 0:
        raise TicketfindError(f"{what}: expected an array with one row per example, found a single number")
    return found


# ---------------------------------------------------------------------------------- arrays with fixed names


def from_arrays(spec: str, arrays: Mapping[str, Any], scale: float = 255) -> dict[str, Split]:
    """The splits in x_train, y_train, x_test, y_test and, if they are there, x_val, y_val."""
    missing = [f"{axis}_{part}" for part in ("train", "test") for axis in "xy" if f"{axis}_{part}" not in arrays]
    if ("x_val" in arrays) != ("y_val" in arrays):
        missing.append("y_val" if "x_val" in arrays else "x_val")
    if missing:
        raise TicketfindError(
            f"data {spec}: expected x_train, y_train, x_test, y_test (and x_val, y_val together or neither);"
            f" found no {', '.join(missing)}, but {', '.join(arrays) or 'nothing'}"
        )
    kinds = {key: _kind(arrays[key]) for key in ("x_train", "x_val", "x_test") if key in arrays}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{key} {kind}" for key, kind in kinds.items())
        raise TicketfindError(f"data {spec}: expected inputs of one kind in all splits, found {found}")
    parts = {"train": "train", "test": "test"} | ({"validation": "val"} if "x_val" in arrays else {})
    return {
        part: Split(
            to_inputs(arrays[f"x_{key}"], f"data {spec}: x_{key}", scale),
            to_targets(arrays[f"y_{key}"], f"data {spec}: y_{key}"),
        )
        for part, key in parts.items()
    }


def _kind(raw: Any) -> str:
    """What `to_inputs` makes of an array's type: pixels are scaled, numbers are not."""
    name = str(getattr(raw, "dtype", "")).removeprefix("torch.")
    return "bytes" if name == "uint8" else "numbers" if name.startswith(("float", "bfloat", "bool")) else name


def read_npz(path: Path) -> dict[str, Any]:
    """The arrays in a .npz file; nothing in it is unpickled. Raises TicketfindError where it is damaged."""
    import zipfile

    import numpy

    if not zipfile.is_zipfile(path):
        raise TicketfindError(
            f"{path}: expected a .npz file, found no zip archive (empty, truncated or another format)"
        )
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise TicketfindError(f"{path}: expected a .npz file of plain arrays; reading it failed: {error}") from error


# ------------------------------------------------------------------------------- IDX (the MNIST format)


_IDX_DTYPES = {
    0x08: torch.uint8,
    0x09: torch.int8,
    0x0B: torch.int16,
    0x0C: torch.int32,
    0x0D: torch.float32,
    0x0E: torch.float64,
}


def from_idx_folder(folder: Path) -> dict[str, Split]:
    """The splits in a folder of IDX files, called as MNIST's are."""
    files = sorted(path for path in folder.iterdir() if "idx" in path.name)
    splits = {}
    for part, words in {"train": ("train",), "test": ("t10k", "test")}.items():
        found = {}
        for kind in ("images", "labels"):
            matching = [p for p in files if kind in p.name and any(word in p.name for word in words)]
            if not matching:
                raise TicketfindError(
                    f"data {folder}: expected IDX files as MNIST has them ({part}-images-idx3-ubyte, .gz or not);"
                    f" found no {kind} for {part}"
                )
            found[kind] = read_idx(matching[0])
        splits[part] = Split(to_inputs(found["images"], str(folder)), to_targets(found["labels"], str(folder)))
    return splits


def read_idx(path: Path) -> Tensor:
    """The array in an IDX file (http://yann.lecun.com/exdb/mnist), plain or gzipped.

    Raises TicketfindError where the file is not IDX, or longer or shorter than its header says.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise TicketfindError(f"{path}: expected an IDX file; reading it failed: {error}") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_DTYPES or len(raw) < 4 + 4 * raw[3]:
        raise TicketfindError(f"{path}: expected an IDX file, found bytes {raw[:4].hex(' ') or '(none)'} at its start")
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    dtype = _IDX_DTYPES[raw[2]]
    body = bytearray(raw[4 + 4 * raw[3] :])
    expected = math.prod(shape) * dtype.itemsize
    if len(body) != expected:
        raise TicketfindError(f"{path}: expected {expected} bytes after the header {shape}, found {len(body)}")
    if not expected:
        return torch.zeros(shape, dtype=dtype)
    flat = torch.frombuffer(body, dtype=torch.uint8).view(-1, dtype.itemsize)
    if dtype.itemsize > 1:
        flat = flat.flip(1).contiguous()  # IDX is big-endian
    return flat.view(dtype).view(shape)
