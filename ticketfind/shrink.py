"""A smaller network in place of a pruned one: units that a mask has emptied are removed, and the outputs stay the same.

A unit (a neuron, a channel) goes where nothing reads it, or where nothing reaches it: then it is a constant, which is
zero or becomes part of the next bias. What must go together is in `families`, which does not know everything: each step
is tried, and not taken where outputs in float64 differ by more than rounding.
"""

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ticketfind import TicketfindError, files, limits
from ticketfind.batches import map_inputs, seeded, tensors_of
from ticketfind.families import LINKS, NORMS, Ends, Family, find_families, resize, sizes
from ticketfind.lanes import put, tensors
from ticketfind.masks import Masks
from ticketfind.outputs import Inputs, call, tensors_in
from ticketfind.specs import one_line
from ticketfind.tensorfile import read_tensors, save_tensors

METADATA = "ticketfind_shrunk"
"""The metadata key of a file with a shrunken network."""


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
class _Stage:
    """A network of full size in float64, by family the units that can go, and the weights that count without them.

    What can go is not read any more, and made of noise: outputs that are the same depend on none of it.
    """

    model: nn.Module
    gone: list[set[int]]
    left: Masks


def shrink(model: nn.Module, masks: Masks, inputs: Inputs) -> Shrunk:
    """`model` (left as it is) under `masks`, in evaluation mode, without the units that they have emptied.

    inputs: a few examples. Raises TicketfindError where torch-pruning is not installed or cannot follow the network,
    and where that cannot be computed in float64.
    """
    full = copy.deepcopy(model).eval()
    put(full, model.state_dict(), masks)
    families = find_families(full, inputs)
    before, dtypes = _units(full), {name: t.dtype for name, t in tensors(full).items()}
    batches = _batches(inputs)
    try:
        full.double()
        expected = [_outputs(full, batch) for batch in batches]
    except Exception as error:
        raise TicketfindError(
            "model: expected one that computes in float64 too, in which it is checked that outputs stay the same;"
            f" calling it failed: {one_line(error)}"
        ) from error

    trains = _trains(copy.deepcopy(full), batches[0])
    constants = _constants(full, families, batches)

    def fault_of(stage: _Stage) -> str | None:
        try:
            for network in (stage.model, small := _without(stage, families)):
                if not all(map(_is_same, (_outputs(network, batch) for batch in batches), expected)):
                    return "the outputs would change"
        except Exception as error:  # of the network itself, which wants its old sizes
            return one_line(error)[:100]
        return "it is used in training" if trains and not _trains(small, batches[0]) else None

    names = {end.name for family in families for end in (*family.makers, *family.readers)}
    left = {name: masks.get(f"{name}.weight", torch.ones(_weight(full, name).shape)).bool().cpu() for name in names}
    now = _Stage(full, [set() for _ in families], left)
    movable, notes = [*range(len(families))], []
    while (after := _next(now, families, movable, constants)).gone != now.gone:
        if fault_of(after) is None:
            now = after
            continue
        for number in [*movable]:  # one of them is at fault
            after = _next(now, families, [number], constants)
            found = len(after.gone[number]) - len(now.gone[number])
            fault = fault_of(after) if found else None
            if fault is not None:
                movable.remove(number)
                layer = families[number].makers[0].name
                notes.append(f"{layer}: {found} emptied unit{' is' if found == 1 else 's are'} left alone: {fault}")
            elif found:
                now = after
    small, rows = _without(now, families), _lost(now, families)[0]
    kept = {name: [unit for unit in range(before[name]) if unit not in rows[name]] for name in before if name in rows}
    for name, value in [*small.named_parameters(), *small.named_buffers()]:
        value.data = value.data.to(dtypes[name])
    return Shrunk(small, kept, before, notes)


def _units(model: nn.Module) -> dict[str, int]:
    return {name: len(layer.weight) for name, layer in model.named_modules() if isinstance(layer, LINKS)}


def _weight(model: nn.Module, layer: str) -> Tensor:
    return model.get_parameter(f"{layer}.weight")


# ------------------------------------------------------------------------------------------- the same outputs


def _batches(inputs: Inputs) -> list[Inputs]:
    """In float64: the examples as they are, and with noise, as what a few have in common may be chance."""
    generator = torch.Generator().manual_seed(0)
    exact = map_inputs(lambda t: t.double() if t.is_floating_point() else t, inputs)
    if not any(t.is_floating_point() for t in tensors_of(exact)):
        return [exact]
    return [
        exact,
        map_inputs(lambda t: t + t.abs().max() * _noise(t, generator) if t.is_floating_point() else t, exact),
    ]


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    found = [*tensors_in(call(model, inputs))]
    if not found:
        raise ValueError("there is no tensor in what it returns")
    return found


@torch.no_grad()
def _trains(model: nn.Module, inputs: Inputs) -> bool:
    """Whether it can be called in training mode, in which it may use more of its layers. Its buffers may change."""
    with seeded(0):
        try:
            call(model.train(), inputs)
        except Exception:
            return False
    return True


def _is_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """But for rounding in float64."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return False
    for a, b in zip(found, expected, strict=True):
        size = b.double().nan_to_num(0, 0, 0).abs().max() if b.numel() else 0
        if not torch.allclose(a.double(), b.double(), rtol=0, atol=1e-9 * float(size) + 1e-15, equal_nan=True):
            return False
    return True


# ---------------------------------------------------------------------------------- which units are empty


def _next(now: _Stage, families: Sequence[Family], numbers: Iterable[int], constants: Mapping[str, Tensor]) -> _Stage:
    """Without the units of some families that can go as things are; others may be left unread by that, or unreached."""
    after = copy.deepcopy(now)
    generator = torch.Generator().manual_seed(0)
    for number in numbers:
        family, lost = families[number], after.gone[number]
        read, reached = _alive(after.left, family.readers, 1), _alive(after.left, family.makers, 0)
        there = [unit for unit in family.units if unit not in lost]
        found = [unit for unit in there if unit not in read][: len(there) - 1]
        silent = [unit for unit in there if unit in read and unit not in reached]
        found += _folded(after.model, family, silent[: len(there) - 1 - len(found)], constants)  # one stays, always
        for ends, axis in ((family.makers, 0), (family.readers, 1)):
            for end in ends:
                after.left[end.name].movedim(axis, 0)[end.of(found)] = False
        _cut(after.model, family, found, generator)
        lost.update(found)
    return after


def _alive(left: Masks, ends: Sequence[Ends], axis: int) -> set[int]:
    """The units that have a weight left in a layer."""
    found = set[int]()
    for end in ends:
        some = left[end.name].movedim(axis, 0).flatten(1).any(1).tolist()
        found.update(unit for unit, places in end.places.items() if any(some[place] for place in places))
    return found


@torch.no_grad()
def _cut(model: nn.Module, family: Family, units: Sequence[int], generator: torch.Generator) -> None:
    for maker in family.makers:
        rows = maker.of(units)
        for value in model.get_submodule(maker.name).parameters():
            value[rows] = 3 * _noise(value[rows], generator)
    for reader in family.readers:
        _weight(model, reader.name)[:, reader.of(units)] = 0


@torch.no_grad()
def _folded(model: nn.Module, family: Family, units: Sequence[int], constants: Mapping[str, Tensor]) -> list[int]:
    """Of units that nothing reaches those whose constant is zero, or has become part of the next biases."""
    folded = []
    for unit in units:
        layers: list[Any] = [model.get_submodule(end.name) for end in family.readers]
        values = [constants[end.name][end.of([unit])] for end in family.readers]
        if all(_holds(layer, value) for layer, value in zip(layers, values, strict=True)):
            for layer, end, value in zip(layers, family.readers, values, strict=True):
                if layer.bias is not None:
                    layer.bias += (
                        layer.weight[:, end.of([unit])].reshape(len(layer.bias), len(value), -1).sum(2) @ value
                    )
            folded.append(unit)
    return folded


def _holds(layer: Any, values: Tensor) -> bool:
    """Whether these inputs are constants, and zero or such that a layer's bias can hold what it makes of them.

    No bias can where a convolution pads with zeros, as what its border reads is no constant.
    """
    padded = getattr(layer, "padding", 0) not in (0, (0,), (0, 0), (0, 0, 0), "valid")
    return not bool(values.isnan().any()) and (not bool(values.any()) or (layer.bias is not None and not padded))


@torch.no_grad()
def _constants(model: nn.Module, families: Sequence[Family], batches: Sequence[Inputs]) -> dict[str, Tensor]:
    """By layer that reads units, the value of each of its inputs; NaN where that is not always the same."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {end.name: [] for family in families for end in family.readers}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x, axis = (*args, *named.values())[0], 1 - _weight(model, name).ndim
            rows = x.movedim(axis, 0).reshape(x.shape[axis], -1)
            seen[name].append((rows.amin(1), rows.amax(1)))

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True) for name in seen]
    for batch in batches:
        call(model, batch)
    for hook in hooks:
        hook.remove()
    found, nan = {}, torch.nan
    for name, bounds in seen.items():
        size = _weight(model, name).shape[1]
        values = torch.stack([*itertools.chain(*bounds)]) if bounds else _weight(model, name).new_full((1, size), nan)
        found[name] = torch.where((values == values[0]).all(0), values[0], nan)
    return found


# ------------------------------------------------------------------------------------------ smaller layers


def _lost(stage: _Stage, families: Sequence[Family]) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    """By layer the rows (outputs) that go, and the columns (inputs)."""
    found: tuple[dict[str, set[int]], dict[str, set[int]]] = {}, {}
    for family, units in zip(families, stage.gone, strict=True):
        for ends, axis in (((*family.makers, *family.norms), 0), (family.readers, 1)):
            for end in ends:
                if places := end.of(units):
                    found[axis].setdefault(end.name, set()).update(places)
    return found


def _without(stage: _Stage, families: Sequence[Family]) -> nn.Module:
    """The smaller network."""
    small = copy.deepcopy(stage.model)
    for axis, lost in enumerate(_lost(stage, families)):
        for name, places in lost.items():
            layer = small.get_submodule(name)
            keep = [place for place in range(sizes(layer)[axis]) if place not in places]
            for own, value in [*layer.named_parameters(), *layer.named_buffers()]:
                if value.ndim > axis:
                    resize(layer, own, value.detach().movedim(axis, 0)[keep].movedim(0, axis).contiguous())
    return small


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

    Raises TicketfindError for a file of another kind, a damaged one, and one of another network; the model is then as
    it was.
    """
    path = Path(path)
    state, metadata = read_tensors(path, "shrunken network")
    if METADATA not in metadata:
        raise TicketfindError(f"{path}: expected a file written by ticketfind export --shrink, found another one")
    layers, current = _read_layers(path, metadata[METADATA]), model.state_dict()
    if differing := sorted(state.keys() ^ current.keys()):
        shown = ", ".join(map(limits.short, differing[:5]))
        raise TicketfindError(f"{path}: is of another network than the model: {shown} only in one of them")
    for name, value in state.items():
        owner, _, attribute = name.rpartition(".")
        if fault := _misfit(value, current[name], model.get_submodule(owner), layers.get(owner)):
            raise TicketfindError(f"{path}: {name}: {fault}")
    for name, value in state.items():
        owner, _, attribute = name.rpartition(".")
        if value.shape != current[name].shape:
            resize(model.get_submodule(owner), attribute, value.to(current[name]))
    model.load_state_dict(state)


def _read_layers(path: Path, text: str) -> dict[str, tuple[int, int]]:
    """By layer that has lost units: how many outputs it had and has."""
    try:
        about = limits.read_json(text.encode())
        if about["format"] != 1:
            raise TicketfindError(
                f"{path}: expected format 1, found {limits.shown(about['format'])}; a newer ticketfind may read it"
            )
        found = {name: (of["of"], [*of["kept"]]) for name, of in about["layers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TicketfindError(
            f"{path}: metadata {METADATA}: expected layers with of and kept; reading them failed: {one_line(error)}"
        ) from error
    for name, (of, kept) in found.items():
        numbers = [-1, *kept, of]
        if any(type(n) is not int for n in numbers) or any(a >= b for a, b in itertools.pairwise(numbers)):
            raise TicketfindError(
                f"{path}: metadata {METADATA}: {limits.short(name)}: expected in kept rising numbers below of"
            )
    return {name: (of, len(kept)) for name, (of, kept) in found.items()}


def _misfit(value: Tensor, now: Tensor, layer: nn.Module, outputs: tuple[int, int] | None) -> str | None:
    """Why a tensor from a file cannot take the place of a layer's. outputs: how many the layer had, and has."""
    if value.dtype != now.dtype and not (_is_plain(value) and _is_plain(now)):
        return f"expected {now.dtype}, found {value.dtype}"
    if _is_plain(value) and bool(value.isnan().any()):
        return "expected numbers, found NaN; the file is damaged"
    old, new = [*now.shape], [*value.shape]
    if old == new:
        return None
    is_smaller = len(old) == len(new) and all(0 < b <= a for a, b in zip(old, new, strict=True)) and old[2:] == new[2:]
    is_link = isinstance(layer, LINKS) and getattr(layer, "groups", 1) == 1
    if is_smaller and (isinstance(layer, NORMS) or (is_link and (old[0], new[0]) == (outputs or (old[0], old[0])))):
        return None
    return f"expected {old}, or less as its metadata say, found {new}: is of another network than the model"


def _is_plain(value: Tensor) -> bool:
    """Numbers of a kind that weights are in, which one another's place can be taken by."""
    return value.is_floating_point() and value.element_size() > 1
