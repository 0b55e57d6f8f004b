"""The lottery ticket paper's claims (arXiv 1803.03635), each held against one run's figures. No files, no torch.

A claim has parts. A part is shown or refuted where a 95 % interval (Student, Welch) says so; a claim holds if every
part is shown, and does not if one is refuted. What neither shows nor refutes is undecided; what was not measured is not
tested.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ticketfind import intervals
from ticketfind.intervals import Interval
from ticketfind.results import Evaluated, Round, Spread, Stats

HOLDS, DOES_NOT, UNDECIDED, NOT_TESTED = "holds", "does not", "undecided", "not tested"

TEXTS = {
    1: "Tickets match dense accuracy with a small part of the weights, in at most the same iterations",
    2: "They learn faster",
    3: "Accuracy first rises, then falls (Occam's hill)",
    4: "Re-initialized, the same mask learns slower and ends lower, the sparser the worse",
    5: "Random sparsity is worse still",
    6: "Noise of 0.5 sigma on the initial weights barely matters; more costs more; 3 sigma still beats reinit",
    7: "Ticket weights change more in the dense run than the others",
    8: "One-shot pruning works at moderate sparsity; iterative wins at high sparsity",
    9: "Pruning by magnitude at iteration 0 is worse than the mask re-initialized",
    10: "Prune fractions of 0.1 and 0.2 are clearly better than 0.4 and more",
    11: "Dropout and pruning add up",
    12: "Deep networks at high learning rates need warmup or late rewinding",
}


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and what one run says of it."""

    number: int
    text: str
    status: str
    """holds, does not, undecided or not tested."""
    figures: str
    """The run's figures and how to read them; where it is not tested, why, and the command that would test it."""


@dataclass(frozen=True)
class Findings:
    """All that a run has to say."""

    rounds: Sequence[Round]
    evaluated: Sequence[Evaluated] = ()
    """Densest first."""
    movement: Sequence[tuple[float, float]] = ()
    """For each replicate the mean |w_T - w_0| of the dense training, over the weights kept and over those pruned."""
    tolerance: float = 0.0
    """How far below the dense accuracy still matches, a fraction."""
    test_size: int | None = None
    step: int = 1
    """Iterations between two evaluations: how exact early stops are."""
    last: int | None = None
    """Last iteration at which a training can stop."""
    apart: str | None = None
    """Why early stops of tickets and of the dense network do not compare; None where they do."""
    run: str = "RUN"
    """How the run is named on a command line."""


@dataclass(frozen=True)
class Part:
    """A part of a claim. shown: True, False where it is refuted, None where it is neither."""

    shown: bool | None
    figures: str


def of_run(found: Findings) -> list[Claim]:
    """The claims, in order."""
    return [
        claim_of(number, rule(found) if found.rounds else "no finished round: ticketfind search")
        for number, rule in enumerate(_RULES, 1)
    ]


def claim_of(number: int, parts: "list[Part] | str") -> Claim:
    """Claim `number` by its parts; or not tested, and why."""
    text = TEXTS[number]
    if isinstance(parts, str):
        return Claim(number, text, NOT_TESTED, parts)
    shown = [part.shown for part in parts]
    status = DOES_NOT if False in shown else HOLDS if all(shown) else UNDECIDED
    return Claim(number, text, status, "; ".join(part.figures for part in parts))


# ------------------------------------------------------------------------------------------- comparisons

ONE = "one replicate: ticketfind search with --replicates 5"
SMALL = 0.25
"""A small part of the weights; the paper's figures at this size are of 21 %."""


def compared(a: Stats, b: Stats, found: Findings, *, level: float = 0.95) -> Interval | None:
    """a - b at early stop; no spread is taken for smaller than one test example."""
    least = 1 / found.test_size if found.test_size else 0.0
    return intervals.of_difference(a.accuracy_early.values, b.accuracy_early.values, least=least, level=level)


def _stops(a: Stats, b: Stats, found: Findings) -> Interval | None:
    """a - b, iterations; no spread is taken for smaller than that of rounding to a step."""
    return intervals.of_difference(a.early_stop.values, b.early_stop.values, least=found.step / 12**0.5)


def above(difference: Interval, margin: float = 0.0) -> bool | None:
    """Whether the difference is above `margin`."""
    return True if difference.low > margin else False if difference.high < margin else None


def points(difference: Interval) -> str:
    """A difference of accuracies, for people."""
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.mean:+.2f} points (95 %: {low:+.2f} to {high:+.2f})"


def _iterations(difference: Interval) -> str:
    return f"{difference.mean:+,.0f} iterations (95 %: {difference.low:+,.0f} to {difference.high:+,.0f})"


def share(remaining: float) -> str:
    """Weights remaining, for people."""
    return f"{100 * remaining:.3g} %"


def _percent(values: Spread) -> str:
    return f"{100 * values.mean:.2f} %"


def _small(found: Findings) -> Round | str:
    """The densest round that keeps a small part of the weights: a choice that no accuracy takes part in."""
    pruned = [r for r in found.rounds if r.round and r.remaining <= SMALL]
    if not pruned:
        return f"no round keeps {share(SMALL)} or less of the weights: ticketfind search with more --rounds"
    if min(pruned[0].stats.replicates, found.rounds[0].stats.replicates) < 2:
        return ONE
    return pruned[0]


def _with(found: Findings, *names: str) -> list[Evaluated] | str:
    """The evaluated rounds that have all these arms, densest first; or what is lacking."""
    there = [e for e in found.evaluated if all(name in e.arms for name in names)]
    if not there:
        return f"no evaluation has {' and '.join(names)}"
    several = [e for e in there if all(e.arms[name].replicates > 1 for name in names)]
    return several or ONE


# ------------------------------------------------------------------------------------------------ rules


def _matches(found: Findings) -> list[Part] | str:
    small, dense = _small(found), found.rounds[0].stats
    if isinstance(small, str):
        return small
    accuracy, stops = compared(small.stats, dense, found), _stops(small.stats, dense, found)
    assert accuracy is not None and stops is not None
    later = above(stops, found.step)
    sooner = Part(None if later is None else not later, f"it stops {_iterations(stops)} from the dense network")
    return [
        Part(
            above(accuracy, -found.tolerance - 1e-9),
            f"at {share(small.remaining)} {_percent(small.stats.accuracy_early)}, dense"
            f" {_percent(dense.accuracy_early)}: {points(accuracy)};"
            f" down to {-100 * found.tolerance or 0:.2f} it matches",
        ),
        sooner if found.apart is None else Part(None, found.apart),
    ]


def _faster(found: Findings) -> list[Part] | str:
    if found.apart is not None:
        return found.apart
    small, dense = _small(found), found.rounds[0].stats
    if isinstance(small, str):
        return small
    stops = _stops(small.stats, dense, found)
    assert stops is not None
    sooner = above(Interval(-stops.mean, -stops.high, -stops.low))
    if sooner is not True and found.last is not None and max(dense.early_stop.values) >= found.last:
        return (
            f"the dense network was still learning at its last iteration ({found.last:,}), so that it is not known"
            f" when it stops: ticketfind search with more --iterations"
        )
    ratio = dense.early_stop.mean / small.stats.early_stop.mean if small.stats.early_stop.mean else 0
    times = f", {ratio:.2f} times as fast" if ratio else ""
    return [
        Part(
            sooner,
            f"at {share(small.remaining)} it stops at {small.stats.early_stop.mean:,.0f}, dense at"
            f" {dense.early_stop.mean:,.0f}: {_iterations(stops)}{times}",
        )
    ]


def _hill(found: Findings) -> list[Part] | str:
    pruned = [r for r in found.rounds if r.round]
    if not pruned:
        return "no finished pruned round: ticketfind search goes on"
    if min(r.stats.replicates for r in found.rounds) < 2:
        return ONE
    top, rises = hill(found)
    fall = compared(pruned[-1].stats, top.stats, found, level=1 - 0.05 / len(pruned))
    assert fall is not None
    return [
        rises,
        Part(
            True if fall.high < 0 else None,
            f"at {share(pruned[-1].remaining)} {points(fall)} from there",
        ),
    ]


def hill(found: Findings) -> tuple[Round, Part]:
    """The pruned round of the highest accuracy, and whether pruning raises it above the dense network's.

    As the highest of several is looked for, its interval is corrected (Bonferroni); refuted where every round is below.
    """
    dense, pruned = found.rounds[0], [r for r in found.rounds if r.round]
    level = 1 - 0.05 / len(pruned)
    rises = [(r, compared(r.stats, dense.stats, found, level=level)) for r in pruned]
    top, rise = max(rises, key=lambda pair: pair[0].stats.accuracy_early.mean)
    assert rise is not None
    none = all(difference is not None and difference.high < 0 for _, difference in rises)
    return top, Part(
        False if none else True if rise.low > 0 else None,
        f"highest at {share(top.remaining)}, {_percent(top.stats.accuracy_early)}:"
        f" {points(rise)} from dense, corrected for the choice of the highest",
    )


def _reinit(found: Findings) -> list[Part] | str:
    there = _with(found, "ticket", "reinit")
    if isinstance(there, str):
        return f"{there}: ticketfind eval {found.run} --round N, for two rounds"
    first, last = there[0], there[-1]
    ticket, reinit = last.arms["ticket"], last.arms["reinit"]
    lower = compared(reinit, ticket, found)
    assert lower is not None
    parts = [
        Part(_below(lower), f"at {share(last.remaining)} reinit ends {points(lower)} from the ticket"),
        _slower(there, found),
    ]
    if first is last:
        return [*parts, Part(None, f"one round evaluated: ticketfind eval {found.run} --round N for another")]
    gap = _gap(first, found), _gap(last, found)
    growth = intervals.of_difference(gap[1], gap[0])
    if growth is None:
        return [*parts, Part(None, "replicates differ between evaluations")]
    text = f"from {share(first.remaining)} to {share(last.remaining)} its loss grows by {points(growth)}"
    return [*parts, Part(above(growth), text)]


def _slower(there: Sequence[Evaluated], found: Findings) -> Part:
    """At the sparsest round whose tickets all stop before the end of training: else none can be slower."""
    stopping = [e for e in there if found.last is None or max(e.arms["ticket"].early_stop.values) < found.last]
    if not stopping:
        return Part(None, "which is slower is not known: tickets learn to the last iteration")
    slower = _stops(stopping[-1].arms["reinit"], stopping[-1].arms["ticket"], found)
    assert slower is not None
    return Part(above(slower), f"at {share(stopping[-1].remaining)} it stops {_iterations(slower)} from the ticket")


def _gap(at: Evaluated, found: Findings) -> list[float]:
    """Ticket minus reinit, replicate by replicate (both have its mask)."""
    ticket, reinit = (at.arms[name].accuracy_early.values for name in ("ticket", "reinit"))
    return [t - r for t, r in zip(ticket, reinit, strict=False)]


def _below(difference: Interval) -> bool | None:
    return above(Interval(-difference.mean, -difference.high, -difference.low))


def _random(found: Findings) -> list[Part] | str:
    return _worse(found, "random", "reinit", f"ticketfind eval {found.run}")


def _at_initialization(found: Findings) -> list[Part] | str:
    return _worse(found, "init-magnitude", "reinit", f"ticketfind eval {found.run} --control init-magnitude")


def _worse(found: Findings, one: str, other: str, command: str) -> list[Part] | str:
    """At the sparsest evaluated round, `one` ends below `other`."""
    there = _with(found, one, other)
    if isinstance(there, str):
        return f"{there}: {command}"
    at = there[-1]
    lower = compared(at.arms[one], at.arms[other], found)
    assert lower is not None
    figures = (_percent(at.arms[name].accuracy_early) for name in (one, other))
    return [
        Part(
            _below(lower),
            f"at {share(at.remaining)} {one} {next(figures)}, {other} {next(figures)}: {points(lower)}",
        )
    ]


def _noise(found: Findings) -> list[Part] | str:
    there = _with(found, "ticket", "noise=0.5")
    if isinstance(there, str):
        return f"{there}: ticketfind eval {found.run} --noise 0.5 --noise 1 --noise 2 --noise 3"
    at = max(there, key=lambda e: sum(name.startswith("noise=") for name in e.arms))
    little = compared(at.arms["noise=0.5"], at.arms["ticket"], found)
    assert little is not None
    where = f"at {share(at.remaining)}"
    parts = [
        Part(
            above(little, -found.tolerance - 1e-9),
            f"{where} noise of 0.5 sigma ends {points(little)} from the ticket",
        ),
        Part(None, "no level above 0.5"),
        Part(None, "3 sigma was not tried: --noise 3"),
    ]
    levels = [level for level in (1, 2, 3) if f"noise={level}" in at.arms]
    if levels:
        more = compared(at.arms[f"noise={levels[-1]}"], at.arms["noise=0.5"], found)
        if more is not None:
            parts[1] = Part(_below(more), f"{levels[-1]} sigma {points(more)} from 0.5 sigma")
    if 3 in levels and "reinit" in at.arms:
        beats = compared(at.arms["noise=3"], at.arms["reinit"], found)
        if beats is not None:
            parts[2] = Part(above(beats), f"3 sigma {points(beats)} from reinit")
    return parts


def _moves(found: Findings) -> list[Part] | str:
    if not found.movement:
        return "the run holds no trained weights of round 0: ticketfind search, anew, keeps them"
    if len(found.movement) < 2:
        return ONE
    difference = intervals.of_mean([kept - pruned for kept, pruned in found.movement])
    assert difference is not None
    kept, pruned = (statistics.fmean(column) for column in zip(*found.movement, strict=True))
    return [
        Part(
            above(difference),
            f"kept weights moved by {kept:.4f} in the mean, pruned ones by {pruned:.4f}: {difference.mean:+.4f}"
            f" (95 %: {difference.low:+.4f} to {difference.high:+.4f}); a mask by magnitude favors what has grown",
        )
    ]


def _one_shot(found: Findings) -> list[Part] | str:
    there = _with(found, "ticket", "dense", "one-shot")
    if isinstance(there, str):
        return f"{there}: ticketfind eval {found.run} --control one-shot"
    first, last = there[0], there[-1]
    works = compared(first.arms["one-shot"], first.arms["dense"], found)
    wins = compared(last.arms["ticket"], last.arms["one-shot"], found)
    assert works is not None and wins is not None
    moderate = Part(
        above(works, -found.tolerance - 1e-9), f"at {share(first.remaining)} one-shot {points(works)} from dense"
    )
    if first is last:
        return [moderate, Part(None, f"one round evaluated: ticketfind eval {found.run} --round N for another")]
    return [moderate, Part(above(wins), f"at {share(last.remaining)} the ticket {points(wins)} from one-shot")]


def _fractions(found: Findings) -> str:
    return "one run has one prune fraction: ticketfind search --prune 0.4 --out OTHER, and compare the hills"


def _dropout(found: Findings) -> str:
    return (
        "needs the same search with and without dropout: ticketfind search with --model-arg dropout=0.5,"
        f" and ticketfind report {found.run} --beside OTHER"
    )


def _rewinding(found: Findings) -> str:
    return "needs two runs of a deep network: ticketfind search resnet-20 --rewind 0it, and with --rewind 500it"


_RULES = (
    _matches, _faster, _hill, _reinit, _random, _noise, _moves, _one_shot, _at_initialization, _fractions, _dropout,
    _rewinding,
)  # fmt: skip
