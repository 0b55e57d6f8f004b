"""What trainings gave, summed up over replicates: means, spreads, which rounds match, the winner. No torch."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ticketfind import TicketfindError


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One finished training in four numbers. Accuracies are fractions, on the test set."""

    early_stop: int
    """Iteration of the minimum validation loss, found afterwards."""
    accuracy_early: float
    """Test accuracy there."""
    accuracy_end: float
    """Test accuracy after the last iteration."""
    validation_loss: float | None
    """The minimum itself; None where a training of the user's own does not tell it."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1; None for one value)."""

    mean: float
    sd: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The spread of at least one value."""
        found = tuple(values)
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, found)


@dataclass(frozen=True)
class Stats:
    """Replicates of one training summed up."""

    accuracy_early: Spread
    accuracy_end: Spread
    early_stop: Spread

    @classmethod
    def of(cls, measured: Sequence[Measured]) -> "Stats":
        """The stats of at least one replicate."""
        return cls(
            Spread.of(m.accuracy_early for m in measured),
            Spread.of(m.accuracy_end for m in measured),
            Spread.of(float(m.early_stop) for m in measured),
        )

    @property
    def replicates(self) -> int:
        """How many trainings are summed up."""
        return len(self.early_stop.values)

    def json(self) -> dict[str, Any]:
        """STATS of docs/json.md."""
        return {**asdict(self), "replicates": self.replicates}


def tolerance(dense: Stats, given: float | None, test_size: int | None) -> float:
    """How far, as a fraction, below the dense mean still matches.

    given: percentage points, or None for one standard deviation of the dense replicates; with one replicate, or without
    any spread, one standard error of a proportion over `test_size` examples (0 where that is not known).
    """
    if given is not None:
        return given / 100
    if dense.accuracy_early.sd:
        return dense.accuracy_early.sd
    if test_size is None:
        return 0.0
    p = min(max(dense.accuracy_early.mean, 0.0), 1.0)
    return math.sqrt(p * (1 - p) / test_size)


def is_matching(stats: Stats, dense: Stats, allowed: float) -> bool:
    """True if the mean accuracy at early stop is at most `allowed` (a fraction) below the dense mean.

    Equal up to rounding counts as equal: whole images decide.
    """
    return stats.accuracy_early.mean >= dense.accuracy_early.mean - allowed - 1e-9


@dataclass(frozen=True)
class Round:
    """One finished round over its replicates."""

    round: int
    remaining: float
    stats: Stats
    matching: bool
    best_replicate: int
    """The replicate of the lowest validation loss, the first where none is known: not chosen by the test set."""

    def json(self) -> dict[str, Any]:
        """One entry of `rounds` in docs/json.md."""
        return {
            "round": self.round,
            "remaining": self.remaining,
            "matching": self.matching,
            **self.stats.json(),
        }


def rounds_of(log: Sequence[Mapping[str, Any]], *, replicates: int, given_tolerance: float | None) -> list[Round]:
    """The finished rounds (all their replicates logged) in a run's log, in order."""
    by_round: dict[int, dict[int, Mapping[str, Any]]] = {}
    for line in log:
        by_round.setdefault(line["round"], {})[line["replicate"]] = line
    rounds: list[Round] = []
    dense: Stats | None = None
    allowed = 0.0
    for number in range(len(by_round)):
        lines = by_round.get(number, {})
        if len(lines) < replicates:
            break
        lacking = [
            key
            for key in (*Measured.__dataclass_fields__, "remaining", "test_size")
            for r in lines
            if key not in lines[r]
        ]
        if lacking:
            raise TicketfindError(
                f"log.jsonl: round {number}: expected {', '.join(sorted(set(lacking)))}, found no such key"
            )
        measured = [
            Measured(**{key: lines[r][key] for key in Measured.__dataclass_fields__}) for r in range(replicates)
        ]
        stats = Stats.of(measured)
        if dense is None:
            dense = stats
            allowed = tolerance(dense, given_tolerance, lines[0]["test_size"])
        best = min(range(replicates), key=lambda r: _loss(measured[r]))
        rounds.append(Round(number, lines[0]["remaining"], stats, is_matching(stats, dense, allowed), best))
    return rounds


def _loss(measured: Measured) -> float:
    return math.inf if measured.validation_loss is None else measured.validation_loss


def winner_of(rounds: Sequence[Round]) -> Round | None:
    """The sparsest matching round; None if no pruned round matches."""
    matching = [r for r in rounds if r.matching and r.round > 0]
    return min(matching, key=lambda r: r.remaining) if matching else None
