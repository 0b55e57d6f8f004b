"""Specs of data -> tensors. The only file that knows data-set formats.

Legend: n examples; inputs [n, ...] float32 (images [n, channels, height, width] in 0..1) or int64 (tokens);
targets [n] int64 for classes, else whatever the loss takes.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ticketfind import TicketfindError
from ticketfind.specs import is_code, load_object, one_line, suggest
from ticketfind.tensorfile import read_tensors


@dataclass(frozen=True)
class Split:
    """Examples held in memory."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The examples at `indices` [b] (on the split's device) as (inputs, targets)."""
        return self.inputs.index_select(0, indices), self.targets.index_select(0, indices)

    def to(self, device: torch.device) -> "Split":
        """This split on `device`."""
        return Split(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Data:
    """Training, validation and test examples."""

    train: Split
    validation: Split
    test: Split

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.inputs.shape[1:])

    @property
    def classes(self) -> int | None:
        """Number of classes, the highest label + 1; None where the targets are no labels."""
        targets = [split.targets for split in (self.train, self.validation, self.test)]
        if any(t.is_floating_point() or t.ndim != 1 for t in targets):
            return None
        return max(int(t.max()) for t in targets) + 1

    def to(self, device: torch.device) -> "Data":
        """This data on `device`."""
        return Data(self.train.to(device), self.validation.to(device), self.test.to(device))


def load(spec: str, args: Mapping[str, Any], *, validation: float | int | None, seed: int) -> Data:
    """The data that `spec` names.

    validation: examples (or share) of the training set held out, drawn with `seed`; None: the data's own validation
    split, else a tenth. Raises TicketfindError for unknown, missing, damaged or inconsistent data.
    """
    splits = _read(spec, args)
    for part, split in splits.items():
        _check(f"data {spec}: {part}", split, splits["train"])
    if "validation" in splits:
        found = len(splits["validation"])
        if validation is not None and validation != found:
            raise TicketfindError(
                f"data.validation: expected null or {found}, as {spec} has a validation split of its own,"
                f" found {validation}"
            )
        return Data(splits["train"], splits["validation"], splits["test"])
    train = splits["train"]
    share = 0.1 if validation is None else validation
    held = round(share * len(train)) if isinstance(share, float) else share
    if not 0 < held < len(train):
        raise TicketfindError(
            f"data.validation: expected between 1 and {len(train) - 1} of the {len(train)} training examples of {spec},"
            f" found {validation if validation is not None else held}"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return Data(Split(*train.batch(order[held:])), Split(*train.batch(order[:held])), splits["test"])


def _read(spec: str, args: Mapping[str, Any]) -> dict[str, Split]:
    if is_code(spec) and not Path(spec).exists():
        return _from_factory(spec, args)
    if args:
        raise TicketfindError(f"data.args: expected none for {spec!r}, found {', '.join(args)}")
    if spec == "digits":
        return _from_arrays(spec, _read_npz(Path(__file__).parent / "digits.npz"), scale=16)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _from_idx_folder(path)
    if path.suffix == ".npz" and path.is_file():
        return _from_arrays(spec, _read_npz(path))
    if path.suffix == ".safetensors" and path.is_file():
        return _from_arrays(spec, read_tensors(path, "data")[0])
    raise TicketfindError(
        f"data {spec!r}: expected digits, a folder of IDX files, a .npz or .safetensors file, or module:factory;"
        f" found no such file or folder{suggest(spec, ['digits'])}"
    )


def _check(what: str, split: Split, train: Split) -> None:
    inputs, targets = split.inputs, split.targets
    if len(inputs) != len(targets):
        raise TicketfindError(f"{what}: expected as many inputs as targets, found {len(inputs)} and {len(targets)}")
    if not len(inputs):
        raise TicketfindError(f"{what}: expected examples, found none")
    if inputs.shape[1:] != train.inputs.shape[1:]:
        raise TicketfindError(
            f"{what}: expected inputs of shape {tuple(train.inputs.shape[1:])} as in train,"
            f" found {tuple(inputs.shape[1:])}"
        )
    if inputs.is_floating_point():
        bad = ~torch.isfinite(inputs).flatten(1).all(1) if inputs.ndim > 1 else ~torch.isfinite(inputs)
        if bool(bad.any()):
            raise TicketfindError(
                f"{what}: expected finite inputs, found NaN or infinity in example {int(bad.nonzero()[0])}"
            )
    if not targets.is_floating_point() and targets.ndim == 1 and int(targets.min()) < 0:
        raise TicketfindError(f"{what}: expected labels from 0, found {int(targets.min())}")


# ------------------------------------------------------------------------------------------- to tensors


def _inputs(raw: Any, what: str, scale: float = 255) -> Tensor:
    """float32 or int64; bytes are pixels and become 0..1; channels come first."""
    inputs = _rows(raw, what)
    if inputs.dtype == torch.uint8:
        if inputs.ndim == 3:
            inputs = inputs.unsqueeze(1)
        elif inputs.ndim == 4 and inputs.shape[3] in (1, 3, 4) and inputs.shape[1] not in (1, 3, 4):
            inputs = inputs.permute(0, 3, 1, 2)
        return (inputs.float() / scale).contiguous()
    if inputs.is_floating_point() or inputs.dtype == torch.bool:
        return inputs.float().contiguous()
    return inputs.long().contiguous()


def _targets(raw: Any, what: str) -> Tensor:
    targets = _rows(raw, what)
    if targets.ndim == 2 and targets.shape[1] == 1 and not targets.is_floating_point():
        targets = targets[:, 0]
    return targets.float() if targets.is_floating_point() else targets.long()


def _tensor(raw: Any, what: str) -> Tensor:
    try:
        return torch.as_tensor(raw)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TicketfindError(f"{what}: expected numbers, found {type(raw).__name__}: {one_line(error)}") from error


def _rows(raw: Any, what: str) -> Tensor:
    tensor = _tensor(raw, what)
    if tensor.is_complex():
        raise TicketfindError(f"{what}: expected real numbers, found {tensor.dtype}")
    if tensor.ndim == 0:
        raise TicketfindError(f"{what}: expected an array with one row per example, found a single number")
    return tensor


def _from_arrays(spec: str, arrays: Mapping[str, Any], scale: float = 255) -> dict[str, Split]:
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
            _inputs(arrays[f"x_{key}"], f"data {spec}: x_{key}", scale),
            _targets(arrays[f"y_{key}"], f"data {spec}: y_{key}"),
        )
        for part, key in parts.items()
    }


def _kind(raw: Any) -> str:
    """What `_inputs` makes of an array's type: pixels are scaled, numbers are not."""
    name = str(getattr(raw, "dtype", "")).removeprefix("torch.")
    return "bytes" if name == "uint8" else "numbers" if name.startswith(("float", "bfloat", "bool")) else name


def _read_npz(path: Path) -> dict[str, Any]:
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


def _from_idx_folder(folder: Path) -> dict[str, Split]:
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
        splits[part] = Split(_inputs(found["images"], str(folder)), _targets(found["labels"], str(folder)))
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
    return flat.flip(1).contiguous().view(dtype).view(shape)  # IDX is big-endian


# -------------------------------------------------------------------------------------- user factories


def _from_factory(spec: str, args: Mapping[str, Any]) -> dict[str, Split]:
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
    return {name: _split(part, f"data {spec}: {name}") for name, part in zip(names, made, strict=True)}


def _split(part: Any, what: str) -> Split:
    """From a pair of arrays, or a map-style Dataset of (input, target) read into memory."""
    if isinstance(part, (tuple, list)) and len(part) == 2 and all(hasattr(side, "shape") for side in part):
        return Split(_inputs(part[0], what), _targets(part[1], what))
    if not (hasattr(part, "__getitem__") and hasattr(part, "__len__")):
        raise TicketfindError(
            f"{what}: expected a pair of tensors (inputs, targets) or a map-style Dataset, found {type(part).__name__}"
        )
    if not len(part):
        raise TicketfindError(f"{what}: expected examples, found none")
    inputs, targets = [], []
    for index in range(len(part)):
        try:
            example = part[index]
        except Exception as error:
            raise TicketfindError(f"{what}: example {index} cannot be read: {one_line(error)}") from error
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise TicketfindError(
                f"{what}: expected (input, target) examples, found {type(example).__name__} at {index}"
            )
        inputs.append(_tensor(example[0], f"{what}: input {index}"))
        targets.append(_tensor(example[1], f"{what}: target {index}"))
        if inputs[-1].shape != inputs[0].shape or targets[-1].shape != targets[0].shape:
            raise TicketfindError(
                f"{what}: expected examples of one shape, found input {tuple(inputs[-1].shape)} and target"
                f" {tuple(targets[-1].shape)} at {index}, {tuple(inputs[0].shape)} and {tuple(targets[0].shape)} before"
            )
    return Split(_inputs(torch.stack(inputs), what), _targets(torch.stack(targets), what))
