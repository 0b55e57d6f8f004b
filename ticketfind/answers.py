"""What is asked of tickets, shown: `eval` and `diff`; tables and a line for people, an object for --json. No torch."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ticketfind.results import Spread, Stats
from ticketfind.terminal import Screen, spread, table
from ticketfind.views import natural

if TYPE_CHECKING:
    from ticketfind.agreement import Between, Difference
    from ticketfind.experiments import Evaluation
    from ticketfind.masks import Overlap
    from ticketfind.verdict import Comparison


def evaluation_json(found: "Evaluation", ticket: str, data: str, seconds: float) -> dict[str, Any]:
    """The JSON object of `eval`."""
    return {
        "ticket": ticket,
        "data": data,
        "remaining": found.remaining,
        "against": found.against,
        "trials": found.trials,
        "seed": found.seed,
        "arms": {name: stats.json() for name, stats in found.arms.items()},
        "comparisons": [asdict(comparison) for comparison in found.verdict.comparisons],
        "attacks": {
            name: {
                "arms": {arm: accuracy.json() for arm, accuracy in attacked.arms.items()},
                "comparisons": [asdict(comparison) for comparison in attacked.comparisons],
            }
            for name, attacked in found.attacks.items()
        },
        "attack_examples": found.attack_examples,
        "attack_range": found.attack_range,
        "margin": found.verdict.margin,
        "verdict": found.verdict.text,
        "notes": list(found.notes),
        "seconds": seconds,
    }


def show_evaluation(screen: Screen, found: "Evaluation", described: Mapping[str, Any]) -> None:
    """`eval`."""
    for note in found.notes:
        screen.message(note)
    to_ticket = {c.other: c for c in found.verdict.comparisons if c.arm == "ticket"}
    rows = [_arm_row(name, stats, to_ticket.get(name)) for name, stats in found.arms.items()]
    columns = ("", "at early stop", "at the end", "stops at", "ticket above it by")
    shown = (0, 1, 4) if screen.console.width < 72 else (0, 1, 3, 4) if screen.console.width < 88 else range(5)
    screen.print(table([columns[n] for n in shown], [[row[n] for n in shown] for row in rows]))
    for name, attacked in found.attacks.items():
        by_other = {c.other: c for c in attacked.comparisons}
        under = [(arm, spread(accuracy), _above(by_other.get(arm))) for arm, accuracy in attacked.arms.items()]
        screen.print(table((name, "at the end", "ticket above it by"), under))
    screen.result(found.verdict.text, described)


def _arm_row(name: str, stats: Stats, to_ticket: "Comparison | None") -> tuple[str, ...]:
    stops = "" if "weight-noise" in name else f"{stats.early_stop.mean:,.0f}"
    return name, spread(stats.accuracy_early), spread(stats.accuracy_end), stops, _above(to_ticket)


def _above(to_ticket: "Comparison | None") -> str:
    if to_ticket is None:
        return ""
    above, *bounds = (f"{round(100 * x, 2) + 0:+.2f}" for x in (to_ticket.difference, *(to_ticket.interval or ())))
    return f"{above} [{', '.join(bounds)}]" if bounds else above


@dataclass(frozen=True)
class Side:
    """One of the two tickets of `diff`: the file or run that was named, and which ticket that is."""

    path: str
    round: int
    replicate: int

    def __str__(self) -> str:
        return f"{self.path}, round {self.round}, replicate {self.replicate}"


def show_difference(screen: Screen, found: "Difference", between: "Between | None", sides: Mapping[str, Side]) -> None:
    """`diff`; between: of two runs, their replicates pair by pair. sides: `a` and `b`."""
    for name, side in sides.items():
        screen.message(f"{name.upper()}: {side}")
    tensors = sorted(found.tensors.items(), key=natural)
    rows = [_overlap_row(name, overlap) for name, overlap in [*tensors, ("total", found.total)]]
    screen.print(table(("", "size", "in A", "in B", "in both", "Jaccard", "by chance", "agreement"), rows))
    if found.left_out:
        screen.message(f"left out, as the numbers of classes differ: {', '.join(found.left_out)}")
    agreements = {
        "same_init": None if between is None else _agreement_json(between.same_init),
        "other_init": None if between is None else _agreement_json(between.other_init),
    }
    kinds = {"same_init": "same initial weights", "other_init": "other initial weights"}
    shown = [_agreement_row(kinds[key], pairs) for key, pairs in agreements.items() if pairs is not None]
    if shown:
        screen.print(table(("pairs of replicates", "pairs", "Jaccard", "by chance", "agreement", "from", "to"), shown))
    init = f"initial weights: {'the same' if found.same_init else 'different'}"
    shared = (
        f"the masks share {found.total.kept_both:,} weights, {found.total.expected_both:,.0f} expected by chance;"
        f" agreement {found.total.agreement:.3f} (0 chance, 1 equal)"
    )
    screen.result(
        f"{'the masks are the same' if found.same_masks else shared}; {init}",
        {
            **{name: asdict(side) for name, side in sides.items()},
            "same_masks": found.same_masks,
            "same_init": found.same_init,
            "total": _overlap_json(found.total),
            "tensors": {name: _overlap_json(overlap) for name, overlap in found.tensors.items()},
            "left_out": list(found.left_out),
            "replicates": agreements,
        },
    )


def _agreement_json(pairs: "Sequence[Overlap]") -> dict[str, Any] | None:
    if not pairs:
        return None
    agreement = Spread.of(pair.agreement for pair in pairs)
    return {
        "pairs": len(pairs),
        "jaccard": statistics.fmean(pair.jaccard for pair in pairs),
        "jaccard_by_chance": statistics.fmean(pair.jaccard_by_chance for pair in pairs),
        "mean": agreement.mean,
        "sd": agreement.sd,
        "values": list(agreement.values),
    }


def _agreement_row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    mean = f"{found['mean']:.3f}" + ("" if found["sd"] is None else f" ± {found['sd']:.3f}")
    jaccards = (f"{found[key]:.3f}" for key in ("jaccard", "jaccard_by_chance"))
    return name, f"{found['pairs']}", *jaccards, mean, f"{min(found['values']):.3f}", f"{max(found['values']):.3f}"


def _overlap_row(name: str, overlap: "Overlap") -> tuple[str, ...]:
    counts = (f"{n:,}" for n in (overlap.size, overlap.kept_a, overlap.kept_b, overlap.kept_both))
    shares = (f"{s:.3f}" for s in (overlap.jaccard, overlap.jaccard_by_chance, overlap.agreement))
    return name, *counts, *shares


def _overlap_json(overlap: "Overlap") -> dict[str, Any]:
    keys = ("size", "kept_a", "kept_b", "kept_both", "jaccard", "jaccard_by_chance", "agreement")
    return {key: getattr(overlap, key) for key in keys}
