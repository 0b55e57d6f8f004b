"""Arrays and files of arrays -> tensors: .npz, .safetensors, IDX (the MNIST format).

Inputs [n, ...] are float32 (images [n, channels, height, width] in 0..1) or int64 (tokens); targets [n] int64 for
classes, else whatever the loss takes.
"""

import gzip
import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ticketfind import TicketfindError, limits
from ticketfind.archives import CHUNK, open_zip
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
        return found.contiguous().float().div_(scale)  # bytes are moved, and four times as many only once
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
            f" found no {', '.join(missing)}, but {limits.short(', '.join(arrays)) or 'nothing'}"
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
    """The arrays in a .npz file; nothing in it is unpickled.

    Raises TicketfindError where it is damaged, or holds more than `limits.inflated` allows.
    """
    if not zipfile.is_zipfile(path):
        raise TicketfindError(
            f"{path}: expected a .npz file, found no zip archive (empty, truncated or another format)"
        )
    try:
        with open_zip(path) as archive:
            members = archive.infolist()
            if len(members) > 1000:
                raise ValueError(f"it has {len(members):,} members")
            said, most = sum(member.file_size for member in members), limits.inflated(path.stat().st_size)
            if said > most:
                raise ValueError(f"it says that it holds {said:,} bytes, of which {most:,} would be read")
            return {member.filename.removesuffix(".npy"): _read_npy(archive, member) for member in members}
    except Exception as error:  # zipfile and numpy raise whatever damaged bytes lead them to
        raise TicketfindError(
            f"{path}: expected a .npz file of plain arrays; reading it failed: {one_line(error)}"
        ) from error


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    """The array in a member. Raises ValueError unless it is as large as its header says, and plain numbers."""
    from numpy.lib import format as npy

    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is compressed as numpy does not do")
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{member.filename}: expected version 1.0 or 2.0, found {version}")
        length = file.read(2 if version == (1, 0) else 4)
        header = file.read(min(int.from_bytes(length, "little"), 10_000))
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, is_fortran, dtype = read_header(io.BytesIO(length + header))
        count = limits.elements(shape)
        if dtype.hasobject or not dtype.itemsize:
            raise ValueError(
                f"{member.filename}: Object arrays cannot be read, as they would be unpickled; found {dtype}"
            )
        if count is None or count * dtype.itemsize != member.file_size - file.tell():
            raise ValueError(f"{member.filename}: expected the array {shape} of {dtype} that its header says")
        body = _read_whole(file, count * dtype.itemsize, f"{member.filename}: expected the array {shape} of {dtype}")
    return _as_array(body, dtype, shape, is_fortran)


def _opened(path: Path, is_packed: bool) -> Any:
    return gzip.open(path) if is_packed else path.open("rb")


def _as_array(body: bytearray, dtype: Any, shape: tuple[int, ...], is_fortran: bool) -> Any:
    import numpy

    return numpy.ndarray(shape, dtype, body, order="F" if is_fortran else "C")


def _read_whole(file: IO[bytes], size: int, expected: str) -> bytearray:
    """Exactly the next `size` bytes, after which the file ends; archives check their sums there.

    Raises TicketfindError, which says what was `expected`, for another length.
    """
    body = bytearray()  # which grows with what is there
    for start in range(0, size, CHUNK):
        part = file.read(min(CHUNK, size - start))
        if len(part) < min(CHUNK, size - start):
            raise TicketfindError(f"{expected}, found {start + len(part)}")
        body += part
    if more := file.read(CHUNK):
        raise TicketfindError(f"{expected}, found {size + len(more)}" + (" or more" if len(more) == CHUNK else ""))
    return body


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

    Raises TicketfindError where the file is not IDX, longer or shorter than its header says, or, gzipped, holds more
    than `limits.inflated` allows.
    """
    size, is_packed = path.stat().st_size, path.suffix == ".gz"
    try:
        with _opened(path, is_packed) as file:
            head = file.read(4)
            sides = file.read(4 * head[3]) if len(head) == 4 else b""
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_DTYPES or len(sides) < 4 * head[3]:
                found = head.hex(" ") or "(none)"
                raise TicketfindError(f"{path}: expected an IDX file, found bytes {found} at its start")
            shape, dtype = struct.unpack(f">{head[3]}I", sides), _IDX_DTYPES[head[2]]
            count = limits.elements(shape)
            expected = limits.inflated(size) + 1 if count is None else count * dtype.itemsize
            if expected > limits.inflated(size):
                raise ValueError(f"its header says {shape[:8]}, which so small a file should not hold")
            body = _read_whole(file, expected, f"{path}: expected {expected} bytes after the header {shape[:8]}")
    except TicketfindError:
        raise
    except Exception as error:  # gzip raises whatever damaged bytes lead it to
        raise TicketfindError(f"{path}: expected an IDX file; reading it failed: {one_line(error)}") from error
    if not count:
        return torch.zeros(shape, dtype=dtype)
    flat = torch.frombuffer(body, dtype=torch.uint8).view(-1, dtype.itemsize)
    if dtype.itemsize > 1:
        flat = flat.flip(1).contiguous()  # IDX is big-endian
    return flat.view(dtype).view(shape)
