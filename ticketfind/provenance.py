"""Where a ticket comes from: the metadata of its file, checked entry by entry. docs/ticket-format.md describes it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ticketfind import TicketfindError, limits
from ticketfind.limits import short, shown

FORMAT = 1
KEY = "ticketfind"
"""Under which a file's metadata has all of it, as JSON."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a ticket comes from: everything in the file's metadata but its layout."""

    recipe: dict[str, Any]
    """The resolved recipe, as plain values."""
    round: int
    """Prunings that the mask has behind it."""
    replicate: int
    """Which of the run's replicates."""
    iteration: int
    """The iteration of the dense training that `init` was taken at: training starts here."""
    sigma: dict[str, float]
    """Per masked parameter, the standard deviation of its initialization (of the checkpoint's weights for one)."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Tied parameters: further name -> name of the mask."""
    claims: dict[str, Any] = field(default_factory=dict)
    """What the search measured: accuracies as fractions, over the run's replicates."""
    versions: dict[str, str] = field(default_factory=dict)
    """ticketfind, torch, python."""
    checkpoint_dtype: str | None = None
    """Types of the checkpoint's weights, where the search started from one; `init` has the model's."""


def read_about(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """A ticket file's JSON object, of a format and layout that can be read; TicketfindError for any other."""
    about = {"format": None, **json_of(path, metadata)}
    if about["format"] is None:
        raise TicketfindError(f"{path}: expected a format number in the ticketfind metadata")
    if about["format"] > FORMAT:
        raise TicketfindError(
            f"{path}: ticket format {about['format']} is newer than this ticketfind reads ({FORMAT}); upgrade"
        )
    if about.get("layout") not in ("full", "compact"):
        raise TicketfindError(f"{path}: layout: expected full or compact, found {shown(about.get('layout'))}")
    return about


def json_of(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object in a file's metadata. Raises TicketfindError where there is none."""
    if KEY not in metadata:
        raise TicketfindError(f"{path}: expected a ticket, found a safetensors file without ticketfind metadata")
    try:
        about = limits.read_json(metadata[KEY].encode())
    except ValueError as error:
        raise TicketfindError(f"{path}: expected JSON in the ticketfind metadata: {error}") from error
    if not isinstance(about, dict) or ("format" in about and type(about["format"]) is not int):
        raise TicketfindError(f"{path}: expected a format number in the ticketfind metadata")
    return about


def provenance_of(path: Path, about: Mapping[str, Any]) -> Provenance:
    """What the JSON object says, checked. Raises TicketfindError for an entry that is missing or of another kind."""
    kinds: dict[str, type] = {
        **dict.fromkeys(("recipe", "sigma", "aliases", "claims", "versions"), dict),
        **dict.fromkeys(("round", "replicate", "iteration"), int),
    }
    for key, kind in kinds.items():
        if not isinstance(about.get(key), kind):
            raise TicketfindError(
                f"{path}: metadata {key}: expected {kind.__name__}, found {type(about.get(key)).__name__}"
            )
        if kind is int and not 0 <= about[key] < 2**63:
            raise TicketfindError(f"{path}: metadata {key}: expected a count, found {shown(about[key])}")
    _check_entries(path, about)
    dtype = about.get("checkpoint_dtype")
    if dtype is not None and not isinstance(dtype, str):
        raise TicketfindError(f"{path}: metadata checkpoint_dtype: expected str, found {type(dtype).__name__}")
    return Provenance(**{key: about[key] for key in kinds}, checkpoint_dtype=dtype)


def _check_entries(path: Path, about: Mapping[str, Any]) -> None:
    """Raise TicketfindError unless the metadata's mappings hold what they should."""
    for key, name, good in (
        *(("sigma", name, _is_number(sigma) and sigma >= 0) for name, sigma in about["sigma"].items()),
        *(("versions", name, isinstance(version, str)) for name, version in about["versions"].items()),
        *(("claims", name, _is_stats(claim)) for name, claim in about["claims"].items()),
    ):
        if not good:
            found = shown(about[key][name], 60)
            raise TicketfindError(f"{path}: metadata {key}: expected another value for {short(name)} than {found}")
    if fault := limits.fault_of(about["recipe"]):
        raise TicketfindError(f"{path}: metadata recipe: expected a recipe, found {fault}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def _is_stats(value: Any) -> bool:
    """STATS of docs/json.md, as far as a file has it."""
    spreads = (
        [value[key] for key in ("accuracy_early", "accuracy_end", "early_stop") if key in value]
        if isinstance(value, dict)
        else [None]
    )
    return all(
        isinstance(spread, dict)
        and _is_number(spread.get("mean"))
        and (spread.get("sd") is None or _is_number(spread["sd"]))
        and isinstance(spread.get("values"), list)
        and all(map(_is_number, spread["values"]))
        for spread in spreads
    )
