"""A smaller network in place of a pruned one: units that a mask has emptied are removed, and the outputs stay the same.

A unit (a neuron, a channel) goes where nothing reads it, or where nothing reaches it: then it is a constant, which is
zero or becomes part of the next bias. What depends on what is torch-pruning's dependency graph (Fang et al. 2023, arXiv
2301.12900). Every removal is tried, and undone where outputs in float64 differ by more than rounding.

Legend: a *family* is what torch-pruning calls a group: layers whose units must go together, as in a residual stream.
"""

import copy
import json
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ticketfind import TicketfindError, files
from ticketfind.batches import map_inputs
from ticketfind.lanes import put
from ticketfind.masks import Masks
from ticketfind.outputs import Inputs, call, predictions
from ticketfind.tensorfile import read_metadata, read_tensors, save_tensors

METADATA = "ticketfind_shrunk"
"""The metadata key of a file with a shrunken network."""
_LINKS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Shrunk:
    """A network without the units that its mask had emptied."""

    model: nn.Module
    kept: dict[str, list[int]]
    """By layer, of those that have lost units: which of its outputs are still there."""
    before: dict[str, int]
    """By layer: how many outputs it had."""
    notes: list[str]
    """What was left alone, and why."""


@dataclass(frozen=True)
class _Ends:
    """A layer's share of a family. places: for each of the family's units its rows (or columns) of the weight."""

    name: str
    places: dict[int, list[int]]

    def of(self, units: Collection[int]) -> list[int]:
        """The places of some units."""
        return [place for unit in units for place in self.places[unit]]


@dataclass(frozen=True)
class _Family:
    """Units that go together: the layers that make them, normalize them and read them."""

    size: int
    makers: list[_Ends]
    norms: list[_Ends]
    readers: list[_Ends]


def shrink(model: nn.Module, masks: Masks, inputs: Inputs) -> Shrunk:
    """`model` (left as it is) under `masks`, in evaluation mode, without the units that they have emptied.

    inputs: a few examples. Raises TicketfindError where torch-pruning is not installed or cannot follow the network.
    """
    small = copy.deepcopy(model).eval()
    put(small, model.state_dict(), masks)
    families = _families(small, inputs)
    before, dtypes = _units(small), {name: t.dtype for name, t in small.state_dict().items()}
    small.double()
    examples = map_inputs(lambda t: t.double() if t.is_floating_point() else t, inputs)
    expected = _outputs(small, examples)
    kept, notes = {}, []
    for family, units in zip(families, _emptied(small, families, masks, examples), strict=True):
        if not units:
            continue
        trial = copy.deepcopy(small)
        try:
            _remove(trial, family, units)
            fault = None if _is_same(_outputs(trial, examples), expected) else "the outputs would change"
        except (RuntimeError, ValueError, IndexError) as error:  # of the network itself, which wants its old sizes
            fault = str(error).splitlines()[0][:80]
        if fault is not None:
            notes.append(f"{family.makers[0].name}: {len(units)} emptied units are left alone: {fault}")
            continue
        small = trial
        for maker in family.makers:
            lost = {*maker.of(units)}
            kept[maker.name] = [unit for unit in range(before[maker.name]) if unit not in lost]
    for name, value in [*small.named_parameters(), *small.named_buffers()]:
        value.data = value.data.to(dtypes[name])
    return Shrunk(small, kept, before, notes)


def _units(model: nn.Module) -> dict[str, int]:
    return {name: len(layer.weight) for name, layer in model.named_modules() if isinstance(layer, _LINKS)}


def _weight(model: nn.Module, layer: str) -> Tensor:
    return model.get_parameter(f"{layer}.weight")


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    return predictions(call(model, inputs))


def _is_same(found: Tensor, expected: Tensor) -> bool:
    """But for rounding in float64."""
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= 1e-9 * max(1.0, float(expected.abs().max())))


# ------------------------------------------------------------------------------------- who depends on whom


def _families(model: nn.Module, inputs: Inputs) -> list[_Family]:
    """Those that end in layers of a known kind; not those that nobody reads, which are the output."""
    try:
        import torch_pruning
    except ImportError as error:
        raise TicketfindError(
            "--shrink needs torch-pruning, which is not installed: pip install 'ticketfind[shrink]'"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=inputs)
            groups = {
                name: graph.get_pruning_group(
                    layer, graph.get_pruner_of_module(layer).prune_out_channels, [*range(len(layer.weight))]
                )
                for name, layer in model.named_modules()
                if isinstance(layer, _LINKS)
            }
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise TicketfindError(f"model: torch-pruning cannot follow what depends on what in it: {reason}") from error
    names = {layer: name for name, layer in model.named_modules()}
    shared = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    found, seen = [], set[str]()
    for name, group in groups.items():
        if name not in seen:
            family = _family(group, graph.is_out_channel_pruning_fn, names, shared)
            if family is not None and family.readers:
                found.append(family)
                seen.update(maker.name for maker in family.makers)
    return found


def _family(
    group: Any, makes: Callable[[Any], bool], names: dict[nn.Module, str], shared: Counter[int]
) -> _Family | None:
    """None where a layer of another kind is part of it, or one that shares its weight or computes it."""
    makers, norms, readers = list[_Ends](), list[_Ends](), list[_Ends]()
    for item in group.items:
        target = item.dep.target.module
        if isinstance(target, nn.Parameter):
            return None
        own = dict(target.named_parameters(recurse=False))
        if not own and not any(True for _ in target.parameters()):
            continue
        is_link = isinstance(target, _LINKS) and getattr(target, "groups", 1) == 1
        is_plain = (
            own.keys() <= {"weight", "bias"} and "weight" in own and max(shared[id(p)] for p in own.values()) == 1
        )
        if not (is_link or isinstance(target, _NORMS)) or not is_plain:
            return None
        places: dict[int, list[int]] = {}
        for unit, place in zip(item.root_idxs, item.idxs, strict=True):
            places.setdefault(unit, []).append(place)
        kind = norms if not is_link else makers if makes(item.dep.handler) else readers
        kind.append(_Ends(names[target], places))
    return _Family(len(makers[0].places), makers, norms, readers)


# ---------------------------------------------------------------------------------- which units are empty


def _emptied(model: nn.Module, families: Sequence[_Family], masks: Masks, examples: Inputs) -> list[list[int]]:
    """The units of each family that can go; in `model` nothing reads them any more.

    One that goes may leave others unread, or without inputs: until none is left.
    """
    left = {name: masks.get(f"{name}.weight", torch.ones(_weight(model, name).shape)).bool() for name in _units(model)}
    left = {name: mask.clone() for name, mask in left.items()}
    gone: list[set[int]] = [set() for _ in families]
    count = -1
    while count != sum(map(len, gone)):
        count = sum(map(len, gone))
        for family, lost in zip(families, gone, strict=True):
            there = [unit for unit in range(family.size) if unit not in lost]
            found = [unit for unit in there if not _any(left, family.readers, 1, unit)]
            silent = [unit for unit in there if unit not in found and not _any(left, family.makers, 0, unit)]
            found += _folded(model, family, silent, examples) if silent else []
            for ends, axis in ((family.makers, 0), (family.readers, 1)):
                for end in ends:
                    left[end.name].movedim(axis, 0)[end.of(found)] = False
            _cut(model, family, found)
            lost.update(found)
    return [sorted(lost)[: family.size - 1] for family, lost in zip(families, gone, strict=True)]  # never all of them


def _any(left: Masks, ends: Sequence[_Ends], axis: int, unit: int) -> bool:
    return any(bool(left[end.name].movedim(axis, 0)[end.places[unit]].any()) for end in ends)


@torch.no_grad()
def _cut(model: nn.Module, family: _Family, units: Sequence[int]) -> None:
    for reader in family.readers:
        _weight(model, reader.name)[:, reader.of(units)] = 0


@torch.no_grad()
def _folded(model: nn.Module, family: _Family, units: Sequence[int], examples: Inputs) -> list[int]:
    """Of units that nothing reaches those whose constant is zero, or has become part of the next biases.

    Not where a convolution pads with zeros, as what its border reads is no constant; nor where there is no bias.
    """
    seen: dict[str, list[Tensor]] = {reader.name: [] for reader in family.readers}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda layer, args, name=name: seen[name].append(args[0]))
        for name in seen
    ]
    call(model, examples)
    for hook in hooks:
        hook.remove()
    folded = []
    for unit in units:
        shares = [_share(model.get_submodule(end.name), seen[end.name], end.places[unit]) for end in family.readers]
        if all(share is not None for share in shares):
            for reader, share in zip(family.readers, shares, strict=True):
                bias = dict(model.get_submodule(reader.name).named_parameters()).get("bias")
                if bias is not None and share is not None:
                    bias.add_(share)
            folded.append(unit)
    return folded


def _share(layer: Any, inputs: Sequence[Tensor], places: Sequence[int]) -> Tensor | None:
    """What constant inputs add to each of a layer's outputs; None where that is no constant that a bias could hold."""
    rows = [x.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0)[places].flatten(1) for x in inputs]
    values = rows[0][:, 0] if rows else None
    if values is None or any(bool((row != values[:, None]).any()) for row in rows):
        return None
    padded = getattr(layer, "padding", 0) not in (0, (0,), (0, 0), (0, 0, 0))
    if bool(values.any()) and (layer.bias is None or padded):
        return None
    weights: Tensor = layer.weight[:, places].flatten(2).sum(2) if layer.weight.ndim > 2 else layer.weight[:, places]
    return weights @ values


# ------------------------------------------------------------------------------------------ smaller layers


def _remove(model: nn.Module, family: _Family, units: Sequence[int]) -> None:
    for ends, axis in ((family.makers, 0), (family.norms, 0), (family.readers, 1)):
        for end in ends:
            layer = model.get_submodule(end.name)
            size = next(layer.parameters()).shape[axis]
            keep = torch.ones(size, dtype=torch.bool)
            keep[end.of(units)] = False
            tensors = {name: t.detach() for name, t in (*layer.named_parameters(), *layer.named_buffers())}
            for name, value in tensors.items():
                if value.ndim > axis:
                    _set(layer, name, value.movedim(axis, 0)[keep].movedim(0, axis).contiguous())


def _set(layer: nn.Module, name: str, value: Tensor) -> None:
    """Another tensor in place of a parameter or buffer, and the sizes that the layer says it has."""
    if name in layer._parameters:
        setattr(layer, name, nn.Parameter(value))
    else:
        setattr(layer, name, value)
    if name == "weight":
        sizes = ("out_features", "in_features"), ("out_channels", "in_channels"), ("num_features",)
        for attributes in sizes:
            for attribute, size in zip(attributes, value.shape, strict=False):
                if hasattr(layer, attribute):
                    setattr(layer, attribute, size)


# --------------------------------------------------------------------------------------------- the file


def save(shrunk: Shrunk, path: Path, *, force: bool) -> None:
    """A plain state dict; its metadata say, by layer, which of how many outputs are still there.

    A file of that name with other content is replaced only with `force`; else TicketfindError.
    """
    layers = {name: {"of": shrunk.before[name], "kept": kept} for name, kept in shrunk.kept.items()}
    about = {METADATA: json.dumps({"format": 1, "layers": layers})}
    with files.whole(path) as temporary:
        save_tensors(temporary, shrunk.model.state_dict(), about)
        files.check_replaceable(path, temporary, force=force)


def load_shrunk(path: Path | str, model: nn.Module) -> None:
    """Make `model`, as its factory builds it, the network in a file of ``export --shrink``: smaller, with its weights.

    Raises TicketfindError for a file of another kind or of another network.
    """
    path = Path(path)
    if METADATA not in read_metadata(path, "shrunken network"):
        raise TicketfindError(f"{path}: expected a file written by ticketfind export --shrink, found another one")
    state, _ = read_tensors(path, "shrunken network")
    current = model.state_dict()
    faults = sorted(state.keys() ^ current.keys())
    for name, value in state.items():
        owner, _, attribute = name.rpartition(".")
        if name in current and value.shape != current[name].shape:
            layer = model.get_submodule(owner)
            if not isinstance(layer, _LINKS + _NORMS) or value.ndim != current[name].ndim:
                faults.append(name)
            else:
                _set(layer, attribute, value.to(current[name]))
    if faults:
        raise TicketfindError(f"{path}: is of another network than the model: {', '.join(faults[:5])} differ")
    model.load_state_dict(state)
