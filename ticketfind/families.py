"""Layers whose units must go together, as torch-pruning's dependency graph has it (Fang et al. 2023, arXiv 2301.12900).

Legend: a *family* is what torch-pruning calls a group: layers whose units must go together, as in a residual stream.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ticketfind import TicketfindError
from ticketfind.outputs import Inputs, tensors_in
from ticketfind.specs import one_line

LINKS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose units can go: those that they make, and those that they read."""
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Layers that treat each unit by itself."""
_SIZES = ("out_features", "in_features"), ("out_channels", "in_channels"), ("num_features",)


@dataclass(frozen=True)
class Ends:
    """A layer's share of a family. places: for each of the family's units its rows (or columns) of the weight."""

    name: str
    places: dict[int, list[int]]

    def of(self, units: Iterable[int]) -> list[int]:
        """The places of some units."""
        return [place for unit in units for place in self.places.get(unit, ())]


@dataclass(frozen=True)
class Family:
    """Units that go together: the layers that make them, normalize them and read them."""

    makers: list[Ends]
    norms: list[Ends]
    readers: list[Ends]

    @property
    def units(self) -> list[int]:
        """Those that a layer is known to read; others are read by something else (queries and keys, by attention)."""
        return sorted({unit for reader in self.readers for unit in reader.places})


def find_families(model: nn.Module, inputs: Inputs) -> list[Family]:
    """Those that end in layers of a known kind; not those that nobody reads, which are the output."""
    try:
        import torch_pruning
    except ImportError as error:
        raise TicketfindError(
            "--shrink needs torch-pruning, which is not installed: pip install 'ticketfind[shrink]'"
        ) from error
    traced = copy.deepcopy(model)
    for parameter in traced.parameters():  # it follows gradients, which frozen ones have none of
        parameter.requires_grad_(parameter.is_floating_point())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = torch_pruning.DependencyGraph().build_dependency(
                traced, example_inputs=inputs, output_transform=lambda outputs: [*tensors_in(outputs)]
            )
            groups = {
                name: graph.get_pruning_group(
                    layer, graph.get_pruner_of_module(layer).prune_out_channels, [*range(len(layer.weight))]
                )
                for name, layer in traced.named_modules()
                if isinstance(layer, LINKS) and layer in graph.module2node  # it is called, and not a part of attention
            }
        except Exception as error:
            raise TicketfindError(
                f"model: torch-pruning cannot follow what depends on what in it: {one_line(error)}"
            ) from error
    names = {layer: name for name, layer in traced.named_modules()}
    shared = Counter(id(p) for module in traced.modules() for p in module.parameters(recurse=False))
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
) -> Family | None:
    """None where a layer of another kind is part of it, or one that shares its weight or computes it."""
    makers, norms, readers = list[Ends](), list[Ends](), list[Ends]()
    for item in group.items:
        target = item.dep.target.module
        if isinstance(target, nn.Parameter):
            return None
        own = dict(target.named_parameters(recurse=False))
        is_link = isinstance(target, LINKS) and getattr(target, "groups", 1) == 1
        if not is_link and not isinstance(target, NORMS):
            if any(True for _ in target.parameters()):
                return None
            continue
        if not own.keys() <= {"weight", "bias"} or any(shared[id(p)] > 1 for p in own.values()):
            return None
        if is_link and "weight" not in own:
            return None
        places: dict[int, list[int]] = {}
        for unit, place in zip(item.root_idxs, item.idxs, strict=True):
            places.setdefault(unit, []).append(place)
        kind, axis = (norms, 0) if not is_link else (makers, 0) if makes(item.dep.handler) else (readers, 1)
        if max(item.idxs) >= sizes(target)[axis]:
            return None
        kind.append(Ends(names[target], places))
    return Family(makers, norms, readers)


def sizes(layer: Any) -> list[int]:
    """How many outputs and inputs a layer says that it has."""
    return [getattr(layer, name) for names in _SIZES for name in names if hasattr(layer, name)]


def resize(layer: nn.Module, name: str, value: Tensor) -> None:
    """Another tensor in place of a parameter or buffer, and the sizes that the layer says it has."""
    old = getattr(layer, name)
    setattr(layer, name, nn.Parameter(value, requires_grad=old.requires_grad) if name in layer._parameters else value)
    if name in ("weight", "running_mean"):
        for attributes in _SIZES:
            for attribute, size in zip(attributes, value.shape, strict=False):
                if hasattr(layer, attribute):
                    setattr(layer, attribute, size)
