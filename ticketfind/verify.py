"""Whether a ticket file or a run is what it says it is: every promise that can be checked from the files alone."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ticketfind import TicketfindError, contents, invariants, masks, results, ticket
from ticketfind.digests import digest
from ticketfind.experiments import Retraining
from ticketfind.masks import Masks
from ticketfind.recipe import Recipe
from ticketfind.rundir import RunDir
from ticketfind.tensorfile import read_tensors


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
    claim = found.about.claims.get("ticket")
    share = claim.get("remaining") if isinstance(claim, dict) else None
    share = share if isinstance(share, float) else None
    kept, size = masks.count(dict(found.masks)), sum(mask.numel() for mask in found.masks.values())
    return [
        _integrity(path),
        Check("masks fit the weights", True, f"{len(found.masks)} masks, {kept:,} of {size:,} weights kept"),
        Check(
            "surviving weights are finite",
            not bad,
            f"NaN or infinity in {', '.join(bad[:3])}" if bad else f"{len(found.init)} tensors",
        ),
        *([] if share is None else [Check("weights remaining", abs(share - kept / size) < 1e-9, f"{share:.4%}")]),
    ]


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
    checks = [
        Check("the log is sound", True, f"{len(rounds)} finished rounds, {len(lines)} trainings"),
        _all("masks are nested, round by round", lines, lambda at: _nested(run, *at)),
        _all("weights kept are as planned", lines, lambda at: _counts(run, recipe, lines[at])),
        _all("every round began at the rewind point", lines, lambda at: _began(run, recipe, lines[at])),
    ]
    if run.ticket_file.exists():
        checks += [*of_ticket(run.ticket_file), _is_winner(run, recipe, rounds)]
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


def _all(what: str, lines: dict[tuple[int, int], Any], fault_of: Callable[[tuple[int, int]], Fault]) -> Check:
    """One check over all trainings."""
    unknown = []
    for round, replicate in sorted(lines):
        try:
            fault = fault_of((round, replicate))
        except _Unknown as reason:
            unknown.append(str(reason))
            continue
        except TicketfindError as error:
            fault = str(error)
        if fault is not None:
            return Check(what, False, f"round {round}, replicate {replicate}: {fault}")
    count = len(lines) - len(unknown)
    text = f"{count} trainings" + (f"; {len(unknown)} not checked: {unknown[0]}" if unknown else "")
    return Check(what, True if count else None, text)


def _mask(run: RunDir, round: int, replicate: int) -> Masks:
    return {} if round == 0 else read_tensors(run.mask_file(round, replicate), "mask")[0]


def _nested(run: RunDir, round: int, replicate: int) -> Fault:
    old, new = _mask(run, round - 1, replicate) if round > 1 else {}, _mask(run, round, replicate)
    if old and old.keys() != new.keys():
        return "other parameters have masks than in the round before"
    grown = [name for name in old if old[name].shape != new[name].shape or not masks.nested_in(new[name], old[name])]
    return f"{', '.join(grown)} keeps weights that were pruned before" if grown else None


def _counts(run: RunDir, recipe: Recipe, line: dict[str, Any]) -> Fault:
    """Against the log, and against the plan that follows from the recipe and the shapes alone."""
    round, replicate = line["round"], line["replicate"]
    if round == 0:
        return None
    mask = _mask(run, round, replicate)
    sizes = {name: m.numel() for name, m in mask.items()}
    groups = masks.make_groups([*sizes], recipe.prune.fraction, recipe.prune.scope)
    planned = masks.plan(sizes, groups, recipe.prune.rounds, recipe.prune.until)[round]
    kept = {name: int(m.sum()) for name, m in mask.items()}
    if sum(kept.values()) != planned:
        return f"{sum(kept.values())} weights are kept, {planned} are planned"
    if line.get("kept") != planned or line.get("kept_per_tensor") != kept:
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
    expected = masks.masked(start, _mask(run, round, replicate))
    if digest({name: value for name, value in expected.items() if name not in facts["aliases"]}) != line["began"]:
        return "the training began with other weights than the rewind point under the mask"
    return None


def _is_winner(run: RunDir, recipe: Recipe, rounds: list[results.Round]) -> Check:
    """The ticket file against the run's other files."""
    what = "the ticket is the run's winner"
    found, winner = ticket.load_ticket(run.ticket_file), results.winner_of(rounds)
    if winner is None and recipe.model.trained is None:
        return Check(what, False, "no round of the log wins")
    expected = contents.load(run, found.about.round, found.about.replicate)
    faults = [
        *(["its round or replicate"] if winner and _place(found) != (winner.round, winner.best_replicate) else []),
        *_differing("mask", dict(found.masks), dict(expected.masks)),
        *_differing("init", dict(found.init), dict(expected.init)),
        *(["its claims"] if found.about.claims != json.loads(json.dumps(expected.about.claims)) else []),
    ]
    if faults:
        return Check(what, False, f"not as in the run: {', '.join(faults[:3])}")
    return Check(what, True, f"round {found.about.round}, replicate {found.about.replicate}")


def _place(found: ticket.Ticket) -> tuple[int, int]:
    return found.about.round, found.about.replicate


def _differing(section: str, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> Iterator[str]:
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b or not invariants.is_same(a[name], b[name]):
            yield f"{section}/{name}"
