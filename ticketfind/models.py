"""Specs of models -> modules. The only file that names timm."""

import copy
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from ticketfind import TicketfindError
from ticketfind.nets import NETS
from ticketfind.outputs import Inputs, call
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
    example: Inputs | None = None
    """Inputs for layers that take their sizes from the first ones they see."""

    def new(self, seed: int) -> nn.Module:
        """A freshly initialized network in float32; the same seed gives the same weights. Leaves torch's generator
        alone. Raises TicketfindError where layers that are sized by their first inputs have none to see."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            _materialize(model, self.example)
        return _in_float32(model)


def _materialize(model: nn.Module, example: Inputs | None) -> None:
    """Let lazy layers (torch.nn.LazyLinear and its kind) see inputs, which gives them their sizes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if not lazy:
        return
    if example is None:
        raise TicketfindError(
            f"model: {lazy[0]} takes its size from the first inputs, and there are none; give --data, or sizes"
        )
    training = model.training
    model.eval()  # no statistics of a normalization move
    try:
        with torch.no_grad():
            call(model, example)
    except Exception as error:
        raise TicketfindError(f"model: sizing {lazy[0]} by the data's inputs failed: {one_line(error)}") from error
    model.train(training)


@torch.no_grad()
def _in_float32(model: nn.Module) -> nn.Module:
    """Weights of half precision are trained in float32."""
    halves = (torch.float16, torch.bfloat16)
    return model.float() if any(p.dtype in halves for p in model.parameters()) else model


def accepted_inputs(model: nn.Module) -> list[str] | None:
    """The names of the network's arguments; None where it takes any."""
    arguments = inspect.signature(model.forward).parameters.values()
    if any(argument.kind is argument.VAR_KEYWORD for argument in arguments):
        return None
    return [argument.name for argument in arguments if argument.kind is not argument.VAR_POSITIONAL]


def source(
    spec: str,
    args: Mapping[str, Any],
    *,
    example: Inputs | None = None,
    outputs: int | None = None,
) -> Source:
    """Where networks of `spec` come from, sized for the data unless `args` says otherwise.

    example: a batch of inputs. outputs: classes, or numbers in a target. Raises TicketfindError for an unknown spec, a
    factory that fails or one that returns no module.
    """
    sizes = _sizes(example, outputs)
    if spec in NETS:
        return Source(_builder(spec, NETS[spec], _sized(NETS[spec], args, sizes)), None)
    if is_code(spec):
        made = load_object(spec, "model")
        if isinstance(made, nn.Module):
            if args:
                raise TicketfindError(
                    f"model.args: expected none, as {spec} is a module already, found {', '.join(args)}"
                )
            return Source(lambda: _own_copy(made), None, example)
        if not callable(made):
            raise TicketfindError(f"model {spec!r}: expected a class or function, found {type(made).__name__}")
        build = _builder(spec, made, _sized(made, args, sizes))
        return Source(lambda: _own_copy(build()), None, example)
    return _timm_source(spec, args, sizes)


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
    """A copy, as a factory that caches would hand out the very module that is being trained.

    Two kinds of tensors that deepcopy refuses are copied here: buffers of lazy layers, and what the older
    torch.nn.utils.weight_norm has computed. Raises TicketfindError for others.
    """
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        attributes = [*vars(module).values(), *module.buffers(recurse=False)]
        lists = [value for value in attributes if isinstance(value, list)]  # a recurrent layer's weights
        for value in itertools.chain(attributes, *lists):
            if isinstance(value, UninitializedBuffer):
                memo[id(value)] = UninitializedBuffer().to(value)
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TicketfindError(
            f"model: expected a module that copy.deepcopy can copy, found {type(model).__name__}: {one_line(error)}"
        ) from error


def _sized(factory: Callable[..., Any], args: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """`args`, completed by what the data says and the factory takes by name."""
    try:
        accepted = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return dict(args)
    return {name: value for name, value in sizes.items() if name in accepted} | dict(args)


def takes(spec: str, name: str) -> bool:
    """True if the factory that `spec` names has an argument of that name."""
    if spec in NETS or not is_code(spec):
        return True
    made = load_object(spec, "model")
    try:
        return callable(made) and not isinstance(made, nn.Module) and name in inspect.signature(made).parameters
    except (TypeError, ValueError):
        return False


def _sizes(example: Inputs | None, outputs: int | None) -> dict[str, Any]:
    """What the data says of a network's sizes, by the names that factories give them."""
    sizes: dict[str, Any] = {} if outputs is None else {"num_classes": outputs}
    if isinstance(example, Tensor):
        shape = tuple(example.shape[1:])
        sizes["input_shape"] = shape
        if len(shape) == 3:
            sizes |= {"in_chans": shape[0], "img_size": shape[1:]}
    return sizes


def _timm_source(spec: str, args: Mapping[str, Any], sizes: Mapping[str, Any]) -> Source:
    import timm

    if "checkpoint_path" in args:
        raise TicketfindError(
            f"model {spec!r}: checkpoint_path: give the file with --checkpoint, which runs no code in it"
        )
    name = spec.removeprefix("timm:")
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        known = [*NETS, *timm.list_models()]
        raise TicketfindError(
            f"model {spec!r}: expected a timm name, {', '.join(NETS)}, module:factory or file.py:factory"
            f"{suggest(spec, known)}"
        )
    unused = {"input_shape"} if _is_of_fixed_size(name) else {"input_shape", "img_size"}
    sized = {key: value for key, value in sizes.items() if key not in unused}
    sized |= {key: value for key, value in args.items() if key != "pretrained"}
    build = _builder(spec, timm.create_model, {"model_name": name, **sized})
    if not args.get("pretrained"):
        return Source(build, None)
    return Source(build, _loaded(_builder(spec, timm.create_model, {"model_name": name, **sized, "pretrained": True})))


def _is_of_fixed_size(name: str) -> bool:
    """True if a timm model takes images of one size, which its factory is told."""
    import timm

    config = None if ":" in name else timm.models.get_pretrained_cfg(name)
    return bool(getattr(config, "fixed_input_size", False))


def image_settings(spec: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """How images are prepared for a timm model, by its own configuration: keys of data.args; none for other models."""
    if spec in NETS or ":" in spec.removeprefix("timm:"):
        return {}
    import timm

    name = spec.removeprefix("timm:")
    config = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is None:
        return {}
    channels = args.get("in_chans", config.input_size[0])
    size = args.get("img_size", list(config.input_size[1:]))
    found = {"size": size, "crop": config.crop_pct, "interpolation": config.interpolation, "channels": channels}
    if config.crop_mode:
        found["crop_mode"] = config.crop_mode
    if channels == len(config.mean):
        found |= {"mean": list(config.mean), "std": list(config.std)}
    return found


def _loaded(build: Callable[[], nn.Module]) -> State:
    """The weights that `build` loads: those that do not depend on the seed, as a fresh head's do."""
    first, second = (state_of(Source(build, None).new(seed)) for seed in (0, 1))
    return {name: value for name, value in first.items() if torch.equal(value, second[name])}


def state_of(model: nn.Module) -> State:
    """A copy of every parameter and buffer."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
