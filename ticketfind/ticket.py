"""The ticket file, version 1: masks, initial weights, and where they come from. docs/ticket-format.md describes it."""

import filecmp
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ticketfind import TicketfindError, files, limits, masks
from ticketfind.digests import digest
from ticketfind.limits import short, shown
from ticketfind.masks import Masks
from ticketfind.provenance import FORMAT, KEY, Provenance, json_of, provenance_of, read_about
from ticketfind.tensorfile import read_tensors, save_tensors

SECTIONS = ("mask", "init")
"""What a file's tensors are called, before a slash and the parameter's name."""


@dataclass(frozen=True)
class Ticket:
    """A subnetwork: masks, and the weights that it starts from."""

    masks: Masks
    """Parameter name -> bool tensor, True = kept."""
    init: dict[str, Tensor]
    """State-dict key -> every parameter and buffer at the rewind point, pruned positions included."""
    about: Provenance
    complete: bool = True
    """False for one read from a compact file: `init` is zero where the mask prunes."""

    @property
    def remaining(self) -> float:
        """Weights remaining, as a fraction of the prunable weights."""
        return masks.remaining(self.masks)

    @property
    def moved(self) -> bool:
        """True under learning-rate rewinding: `init` is what the round before had trained."""
        return bool(self._setting("prune", "rewind") == "lr")

    @property
    def from_checkpoint(self) -> bool:
        """True if the search started from trained weights rather than from a random initialization."""
        args = self._setting("model", "args")
        pretrained = isinstance(args, dict) and bool(args.get("pretrained"))
        return pretrained or self._setting("model", "checkpoint") is not None

    def _setting(self, section: str, key: str) -> Any:
        keys = self.about.recipe.get(section)
        return keys.get(key) if isinstance(keys, dict) else None

    @property
    def first_seed(self) -> int:
        """The seed that the replicate was initialized with."""
        seed = self._setting("run", "seed")
        return (seed if isinstance(seed, int) else 0) + self.about.replicate

    def weights(self, under: Masks | None = None) -> dict[str, Tensor]:
        """A state dict: the initial weights with pruned ones zero, tied ones under all their names.

        under: other masks than the ticket's own.
        """
        kept = self.masks if under is None else under
        tied = {alias: kept[name] for alias, name in self.about.aliases.items() if name in kept}
        return masks.masked(self.init, {**kept, **{k: m for k, m in tied.items() if k in self.init}})

    def check_fits(self, model: nn.Module) -> None:
        """Raise TicketfindError, naming every entry that differs, unless this ticket is of `model`'s architecture."""
        wanted = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        faults = [f"{name} is not in the ticket" for name in wanted if name not in self.init]
        faults += [f"{name} is not in the model" for name in self.init if name not in wanted]
        faults += [
            f"{name} has shape {tuple(self.init[name].shape)} in the ticket, {tuple(wanted[name].shape)} in the model"
            for name in wanted
            if name in self.init and self.init[name].shape != wanted[name].shape
        ]
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise TicketfindError(f"the ticket does not fit the model: {'; '.join(faults[:5])}{more}")

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Put the ticket's initial weights and buffers into `model`, pruned weights exactly zero.

        Raises TicketfindError, with `model` untouched, where names or shapes differ.
        """
        self.check_fits(model)
        model.load_state_dict(self.weights(), strict=False)

    def hold(self, model: nn.Module, optimizer: Optimizer) -> Callable[[], None]:
        """Keep pruned weights of `model` at exactly zero in a training loop of your own.

        Hooks into ``optimizer.step``: gradients of pruned weights are zeroed before it, the weights after it, so that
        momentum and weight decay revive nothing. Returns a function that lets go. Raises TicketfindError where a
        masked parameter is missing or has another shape.
        """
        return hold(model, optimizer, self.masks)

    def save(self, path: Path | str, *, layout: str = "full", root: Path | None = None) -> None:
        """Write the ticket, whole or not at all.

        layout: "full", or "compact" (bit-packed masks, survivors only). root: a folder that must be there; None makes
        all that are missing. Raises TicketfindError where it cannot be written.
        """
        assert layout in ("full", "compact"), layout
        about = {"format": FORMAT, "layout": layout, "remaining": self.remaining, **asdict(self.about)}
        tensors = {f"init/{name}": value for name, value in self.init.items()}
        if layout == "compact":
            about["shapes"] = {name: list(mask.shape) for name, mask in sorted(self.masks.items())}
            tensors |= {f"init/{name}": self.init[name][mask] for name, mask in self.masks.items()}
            for alias, name in self.about.aliases.items():
                if name in self.masks:
                    del tensors[f"init/{alias}"]
            tensors |= {f"mask/{name}": pack_bits(mask) for name, mask in self.masks.items()}
        elif not self.complete:
            raise TicketfindError("a compact ticket has lost the pruned initial weights: it cannot be written in full")
        else:
            tensors |= {f"mask/{name}": mask for name, mask in self.masks.items()}
        about["sha256"] = {section: _digest_of(tensors, section) for section in SECTIONS}
        save_tensors(Path(path), tensors, {KEY: json.dumps(about)}, root=root)


def hold(model: nn.Module, optimizer: Optimizer, masks: Mapping[str, Tensor]) -> Callable[[], None]:
    """As `Ticket.hold`, under masks that come from elsewhere (parameter name -> bool tensor, True = kept)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            found = tuple(parameters[name].shape) if name in parameters else "none"
            raise TicketfindError(f"hold: expected a parameter {name} of shape {tuple(mask.shape)}, found {found}")
    pruned = [(parameters[name], ~mask.to(parameters[name].device)) for name, mask in masks.items()]

    @torch.no_grad()
    def zero_gradients(*_: Any) -> None:
        for parameter, gone in pruned:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(gone, 0.0)

    @torch.no_grad()
    def zero_weights(*_: Any) -> None:
        for parameter, gone in pruned:
            parameter.masked_fill_(gone, 0.0)

    zero_weights()
    hooks = [
        optimizer.register_step_pre_hook(zero_gradients),
        optimizer.register_step_post_hook(zero_weights),
    ]

    def release() -> None:
        for hook in hooks:
            hook.remove()

    return release


def load_ticket(path: Path | str, *, finite: bool = True) -> Ticket:
    """Read a ticket file of either layout onto the CPU. Nothing in it is executed.

    finite: whether surviving weights that are NaN or infinite are refused. Raises TicketfindError where they are, and
    where the file is missing, damaged, no ticket, or of a newer format.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path, "ticket")
    about = read_about(path, metadata)
    found_masks = {name.removeprefix("mask/"): value for name, value in tensors.items() if name.startswith("mask/")}
    init = {name.removeprefix("init/"): value for name, value in tensors.items() if name.startswith("init/")}
    compact = about["layout"] == "compact"
    if compact:
        _unpack(path, found_masks, init, about.get("shapes"))
    for name, mask in found_masks.items():
        if mask.dtype != torch.bool:
            raise TicketfindError(f"{path}: mask/{name}: expected bool, found {mask.dtype}")
        if name not in init or init[name].shape != mask.shape:
            found = tuple(init[name].shape) if name in init else "none"
            raise TicketfindError(f"{path}: init/{name}: expected the mask's shape {tuple(mask.shape)}, found {found}")
    if not any(mask.numel() for mask in found_masks.values()):
        raise TicketfindError(f"{path}: expected masks (mask/...), found none: not a ticket")
    provenance = provenance_of(path, about)
    for alias, name in provenance.aliases.items():
        if compact and isinstance(name, str) and name in found_masks:
            init.setdefault(alias, init[name])
        if not isinstance(name, str) or (
            name in found_masks and (alias not in init or init[alias].shape != init[name].shape)
        ):
            raise TicketfindError(
                f"{path}: metadata aliases: expected {alias} to be tied to a mask, found {shown(name)}"
            )
    ticket = Ticket(found_masks, init, provenance, complete=not compact)
    if finite and (bad := not_finite(ticket)):
        raise TicketfindError(
            f"{path}: init/{short(bad[0])}: expected finite weights, found NaN or infinity among those kept;"
            " the file is damaged, or its search went wrong"
        )
    return ticket


def not_finite(ticket: Ticket) -> list[str]:
    """The names of weights with NaN or infinity where the mask keeps them, and of all else with NaN.

    What has no mask may be infinite: attention masks, which are buffers, are.
    """
    masked = (name for name, mask in ticket.masks.items() if not _is_finite(ticket.init[name], mask))
    rest = (name for name in ticket.init if name not in ticket.masks)
    return [*masked, *(name for name in rest if _has_nan(ticket.init[name]))]


def _is_finite(value: Tensor, mask: Tensor) -> bool:
    """Whether it is where the mask keeps it."""
    return all(bool((part.isfinite() | ~kept).all()) for part, kept in zip(_parts(value), _parts(mask), strict=True))


def _has_nan(value: Tensor) -> bool:
    return any(bool(part.isnan().any()) for part in _parts(value))


def _parts(value: Tensor) -> Iterator[Tensor]:
    """A tensor's numbers, a quarter of a million at a time: what is on disk is to stay there.

    Those of 8 bits and fewer as larger ones, as PyTorch can tell little about them.
    """
    parts: tuple[Tensor, ...] = value.reshape(-1).split(2**18)  # type: ignore[no-untyped-call]
    for part in parts:
        yield part.float() if part.is_floating_point() and part.element_size() < 2 else part


def read_start(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A run's rewind point: every weight and buffer, and iteration, sigma, aliases and checkpoint_dtype of its tickets.

    Raises TicketfindError where the file is missing or damaged.
    """
    tensors, metadata = read_tensors(path, "rewind point")
    rest = {"recipe": {}, "round": 0, "replicate": 0, "claims": {}, "versions": {}}
    about = provenance_of(path, {**json_of(path, metadata), **rest})
    return tensors, {key: getattr(about, key) for key in ("iteration", "sigma", "aliases", "checkpoint_dtype")}


def changed_sections(path: Path) -> list[str] | None:
    """Which of a ticket file's sections (mask, init) are not as they were written, by the hashes in its metadata.

    None for a file without hashes, of an earlier version. Raises TicketfindError for a file that is no ticket.
    """
    tensors, metadata = read_tensors(path, "ticket")
    written = read_about(path, metadata).get("sha256")
    if not isinstance(written, dict):
        return None
    return [section for section in SECTIONS if written.get(section) != _digest_of(tensors, section)]


def _digest_of(tensors: Mapping[str, Tensor], section: str) -> str:
    """Of a section's tensors as the file has them, under their own names."""
    own = f"{section}/"
    return digest({name.removeprefix(own): value for name, value in tensors.items() if name.startswith(own)})


# ---------------------------------------------------------------------------------------- compact layout


def pack_bits(mask: Tensor) -> Tensor:
    """uint8 [ceil(n / 8)]: eight weights a byte, the first in the highest bit, as numpy.packbits does."""
    bits = mask.flatten().to(torch.uint8)
    bits = torch.cat([bits, bits.new_zeros(-bits.numel() % 8)]).view(-1, 8)
    return (bits << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool mask of `shape` that `pack_bits` packed."""
    bits = (packed.unsqueeze(1) >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1
    return bits.flatten()[: math.prod(shape)].bool().view(shape)


def _unpack(path: Path, packed: Masks, init: dict[str, Tensor], shapes: Any) -> None:
    """Replace packed masks and survivors by full-shaped tensors, in place."""
    if not isinstance(shapes, dict) or shapes.keys() != packed.keys():
        raise TicketfindError(f"{path}: metadata shapes: expected one for each mask of a compact ticket")
    left = limits.inflated(path.stat().st_size)
    for name, raw in shapes.items():
        if not isinstance(raw, list) or not all(type(side) is int and side >= 0 for side in raw):
            raise TicketfindError(f"{path}: metadata shapes: {name}: expected whole numbers, found {shown(raw)}")
        n = limits.elements(tuple(raw))
        if n is None:
            raise TicketfindError(f"{path}: metadata shapes: {name}: expected a tensor's shape, found {shown(raw)}")
        if packed[name].dtype != torch.uint8 or packed[name].shape != ((n + 7) // 8,) or name not in init:
            raise TicketfindError(f"{path}: mask/{name}: expected {(n + 7) // 8} bytes and init/{name} for shape {raw}")
        left -= n * (1 + init[name].element_size())
        if left < 0:
            raise TicketfindError(
                f"{path}: expected a compact ticket, found one that unpacks to much more than its size"
            )
        mask = unpack_bits(packed[name], tuple(raw))
        if init[name].numel() != int(mask.sum()):
            raise TicketfindError(
                f"{path}: init/{name}: expected {int(mask.sum())} surviving weights, found {init[name].numel()}"
            )
        full = init[name].new_zeros(tuple(raw))
        full.masked_scatter_(mask, init[name].flatten())
        packed[name], init[name] = mask, full


def write_as(ticket: Ticket, path: Path, form: str, *, force: bool) -> None:
    """Write `ticket` to `path` as "ticket", "compact", "dense" or "torch-prune".

    A file of that name with other content is replaced only with `force`; else TicketfindError.
    """
    with files.whole(path) as temporary:
        if form in ("ticket", "compact"):
            ticket.save(temporary, layout="full" if form == "ticket" else "compact")
        elif form == "dense":
            save_tensors(temporary, ticket.weights())
        else:
            save_tensors(temporary, torch_prune_state(ticket))
        if path.exists() and not force and not filecmp.cmp(path, temporary, shallow=False):
            raise TicketfindError(f"{path}: exists with other content; give another --out, or --force to replace it")


def torch_prune_state(ticket: Ticket) -> dict[str, Tensor]:
    """The state dict of a module pruned with torch.nn.utils.prune: weight_orig and weight_mask for each mask."""
    tied = {alias: ticket.masks[name] for alias, name in ticket.about.aliases.items() if name in ticket.masks}
    every = {**ticket.masks, **tied}
    state = {name: value for name, value in ticket.init.items() if name not in every}
    for name, mask in every.items():
        state[f"{name}_orig"] = ticket.init[name]
        state[f"{name}_mask"] = mask.to(ticket.init[name].dtype)
    return state
