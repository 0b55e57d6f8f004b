"""What of a network can be pruned, and why not the rest; tied parameters; globs over parameter names."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ticketfind import TicketfindError, patterns


@dataclass(frozen=True)
class Candidate:
    """A parameter, and whether it is pruned and why (or why not)."""

    name: str
    shape: tuple[int, ...]
    pruned: bool
    reason: str
    is_left_whole: bool = False
    """It could be pruned, but not divided into the blocks of an N:M pattern."""


_PRUNED_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
)
_LAYER_WEIGHTS = ("weight", "weight_v", "weight_orig")  # of torch.nn.utils: weight_norm; spectral_norm and prune
_RECURRENT_LAYERS = (nn.RNNBase, nn.RNNCellBase)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def candidates(
    model: nn.Module, *, only: Sequence[str] = (), skip: Sequence[str] = (), block: int | None = None
) -> list[Candidate]:
    """Every parameter of `model` once (tied ones under their first name), in the model's order.

    A tied parameter is pruned only if it can be under each of its names: an embedding stays whole.
    only, skip: globs over parameter names, of tied ones any. block: of an N:M pattern, which leaves whole what it does
    not divide. Raises TicketfindError for one that matches no parameter.
    """
    verdicts: dict[int, list[tuple[bool, str]]] = {}
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue  # judged with the layer whose weight it makes
        for attribute, parameter in module.named_parameters(recurse=False):
            verdicts.setdefault(id(parameter), []).append(_judge(module, attribute))
        for attribute, made in getattr(module, "parametrizations", {}).items():
            for original, parameter in made.named_parameters(recurse=False):
                verdicts.setdefault(id(parameter), []).append(_judge_parametrized(module, attribute, made, original))
    parameters = dict(model.named_parameters())
    names = {name: [name] for name in parameters}
    for alias, name in aliases(model).items():
        names[name].append(alias)
    every = [name for known in names.values() for name in known]
    check_globs(only, every, "prune.only")
    check_globs(skip, every, "prune.skip")
    found = []
    for name, parameter in parameters.items():
        judged = verdicts.get(id(parameter), [(False, "a parameter of a parametrization")])
        pruned, reason = min(judged, key=lambda verdict: verdict[0])  # one that says no decides
        if not parameter.requires_grad:
            pruned, reason = False, "frozen"
        if only:
            pruned = any(matches(known, only) for known in names[name])
            reason = "matches prune.only" if pruned else "not in prune.only"
        if any(matches(known, skip) for known in names[name]):
            pruned, reason = False, "matches prune.skip"
        left_whole = pruned and block is not None and not patterns.fits(parameter.shape, block)
        if left_whole:
            fault = "it has one dimension, and none of inputs"
            if parameter.ndim > 1:
                fault = f"its number of inputs, {parameter.shape[1]}, is no multiple of {block}"
            pruned, reason = False, f"left whole: {fault}"
        found.append(Candidate(name, tuple(parameter.shape), pruned, reason, left_whole))
    return found


def _judge(module: nn.Module, attribute: str) -> tuple[bool, str]:
    layer = _layer_name(module)
    if attribute in ("bias", "bias_k", "bias_v") or attribute.endswith("_bias") or attribute.startswith("bias_"):
        return False, "bias"
    if attribute.endswith("_g") and hasattr(module, f"{attribute[:-2]}_v"):
        return False, "length of weight_norm"
    if isinstance(module, _PRUNED_LAYERS) and attribute in _LAYER_WEIGHTS:
        standardized = "; zeros do not stay zero in its standardized weight" if "StdConv" in layer else ""
        return True, f"{layer} {attribute}{standardized}"
    if isinstance(module, _RECURRENT_LAYERS) and attribute.startswith("weight_"):
        return True, f"{layer} weight"
    if isinstance(module, nn.MultiheadAttention) and attribute in _ATTENTION_WEIGHTS:
        return True, "attention weight"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return False, "embedding"
    if "norm" in layer.lower():
        return False, "normalization"
    return False, f"{layer}.{attribute} is not a Linear, Conv or attention weight"


def _layer_name(module: nn.Module) -> str:
    """The layer's class; torch.nn.utils.parametrize puts one of its own, ParametrizedLinear, over it."""
    return type(module).__name__.removeprefix("Parametrized")


def _judge_parametrized(module: nn.Module, attribute: str, made: nn.Module, original: str) -> tuple[bool, str]:
    """`original` is what a parametrization computes the layer's `attribute` from (torch.nn.utils.parametrize)."""
    pruned, reason = _judge(module, attribute)
    if not pruned:
        return pruned, reason
    if _keeps_zeros(made, original):
        return True, f"{reason}, parametrized"
    return False, f"{reason}, parametrized; its zeros do not stay zeros"


@torch.no_grad()
def _keeps_zeros(made: nn.Module, original: str) -> bool:
    """True if zeros in `original` are zeros, in the same places, in what the parametrization makes of it: tried."""
    for seed in range(3):
        trial = copy.deepcopy(made)
        values = getattr(trial, original)
        gone = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)).to(values.device) < 0.5
        rows = gone.view(len(gone), -1) if gone.ndim else gone.view(1, 1)
        for kept in (rows[0], rows[:, 0]):  # something in each row and column, as weight_norm divides by their length
            if kept.numel() < rows.numel():
                kept.fill_(False)
        values.masked_fill_(gone, 0.0)
        weight = trial()
        if weight.shape != values.shape or not bool(gone.any()) or bool(weight[gone].any()):
            return False
    return True


def without_direction(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Directions of weight_norm that have lost a whole row, whose length it then divides by: names in `masks`."""
    lost = []
    for name, mask in masks.items():
        length = weights.get(name.removesuffix("original1") + "original0", weights.get(name.removesuffix("_v") + "_g"))
        if length is not None and name.endswith(("original1", "_v")):
            rows = [axis for axis in range(mask.ndim) if length.ndim != mask.ndim or length.shape[axis] == 1]
            if not bool(mask.sum(rows).all()):
                lost.append(name)
    return lost


def aliases(model: nn.Module) -> dict[str, str]:
    """Tied parameters: further name -> the name under which the parameter is pruned."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def matches(name: str, globs: Iterable[str]) -> bool:
    """True if any of `globs` matches `name` (case matters)."""
    return any(fnmatchcase(name, glob) for glob in globs)


def check_globs(globs: Iterable[str], names: Sequence[str], key: str) -> None:
    """Raise TicketfindError for a glob that matches none of `names`; `key` says where it stands."""
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise TicketfindError(f"{key}: {glob!r} matches nothing; there are {shown}")
