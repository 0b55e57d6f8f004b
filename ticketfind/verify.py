"""Whether a ticket file or a run is what it says it is: every promise that can be checked from the files alone."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ticketfind import TicketfindError, contents, invariants, layers, masks, patterns, readers, ticket
from ticketfind.digests import digest
from ticketfind.masks import Masks
from ticketfind.recipe import Recipe
from ticketfind.retraining import Retraining
from ticketfind.rundir import RunDir
from ticketfind.tensorfile import read_metadata, read_tensors


@dataclass(frozen=True)
class Check:
    """One promise, and whether it is kept."""

    what: str
    passed: bool | None
    """None where the files do not say enough to check it."""
    found: str
    """What was looked at, or what is wrong."""


def of_ticket(path: Path) -> list[Check]:
    """The checks of a ticket file. Raises TicketfindError for a file that cannot be read as a ticket."""
    found = ticket.load_ticket(path, finite=False)
    bad = ticket.not_finite(found)
    share = json.loads(read_metadata(path, "ticket")["ticketfind"]).get("remaining")
    kept, size = masks.count(dict(found.masks)), sum(mask.numel() for mask in found.masks.values())
    checks = [
        _integrity(path),
        Check("masks fit the weights", True, f"{len(found.masks)} masks, {kept:,} of {size:,} weights kept"),
        Check(
            "surviving weights are finite",
            not bad,
            f"NaN or infinity in {', '.join(bad[:3])}" if bad else f"{len(found.init)} tensors",
        ),
        Check(
            "weights remaining are as it says", share == kept / size, f"{kept / size:.4%}, and it says {share!r:.20}"
        ),
    ]
    return checks + _pattern(found)


def _pattern(found: ticket.Ticket) -> list[Check]:
    """Of a ticket whose recipe names an N:M pattern: what is pruned keeps at least N in each block, and all alike."""
    section = found.about.recipe.get("prune")
    scope = str(section.get("scope")) if isinstance(section, Mapping) else ""
    if (pattern := readers.pattern(scope)) is None:
        return []
    keep, block = pattern
    counts = {name: patterns.kept_in_each(mask, block) for name, mask in found.masks.items() if not bool(mask.all())}
    bad = [name for name, count in counts.items() if count is None or count < keep]
    there = " and ".join(f"{count}:{block}" for count in sorted({count for count in counts.values() if count}))
    text = f"not {scope}: {', '.join(bad[:3])}" if bad else f"{there or 'nothing pruned'}, {len(counts)} masks"
    return [Check(f"masks are blocks of {block}", not bad, text)]


def _integrity(path: Path) -> Check:
    what = "contents are as they were written"
    changed = ticket.changed_sections(path)
    if changed is None:
        return Check(what, None, "the file holds no hashes: it was written by an earlier version")
    if changed:
        return Check(what, False, f"{' and '.join(changed)}: the SHA-256 is another than that in the metadata")
    return Check(what, True, "SHA-256 of masks and initial weights")


def of_run(run: RunDir) -> list[Check]:
    """The checks of a run, finished or not: every round and replicate in its log."""
    recipe, log = run.recipe(), run.log()
    try:
        rounds = contents.finished_rounds(run, recipe)
    except TicketfindError as error:
        return [Check("the log is sound", False, str(error))]
    trained = [line for line in log if "failed" not in line]
    lines = {(line["round"], line["replicate"]): line for line in trained}
    drawn = {at for at in lines if at[0] > 0} | run.masks()
    checks = [
        Check("the log is sound", True, f"{len(rounds)} finished rounds, {len(lines)} trainings"),
        _all("masks are nested, round by round", "masks", drawn, lambda at: _nested(run, *at)),
        _all(
            "weights kept are as planned", "counts", lines.keys() | drawn,
            lambda at: _counts(run, recipe, *at, lines.get(at)),
        ),
        _all(
            "every round began at the rewind point", "trainings", lines, lambda at: _began(run, recipe, lines[at])
        ),
    ]  # fmt: skip
    if run.ticket_file.exists():
        checks += of_ticket(run.ticket_file)
    if run.ticket_file.exists() or run.is_finished:
        checks.append(_is_winner(run))
    return checks


def of_retraining(found: Retraining) -> Check:
    """The accuracy that a ticket claims, and the one that it has reached again."""
    expected = f"{found.low:.2%} to {found.high:.2%} were to be expected from {found.claimed.mean:.2%}"
    text = f"{found.accuracy:.2%} at early stop; {expected}"
    return Check("the claimed accuracy is reached again", found.is_inside, text)


Fault = str | None
"""What is wrong; None where nothing is."""


class _Unknown(Exception):
    """The files do not say enough."""


def _all(
    what: str, kind: str, places: Collection[tuple[int, int]], fault_of: Callable[[tuple[int, int]], Fault]
) -> Check:
    """One check over rounds and replicates. kind: what there is one of in each place."""
    unknown = []
    for round, replicate in sorted(places):
        try:
            fault = fault_of((round, replicate))
        except _Unknown as reason:
            unknown.append(str(reason))
            continue
        except TicketfindError as error:
            fault = str(error)
        if fault is not None:
            return Check(what, False, f"round {round}, replicate {replicate}: {fault}")
    count = len(places) - len(unknown)
    text = f"{count} {kind}" + (f"; {len(unknown)} not checked: {unknown[0]}" if unknown else "")
    return Check(what, True if count else None, text)


def _mask(run: RunDir, round: int, replicate: int) -> Masks:
    if round == 0:
        return {}
    mask, _ = read_tensors(file := run.mask_file(round, replicate), "mask")
    if any(m.dtype != torch.bool for m in mask.values()):
        raise TicketfindError(f"{file}: expected masks of true and false, found other numbers")
    return mask


def _nested(run: RunDir, round: int, replicate: int) -> Fault:
    old, new = _mask(run, round - 1, replicate) if round > 1 else {}, _mask(run, round, replicate)
    if old and old.keys() != new.keys():
        return "other parameters have masks than in the round before"
    grown = [name for name in old if old[name].shape != new[name].shape or not masks.nested_in(new[name], old[name])]
    return f"{', '.join(grown)} keeps weights that were pruned before" if grown else None


def _counts(run: RunDir, recipe: Recipe, round: int, replicate: int, line: dict[str, Any] | None) -> Fault:
    """Against the plan that follows from the recipe and the shapes alone, and the log, where it has a line."""
    apart = recipe.prune.every is not None  # the first mask comes of a training of its own
    if round == 0 and apart and not run.mask_file(1, replicate).exists():
        raise _Unknown("no mask is drawn yet that says how large the dense network is")
    mask = _mask(run, max(1, round), replicate)  # those of the first pruning say how large the dense network is
    sizes = {name: m.numel() for name, m in mask.items()}
    kept = {name: int(m.sum()) for name, m in mask.items()} if round else sizes
    groups = masks.make_groups([*sizes], recipe.prune.fraction, recipe.prune.scope, recipe.prune.rounds)
    planned = masks.plan(sizes, groups, recipe.prune.rounds, recipe.prune.until)
    if round >= len(planned):
        return f"{len(planned) - 1} rounds are planned"
    count, total = planned[round], planned[0]
    if sum(kept.values()) != count:
        return f"{sum(kept.values())} weights are kept, {count} are planned"
    if round and (off := masks.off_pattern(mask, groups, round)):
        return f"{', '.join(off)}: not {recipe.prune.scope}, or not as many of each block as this round has"
    if line is None:
        return None
    if line.get("kept") != count or line.get("kept_per_tensor") != kept or line.get("remaining") != count / total:
        return f"the log says {line.get('kept')} weights, or other counts of single tensors than the mask has"
    return None


def _began(run: RunDir, recipe: Recipe, line: dict[str, Any]) -> Fault:
    """What the network held before its first iteration, as noted then, is the rewind point under the mask."""
    round, replicate = line["round"], line["replicate"]
    if "began" not in line or line["began"] is None:
        raise _Unknown("the log does not say what they began with")
    moves = recipe.prune.rewind == "lr"
    if round == 0 and not moves and str(recipe.prune.rewind) != "0it":
        raise _Unknown("the dense training began before the rewind point")
    if round == 0 and recipe.model.trained is not None:
        raise _Unknown("the dense training is not the search's own")
    start, facts = ticket.read_start(run.start_file(replicate, round if moves else None))
    mask = _mask(run, round, replicate)
    if any(name not in start or start[name].shape != m.shape for name, m in mask.items()):
        return "the masks are of another network than the rewind point"
    expected = masks.masked(start, mask)
    if digest({name: value for name, value in expected.items() if name not in facts["aliases"]}) != line["began"]:
        return "the training began with other weights than the rewind point under the mask"
    return None


_FACTS = ("claims", "iteration", "sigma", "aliases", "checkpoint_dtype")
"""What a winner's file says that follows from the run's other files, beside its recipe."""


def _is_winner(run: RunDir) -> Check:
    """The ticket file against the run's other files."""
    what = "the ticket is the run's winner"
    try:
        choice = contents.chosen(run, None)
    except TicketfindError:
        there = run.ticket_file.exists()
        return Check(what, not there, "no round of the log wins" + (", and there is a ticket" if there else ""))
    if not run.ticket_file.exists():
        return Check(what, False, f"round {choice.round} wins, and {run.ticket_file.name} is missing")
    found = ticket.load_ticket(run.ticket_file)
    if (found.about.round, found.about.replicate) != (choice.round, choice.replicate):
        return Check(what, False, "not as in the run: its round or replicate")
    expected = contents.load(run, choice.round, choice.replicate)
    said, true = asdict(found.about), json.loads(json.dumps(asdict(expected.about)))
    faults = [
        *_differing("mask", dict(found.masks), dict(expected.masks)),
        *_differing("init", dict(found.init), dict(expected.init)),
        *(f"its {key}" for key in _FACTS if said[key] != true[key]),
        *(["its recipe"] if _is_of_another_recipe(found, run) else []),
    ]
    if faults:
        return Check(what, False, f"not as in the run: {', '.join(faults[:3])}")
    return Check(what, True, f"round {choice.round}, replicate {choice.replicate}")


def _is_of_another_recipe(found: ticket.Ticket, run: RunDir) -> bool:
    """With what a later version adds to recipes filled in on both sides."""
    try:
        return any(layers.differences(layers.from_layers(found.about.recipe), run.recipe()))
    except TicketfindError:
        return True


def _differing(section: str, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> Iterator[str]:
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b or not invariants.is_same(a[name], b[name]):
            yield f"{section}/{name}"
