"""What trainings gave, summed up over replicates: means, spreads, which rounds match, the winner. No torch."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from ticketfind import TicketfindError, intervals


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One finished training in four numbers. Accuracies are fractions, on the test set."""

    early_stop: float
    """Iteration of the minimum validation loss, found afterwards."""
    accuracy_early: float
    """Test accuracy there."""
    accuracy_end: float
    """Test accuracy after the last iteration."""
    validation_loss: float | None
    """The minimum itself; None where a training of the user's own does not tell it."""


def average(measured: Sequence[Measured]) -> Measured:
    """Trainings of one replicate as one: what its values are the mean of."""
    losses = [m.validation_loss for m in measured if m.validation_loss is not None]
    return Measured(
        early_stop=statistics.fmean(m.early_stop for m in measured),
        accuracy_early=statistics.fmean(m.accuracy_early for m in measured),
        accuracy_end=statistics.fmean(m.accuracy_end for m in measured),
        validation_loss=statistics.fmean(losses) if len(losses) == len(measured) else None,
    )


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

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval for the mean (Student); None for one value."""
        found = intervals.of_mean(self.values)
        return None if found is None else found.bounds

    def json(self) -> dict[str, Any]:
        """SPREAD of docs/json.md."""
        return {"mean": self.mean, "sd": self.sd, "interval": self.interval, "values": self.values}


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
        spreads = ("accuracy_early", "accuracy_end", "early_stop")
        return {**{name: getattr(self, name).json() for name in spreads}, "replicates": self.replicates}


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
    replicates: tuple[int, ...] = ()
    """Those that were trained to the end."""
    failed: Mapping[int, str] = field(default_factory=dict)
    """Those that failed in this round, and why; later rounds are without them."""

    def json(self) -> dict[str, Any]:
        """One entry of `rounds` in docs/json.md."""
        return {
            "round": self.round,
            "remaining": self.remaining,
            "matching": self.matching,
            **self.stats.json(),
            "failed": {str(replicate): reason for replicate, reason in self.failed.items()},
        }


@dataclass(frozen=True)
class Evaluated:
    """What evaluations of one round found."""

    round: int
    remaining: float
    """Weights remaining, a fraction."""
    arms: Mapping[str, Stats]
    attacks: Mapping[str, Mapping[str, Spread]] = field(default_factory=dict)
    """Accuracy at the end by attack (`clean` without one) and arm, all of the same trainings on the same examples."""
    examples: int | None = None
    """How many were attacked; None where that is not known."""
    inputs: tuple[float, float] | None = None
    """The lowest and the highest of their inputs; None where that is not known."""

    @property
    def attacked(self) -> str:
        """The examples that were attacked, in words."""
        count = "" if self.examples is None else f"{self.examples:,} "
        between = "" if self.inputs is None else f" (inputs from {self.inputs[0]:.4g} to {self.inputs[1]:.4g})"
        return f"the same {count}test examples{between}"


Line = Mapping[str, Any]
"""One entry of a run's log: a training that is over."""


def rounds_of(log: Sequence[Line], *, replicates: int, given_tolerance: float | None) -> list[Round]:
    """The finished rounds in a run's log, in order: those in which every replicate that had not failed is over.

    Raises TicketfindError for a line that is not as a search writes it.
    """
    by_round: dict[int, dict[int, Line]] = {}
    for line in log:
        by_round.setdefault(line["round"], {})[line["replicate"]] = line
    rounds: list[Round] = []
    dense: Stats | None = None
    allowed, left = 0.0, set(range(min(replicates, max(map(len, by_round.values()), default=0) + 1)))
    for number, lines in sorted(by_round.items()):
        failed = {r: str(lines[r]["failed"]) for r in sorted(left & lines.keys()) if "failed" in lines[r]}
        is_finished = left <= lines.keys()
        left -= failed.keys()
        if not left or (dense is None and number > 0):
            break
        if not is_finished:
            continue
        here = {r: _measured(lines[r]) for r in sorted(left)}
        first = lines[min(left)]
        stats = Stats.of([*here.values()])
        if dense is None:
            dense = stats
            allowed = tolerance(dense, given_tolerance, first["test_size"])
        best = min(here, key=lambda r: _loss(here[r]))
        matching = is_matching(stats, dense, allowed)
        rounds.append(Round(number, first["remaining"], stats, matching, best, tuple(here), failed))
    return rounds


_NUMBERS = {
    "early_stop": False,
    "accuracy_early": False,
    "accuracy_end": False,
    "remaining": False,
    "validation_loss": True,
    "test_size": True,
}
"""What a line of the log says of a training that has not failed: whether it may be null, too."""


def _measured(line: Line) -> Measured:
    where = f"log.jsonl: round {line['round']}, replicate {line['replicate']}"
    lacking = [key for key in _NUMBERS if key not in line]
    if lacking:
        raise TicketfindError(f"{where}: expected {', '.join(lacking)}, found no such key")
    for key, or_null in _NUMBERS.items():
        value = line[key]
        good = is_finite(value) and (key != "test_size" or value >= 1)
        if not good and not (or_null and value is None):
            raise TicketfindError(f"{where}: {key}: expected a number, found {str(value)[:40]!r}")
    return Measured(**{key: line[key] for key in Measured.__dataclass_fields__})


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value that was read from a file is a number, and one to reckon with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def _loss(measured: Measured) -> float:
    return math.inf if measured.validation_loss is None else measured.validation_loss


def winner_of(rounds: Sequence[Round]) -> Round | None:
    """The sparsest matching round; None if no pruned round matches."""
    matching = [r for r in rounds if r.matching and r.round > 0]
    return min(matching, key=lambda r: r.remaining) if matching else None


def is_chance(stats: Stats, chance: float, test_size: int | None) -> bool:
    """True if the mean accuracy is not clearly above `chance`, that of always giving the same answer.

    Clearly: by two standard errors of a proportion over `test_size` examples, which all replicates are measured on.
    """
    error = math.sqrt(chance * (1 - chance) / test_size) if test_size else 0.0
    return stats.accuracy_early.mean <= chance + 2 * error
