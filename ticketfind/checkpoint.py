"""Checkpoint files -> weights under the model's own names. No code in a file is ever run."""

import itertools
import re
import tarfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ticketfind import TicketfindError, limits, pickles
from ticketfind.prunable import check_globs, matches
from ticketfind.specs import one_line, suggest
from ticketfind.tensorfile import read_tensors

_CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "state_dict_ema",
    "ema",
    "module",
    "net",
    "weights",
    "params",
)
_PREFIXES = ("module.", "_orig_mod.", "model.")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")


def read(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Every tensor in a checkpoint: .safetensors, a sharded index (or its folder), or a torch file.

    key: the entry that holds the weights, inner ones after a dot; None: the first of the usual names. Torch files are
    read with ``weights_only=True``. Raises TicketfindError for a missing, damaged, unsafe or empty one.
    """
    if path.is_dir():
        indices = sorted(path.glob("*.safetensors.index.json"))
        files = indices or sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise TicketfindError(
                f"checkpoint {path}: expected one .safetensors.index.json or one .safetensors in the folder,"
                f" found {len(files)}"
            )
        path = files[0]
    if not path.is_file():
        raise TicketfindError(f"checkpoint {path}: no such file")
    if path.name.endswith(".index.json"):
        weights: Any = _read_sharded(path)
    elif path.suffix == ".safetensors":
        weights, _ = read_tensors(path, "checkpoint")
    elif path.suffix in _TORCH_SUFFIXES:
        weights = _read_torch(path)
    else:
        raise TicketfindError(
            f"checkpoint {path}: expected .safetensors, .safetensors.index.json or a torch file"
            f" ({' '.join(_TORCH_SUFFIXES)})"
        )
    if not isinstance(weights, Mapping):
        raise TicketfindError(f"checkpoint {path}: expected named tensors, found a {type(weights).__name__}")
    whole = weights
    weights = _unwrap(whole) if key is None else _entry(whole, key, path)
    tensors = {str(name): value.detach() for name, value in weights.items() if isinstance(value, Tensor)}
    if path.suffix in _TORCH_SUFFIXES:
        tensors = _own(tensors, path)
    if not tensors:
        found, holders = _listed([*map(str, weights)]) or "nothing", _holders(whole)
        advice = f"; --checkpoint-key takes {_listed(holders)}" if holders else ""
        raise TicketfindError(f"checkpoint {path}: expected named tensors, found {found}{advice}")
    return tensors


def _read_sharded(path: Path) -> dict[str, Tensor]:
    try:
        shards = sorted(set(limits.read_json(path.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise TicketfindError(
            f"checkpoint {path}: expected an index with a weight_map; reading it failed: {one_line(error)}"
        ) from error
    weights: dict[str, Tensor] = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or len(shard) > 255:
            raise TicketfindError(f"checkpoint {path}: expected shards in the same folder, found {limits.shown(shard)}")
        weights |= read_tensors(path.parent / shard, "checkpoint")[0]
    return weights


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles; what is refused is told below
            pickles.check(path)
            is_zip = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)  # as large as it says, or none
    except Exception as error:  # torch.load raises whatever the damaged bytes lead it to
        first = limits.short(str(error).split("\n", 1)[0])
        if not isinstance(error, OSError):
            with path.open("rb") as file:
                start = file.read(16)
            if not start.startswith((b"PK", b"\x80")) and not tarfile.is_tarfile(path):  # zip, pickle, torch 0.1
                raise TicketfindError(
                    f"checkpoint {path}: expected a torch checkpoint, found a file that begins with {start!r}"
                ) from error
        if "weights_only" in str(error) or "Unsupported" in str(error):
            refused = re.search(r"GLOBAL (\S+)", str(error))
            raise TicketfindError(
                f"checkpoint {path}: it holds objects other than tensors{f' ({refused[1]})' if refused else ''}, which"
                " ticketfind never unpickles; where you trust it, save its tensors alone:"
                " torch.save(model.state_dict(), FILE) (or torch.load(FILE, weights_only=False) and"
                " safetensors.torch.save_file, in a program of your own)"
            ) from error
        raise TicketfindError(f"checkpoint {path}: expected a torch checkpoint; reading it failed: {first}") from error


def _entry(found: Any, key: str, path: Path) -> Mapping[str, Any]:
    """The entry at `key`; of a flat file those whose names begin with it."""
    inner = found
    for part in key.split("."):
        inner = {str(name): value for name, value in inner.items()}.get(part) if isinstance(inner, Mapping) else None
    if isinstance(inner, Mapping):
        return _unwrap(inner)
    entries = found.items() if isinstance(found, Mapping) else ()
    under = {str(name): value for name, value in entries if isinstance(value, Tensor)}
    under = {name[len(key) + 1 :]: value for name, value in under.items() if name.startswith(f"{key}.")}
    if not under:
        holders = _holders(found)
        raise TicketfindError(
            f"checkpoint {path}: checkpoint_key {key!r}: expected an entry that holds tensors,"
            f" found {_listed(holders) if holders else 'none with a name'}{suggest(key, holders)}"
        )
    return under


_DEEPEST = 20
"""Mappings within one another that are looked into."""


def _holders(found: Any, prefix: str = "", depth: int = 0, seen: set[int] | None = None) -> list[str]:
    """The keys of the entries that hold tensors, inner ones after a dot; of a flat file what its names begin with."""
    seen = set() if seen is None else seen
    if not _is_new(found, depth, seen):
        return []
    tensors = [str(name) for name, value in found.items() if isinstance(value, Tensor)]
    here = [prefix for _ in tensors[:1]] if prefix else [name.partition(".")[0] for name in tensors if "." in name]
    inner = (_holders(value, f"{prefix}.{name}".lstrip("."), depth + 1, seen) for name, value in found.items())
    return list(dict.fromkeys([*here, *itertools.chain.from_iterable(inner)]))


def _unwrap(found: Any, depth: int = 0, seen: set[int] | None = None) -> Mapping[str, Any]:
    """The state dict inside the containers that training programs put around it."""
    seen = set() if seen is None else seen
    if not _is_new(found, depth, seen):
        return {}
    for key in _CONTAINERS:
        inner = _unwrap(found.get(key), depth + 1, seen)
        if any(isinstance(value, Tensor) for value in inner.values()):
            return inner
    return found  # type: ignore[no-any-return]


def _is_new(found: Any, depth: int, seen: set[int]) -> bool:
    """True once for each mapping: in a pickle one may be in several places, itself among them."""
    if not isinstance(found, Mapping) or depth > _DEEPEST or id(found) in seen:
        return False
    seen.add(id(found))
    return True


def _own(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors, plain and in memory of their own. Raises TicketfindError for others, or more than the file holds."""
    for name, value in tensors.items():
        kind = "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise TicketfindError(
                f"checkpoint {path}: {limits.short(name)}: expected plain numbers,"
                f" found a tensor that is {kind}, on {value.device.type}"
            )
    distinct = {id(value): value for value in tensors.values()}.values()
    size, most = sum(value.numel() * value.element_size() for value in distinct), 4 * path.stat().st_size
    if size > most + limits.SPARE:
        raise TicketfindError(f"checkpoint {path}: expected at most {most:,} bytes of tensors in it, found {size:,}")
    try:
        return {name: value.clone() for name, value in tensors.items()}
    except Exception as error:  # subclasses of tensors raise what they like
        raise TicketfindError(
            f"checkpoint {path}: expected plain numbers; copying failed: {one_line(error)}"
        ) from error


def match(
    weights: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    *,
    allow: Sequence[str],
    path: Path,
    aliases: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The entries of `weights` for `wanted` (the model's state), renamed, in the model's dtypes.

    Prefixes that wrappers put before every name are taken off. Entries that are missing, unexpected, of another shape
    or kind of number, or not a number, are an error unless they match a glob in `allow`; those are left out, and keep
    the model's own start.
    aliases: further name -> name of tied entries, of which a file need hold only one.
    """
    weights = _without_prefixes(weights, wanted)
    for alias, name in (aliases or {}).items():
        tied = weights.get(name, weights.get(alias))
        if tied is not None:
            weights = {name: tied, alias: tied, **weights}
    check_globs(allow, [*wanted, *(name for name in weights if name not in wanted)], "model.allow_mismatch")
    held = [name for name in wanted if name in weights]
    faults = {
        "missing": {name: name for name in wanted if name not in weights},
        "unexpected": {name: name for name in weights if name not in wanted},
        "other shape": {
            name: f"{name} {tuple(wanted[name].shape)} in the model, {tuple(weights[name].shape)} in the file"
            for name in held
            if weights[name].shape != wanted[name].shape
        },
        "other type": {
            name: f"{name} {_type(wanted[name])} in the model, {_type(weights[name])} in the file"
            for name in held
            if _kind(weights[name]) != _kind(wanted[name])
        },
        "NaN": {
            name: name
            for name in held
            if _kind(weights[name]) == "float" and bool(weights[name].to(torch.float32).isnan().any())
        },
    }
    told = []
    for kind, found in faults.items():
        if texts := [text for name, text in found.items() if not matches(name, allow)]:
            told.append(f"{kind}: {_listed(texts)}")
    if told:
        raise TicketfindError(
            f"checkpoint {path}: does not fit the model; {'; '.join(told)} (--allow-mismatch GLOB accepts entries)"
        )
    left_out = {name for found in faults.values() for name in found}
    return {name: weights[name].to(wanted[name].dtype) for name in held if name not in left_out}


def _kind(tensor: Tensor) -> str:
    """What a type cannot change without changing what it says: quantized weights are no weights."""
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else "whole"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def dtype(weights: Mapping[str, Tensor]) -> str:
    """The types of the floating-point entries, as "bfloat16" or "float16, float32"."""
    return ", ".join(sorted({_type(w) for w in weights.values() if w.is_floating_point()}))


def _without_prefixes(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take wrappers' prefixes off: those that every name has, or that the whole model is under."""
    stripped = dict(weights)
    for _ in range(len(_PREFIXES)):
        for prefix in _PREFIXES:
            every = all(name.startswith(prefix) for name in stripped) or all(prefix + n in stripped for n in wanted)
            if every and not any(name.startswith(prefix) for name in wanted):
                stripped = {name.removeprefix(prefix): value for name, value in stripped.items()}
    return stripped


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
