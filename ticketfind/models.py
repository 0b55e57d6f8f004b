"""Specs of models -> modules. The only file that names timm."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ticketfind import TicketfindError
from ticketfind.nets import NETS
from ticketfind.specs import is_code, load_object, one_line, suggest

WEIGHT_ARGS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Arguments of timm's factory that say where trained weights come from."""
State = dict[str, Tensor]
"""Every parameter and buffer of a model by its state-dict key."""


@dataclass(frozen=True)
class Source:
    """A model spec made ready: where fresh networks come from."""

    build: Callable[[], nn.Module]
    """A network, freshly initialized from torch's default generator."""
    pretrained: State | None
    """Weights that the spec asked for instead of a fresh initialization."""

    def new(self, seed: int) -> nn.Module:
        """A freshly initialized network; the same seed gives the same weights. Leaves torch's generator alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()


def source(
    spec: str,
    args: Mapping[str, Any],
    *,
    input_shape: tuple[int, ...] | None = None,
    classes: int | None = None,
) -> Source:
    """Where networks of `spec` come from, sized for the data unless `args` says otherwise.

    input_shape: of one input (images: channels, height, width). Raises TicketfindError for an unknown spec, a
    factory that fails or one that returns no module.
    """
    if spec in NETS:
        return Source(_builder(spec, NETS[spec], _sized(NETS[spec], args, input_shape, classes)), None)
    if is_code(spec):
        made = load_object(spec, "model")
        if isinstance(made, nn.Module):
            return Source(lambda: copy.deepcopy(made), None)
        if not callable(made):
            raise TicketfindError(f"model {spec!r}: expected a class or function, found {type(made).__name__}")
        build = _builder(spec, made, _sized(made, args, input_shape, classes))
        return Source(lambda: _own_copy(build()), None)
    return _timm_source(spec, args, input_shape, classes)


def _builder(spec: str, factory: Callable[..., Any], args: Mapping[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        try:
            model = factory(**args)
        except Exception as error:
            shown = ", ".join(f"{key}={value!r}" for key, value in args.items()) or "no arguments"
            raise TicketfindError(f"model {spec!r}: building it with {shown} failed: {one_line(error)}") from error
        if not isinstance(model, nn.Module):
            raise TicketfindError(f"model {spec!r}: expected an nn.Module, found {type(model).__name__}")
        return model

    return build


def _own_copy(model: nn.Module) -> nn.Module:
    """A copy, as a factory that caches would hand out the very module that is being trained."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError):  # hooks or tensors that cannot be copied: trust the factory
        return model


def _sized(
    factory: Callable[..., Any],
    args: Mapping[str, Any],
    input_shape: tuple[int, ...] | None,
    classes: int | None,
) -> dict[str, Any]:
    """`args`, completed by what the data says and the factory takes by name."""
    try:
        accepted = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return dict(args)
    known = {name: value for name, value in _data_args(input_shape, classes).items() if name in accepted}
    return known | dict(args)


def _data_args(input_shape: tuple[int, ...] | None, classes: int | None) -> dict[str, Any]:
    known: dict[str, Any] = {}
    if classes is not None:
        known["num_classes"] = classes
    if input_shape is not None:
        known["input_shape"] = input_shape
        if len(input_shape) == 3:
            known["in_chans"] = input_shape[0]
            known["img_size"] = input_shape[1:]
    return known


def _timm_source(
    spec: str, args: Mapping[str, Any], input_shape: tuple[int, ...] | None, classes: int | None
) -> Source:
    import timm

    if "checkpoint_path" in args:
        raise TicketfindError(
            f"model {spec!r}: checkpoint_path: give the file with --checkpoint, which runs no code in it"
        )
    name = spec.removeprefix("timm:")
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        known = [*NETS, *timm.list_models()]
        raise TicketfindError(
            f"model {spec!r}: expected a timm name, {', '.join(NETS)}, or module:factory{suggest(spec, known)}"
        )
    sized = _data_args(input_shape, classes)
    sized.pop("input_shape", None)
    config = None if ":" in name else timm.models.get_pretrained_cfg(name)
    if not getattr(config, "fixed_input_size", False):
        sized.pop("img_size", None)
    sized |= {key: value for key, value in args.items() if key != "pretrained"}
    build = _builder(spec, timm.create_model, {"model_name": name, **sized})
    if not args.get("pretrained"):
        return Source(build, None)
    return Source(build, _loaded(_builder(spec, timm.create_model, {"model_name": name, **sized, "pretrained": True})))


def _loaded(build: Callable[[], nn.Module]) -> State:
    """The weights that `build` loads: those that do not depend on the seed, as a fresh head's do."""
    first, second = (state_of(Source(build, None).new(seed)) for seed in (0, 1))
    return {name: value for name, value in first.items() if torch.equal(value, second[name])}


def state_of(model: nn.Module) -> State:
    """A copy of every parameter and buffer."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
