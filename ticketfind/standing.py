"""Where a search stands, by its logs: which replicates are left, which trainings are over, which rounds match."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ticketfind.results import Line, Round


@dataclass(frozen=True)
class Standing:
    """The logs of a search, as they are at one moment."""

    replicates: int
    log: Sequence[Line]
    """Trainings that are over, and replicates that have failed."""
    drawn: Sequence[Line]
    """Trainings that are over and were there for the next mask alone."""
    rounds: Mapping[int, Round]
    """The finished ones, by number."""

    @functools.cached_property
    def failures(self) -> dict[int, Line]:
        """The line with which a replicate has ended, by replicate."""
        return {line["replicate"]: line for line in self.log if "failed" in line}

    def alive(self, round: int) -> list[int]:
        """Replicates that there is something to train of in a round: they have not failed before."""
        ended = self.failures
        return [r for r in range(self.replicates) if r not in ended or _last_alive(ended[r]) >= round]

    def left(self, round: int) -> list[int]:
        """Those that have not failed in it either."""
        ended = self.failures
        return [r for r in range(self.replicates) if r not in ended or ended[r]["round"] > round]

    def over(self, round: int) -> set[int]:
        """Replicates whose training in a round is over, if only because it failed."""
        return {line["replicate"] for line in self.log if line["round"] == round}

    def measured(self, round: int) -> set[int]:
        """Those of them that have not failed in it."""
        return {line["replicate"] for line in self.log if line["round"] == round and "failed" not in line}

    def drawn_over(self, round: int) -> set[int]:
        """Replicates whose training for the next mask alone is over, if only because it failed."""
        drawn = {line["replicate"] for line in self.drawn if line["round"] == round}
        return drawn | {replicate for replicate, line in self.failures.items() if _last_alive(line) == round}

    def known(self, rounds: range) -> set[int]:
        """Rounds of which all is known: they are measured, or no replicate is left that could be."""
        return {round for round in rounds if self.over(round).issuperset(self.alive(round))}

    def is_matching(self, round: int) -> bool:
        """Whether a round is finished, and matches."""
        return round in self.rounds and self.rounds[round].matching

    def bracket(self, rounds: range) -> int | None:
        """The round halfway from the sparsest known to match to the next that is known; None where there is none.

        A function of the log alone, so that a search that is resumed goes on as it would have.
        """
        known = self.known(rounds)
        matching = max((round for round in known if self.is_matching(round)), default=0)
        failing = min((round for round in known if round > matching), default=rounds.stop)
        return (matching + failing) // 2 if failing - matching > 1 else None


def _last_alive(line: Line) -> int:
    """The last round in which a replicate that has ended with this line of the log is trained, if only in part."""
    return int(line["round"]) - ("untrained" in line)
