"""A run's numbers as charts: what is drawn against what. No files, no torch, nothing drawn yet."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ticketfind import TicketfindError, intervals, results
from ticketfind.figures import COLORS, SERIES, Chart, Limits, Line, Panel
from ticketfind.movement import Movement
from ticketfind.recipe import Recipe
from ticketfind.results import Evaluated, Round, Spread

CONTROLS = ("reinit", "random", "one-shot", "init-magnitude")
"""Arms that stand beside the ticket at a share of the weights."""

MOST_LAYERS, MOST_NAMES = 12, 10
"""Shown in a figure; named beside its lines."""

_SHARE: Limits = (0.0, 100.0)
"""Percent."""


def curves(log: Iterable[Mapping[str, Any]], round: int) -> list[tuple[list[int], list[float]]]:
    """Iterations and test accuracies of each replicate of a round; none of those whose training does not tell them."""
    found = []
    for line in log:
        curve = line.get("curve") if line["round"] == round else None
        x, y = (curve.get(key) if isinstance(curve, dict) else None for key in ("iteration", "test_accuracy"))
        if not isinstance(x, list) or not isinstance(y, list) or not x:
            continue
        if len(x) != len(y) or not all(map(results.is_finite, [*x, *y])) or sorted({*x}) != x:
            raise TicketfindError(f"log.jsonl: round {round}, replicate {line['replicate']}: curve: expected numbers")
        found.append((x, y))
    return found


def of_run(
    recipe: Recipe,
    rounds: Sequence[Round],
    log: Sequence[Mapping[str, Any]],
    found: Sequence[Evaluated],
    weights: Movement,
    chosen: Round,
) -> Iterable[Chart]:
    """Those that there are numbers for."""
    spread = _over(rounds)
    measure = "test accuracy" if recipe.train.metric is None else f"test metric ({_printable(recipe.train.metric)})"
    capital = f"T{measure[1:]}"
    is_accuracy = recipe.train.metric is None and not recipe.train.is_external  # which measures what it likes
    limits = _SHARE if is_accuracy else None
    yield Chart(
        "hill",
        "Accuracy against weights remaining",
        f"{capital} of the ticket of each round, the controls where they were evaluated, and the dense"
        f" network (dashed). {spread} Where a line leaves the picture, its last value stands at its end.",
        "weights remaining",
        [
            _against_weights(rounds, found, "accuracy_early", f"{measure} at early stop, %", 100, limits),
            _against_weights(rounds, found, "accuracy_end", f"{measure} at the end, %", 100, limits),
        ],
        by_weights=True,
    )
    yield Chart(
        "early-stop",
        "How soon training stops",
        f"Iteration of the lowest validation loss; lower is faster. {spread}",
        "weights remaining",
        [_against_weights(rounds, found, "early_stop", "early-stop iteration", 1, None)],
        by_weights=True,
    )
    last = len(rounds) - 1
    winner = rounds.index(chosen)
    shown = [rounds[place] for place in sorted({0, (winner or last) // 2, winner, last})]
    if learning := [line for place, r in enumerate(shown) for line in _learning(r, curves(log, r.round), place)]:
        yield Chart(
            "curves",
            "Learning curves",
            f"{capital} while training, at some shares of the weights. {spread}",
            "iteration",
            [Panel(learning, f"{measure}, %", limits=limits)],
        )
    if layers := _layers(rounds, log):
        yield Chart(
            "layers",
            "What is left of each layer",
            "Weights remaining by parameter, both axes logarithmic. Lines that fall faster are pruned more.",
            "weights remaining, all layers",
            [Panel(layers, "weights remaining in the layer", is_log=True)],
            by_weights=True,
        )
    for prefix, title, caption in _NOISE:
        levels = [(e, _levels(e.arms, prefix)) for e in found]
        at, most = max(levels, key=lambda pair: (len(pair[1]), pair[0].round == chosen.round), default=(None, []))
        if at is not None and most:
            where = f"At {_share(at.remaining)} of the weights. {spread}"
            keys = (
                ("accuracy_early", f"{measure} at early stop, %", 100, limits),
                ("early_stop", "early-stop iteration", 1, None),
            )
            yield Chart(
                prefix.rstrip("="),
                title,
                f"{caption} {where}",
                "noise, in standard deviations",
                [_against_noise(at, prefix, *key) for key in (keys if prefix == "noise=" else keys[:1])],
            )
    yield from _under_attack(found, spread)
    yield from _distributions(weights, chosen, recipe)


_NOISE = (
    ("noise=", "Noise on the initial weights", "Noise is added before training, in units of the layer's own sigma."),
    ("weight-noise=", "Noise on the trained weights", "Noise is added after training; nothing is trained again."),
)


def _over(rounds: Sequence[Round]) -> str:
    """What bands and bars are; some replicates may have failed on the way."""
    least, most = (extreme(r.stats.replicates for r in rounds) for extreme in (min, max))
    if most == 1:
        return "One replicate."
    number = f"{most}" if least == most else f"{least} to {most}"
    return f"Bands and bars: 95 % intervals of the mean over {number} replicates."


def _share(remaining: float) -> str:
    return f"{100 * remaining:.3g} %"


def _line(name: str, x: Sequence[float], spreads: Sequence[Spread], factor: float, **more: Any) -> Line:
    """Means with their 95 % intervals, times `factor`."""
    bounds = [intervals.of_mean(spread.values) for spread in spreads]
    low = [factor * (b.low if b else s.mean) for b, s in zip(bounds, spreads, strict=True)]
    high = [factor * (b.high if b else s.mean) for b, s in zip(bounds, spreads, strict=True)]
    color = more.pop("color", None) or COLORS.get(name, COLORS["ticket"])
    return Line(name, color, x, [factor * s.mean for s in spreads], low, high, **more)


def _against_weights(
    rounds: Sequence[Round], found: Sequence[Evaluated], key: str, title: str, factor: float, limits: Limits
) -> Panel:
    kept = [r for r in rounds if r.remaining]  # no weights at all have no place on a logarithmic axis
    lines = [_line("ticket", [100 * r.remaining for r in kept], [getattr(r.stats, key) for r in kept], factor)]
    for name in CONTROLS:
        there = [e for e in found if name in e.arms and e.remaining]
        if there:
            spreads = [getattr(e.arms[name], key) for e in there]
            lines.append(_line(name, [100 * e.remaining for e in there], spreads, factor, as_points=True))
    level = factor * getattr(rounds[0].stats, key).mean
    floor = None if key == "early_stop" else _floor(lines[0], level)
    return Panel(lines, title, level=level, floor=floor, limits=limits)


def _floor(ticket: Line, level: float) -> float:
    """So far below the ticket that its own rise and fall can still be seen, whatever a control does."""
    low, high = min([level, *ticket.y]), max([level, *ticket.y])
    return low - 4 * max(high - low, 0.5)


def _learning(finished: Round, given: Sequence[tuple[list[int], list[float]]], place: int) -> list[Line]:
    """The mean curve of a round; none where the replicates' do not fit one another."""
    if not given or any(x != given[0][0] for x, _ in given):
        return []
    spreads = [Spread.of(values) for values in zip(*(y for _, y in given), strict=True)]
    name = "dense" if not finished.round else _share(finished.remaining)
    color = COLORS["dense"] if not finished.round else SERIES[(place - 1) % len(SERIES)]
    return [_line(name, given[0][0], spreads, 100, color=color)]


def _layers(rounds: Sequence[Round], log: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The first replicate's density of each masked parameter over the rounds."""
    kept = []
    for finished in rounds:
        line = next((e for e in log if e["round"] == finished.round and e["replicate"] in finished.replicates), {})
        counts = line.get("kept_per_tensor")
        if not isinstance(counts, dict) or not all(isinstance(count, int) for count in counts.values()):
            return []
        kept.append(counts)
    names = [name for name in kept[0] if kept[0][name] > 0 and all(name in counts for counts in kept)]
    names.sort(key=lambda name: -kept[-1][name] / kept[0][name])
    labeled = {*names} if len(names) <= MOST_NAMES else {*names[: MOST_NAMES // 2], *names[-MOST_NAMES // 2 :]}
    x = [100 * r.remaining for r in rounds]
    return [
        Line(
            _printable(name),
            SERIES[place % len(SERIES)] if name in labeled else COLORS["dense"],
            x[: _alive(kept, name)],
            [100 * counts[name] / kept[0][name] for counts in kept[: _alive(kept, name)]],
            is_labeled=name in labeled,
        )
        for place, name in enumerate(names)
    ]


def _alive(kept: Sequence[Mapping[str, int]], name: str) -> int:
    """Rounds in which anything is left of a parameter: a logarithmic axis has no zero."""
    return sum(counts[name] > 0 for counts in kept)


def _levels(names: Iterable[str], prefix: str) -> list[tuple[float, str]]:
    """Levels of noise, or of an attack, and the names that have them, ascending."""
    found = []
    for name in names:
        if re.fullmatch(re.escape(prefix) + r"\d{1,9}(\.\d{1,9})?(e[+-]?\d{1,2})?", name):
            found.append((float(name.removeprefix(prefix)), name))
    return sorted(found)


def _against_noise(at: Evaluated, prefix: str, key: str, title: str, factor: float, limits: Limits) -> Panel:
    lines = []
    for base, before in (("ticket", ""), ("dense", "dense ")):
        levels = _levels(at.arms, before + prefix)
        if levels and base in at.arms:
            arms = [at.arms[base], *(at.arms[name] for _, name in levels)]
            spreads = [getattr(arm, key) for arm in arms]
            lines.append(_line(base, [0.0, *(level for level, _ in levels)], spreads, factor))
    last = lines[0].x[-1] if lines else 1.0
    if "reinit" in at.arms and prefix == "noise=":
        spread = getattr(at.arms["reinit"], key)
        lines.append(_line("reinit", [0.0, last], [spread, spread], factor, as_points=True))
    has_dense = any(line.name == "dense" for line in lines)
    level = None if has_dense or "dense" not in at.arms else factor * getattr(at.arms["dense"], key).mean
    return Panel(lines, title, level=level, limits=limits)


_ATTACKS = {
    "fgsm": "one step along the gradient's sign (FGSM)",
    "pgd": "40 steps of epsilon / 10 of projected gradient descent (PGD)",
}


def _under_attack(found: Sequence[Evaluated], spread: str) -> Iterable[Chart]:
    """A chart of each kind of attack, a panel of each round that was attacked so."""
    for kind, how in _ATTACKS.items():
        panels = [(at, _against_epsilon(at, levels)) for at in found if (levels := _levels(at.attacks, f"{kind}:"))]
        if drawn := [(at, panel) for at, panel in panels if panel.lines]:
            examples = drawn[0][0].attacked
            if any(at.attacked != examples for at, _ in drawn):
                examples = ", ".join(f"{at.attacked} at {_share(at.remaining)} of the weights" for at, _ in drawn)
            yield Chart(
                kind,
                f"Accuracy under attack: {how}",
                f"Of {examples}, changed by at most epsilon in each number so as to mislead the trained network; 0 is"
                f" the same examples unchanged. {spread}",
                "epsilon",
                [panel for _, panel in drawn],
            )


def _against_epsilon(at: Evaluated, levels: Sequence[tuple[float, str]]) -> Panel:
    under = [*([(0.0, "clean")] if "clean" in at.attacks and levels[0][0] > 0 else []), *levels]
    lines = []
    for name in COLORS:
        there = [(epsilon, at.attacks[attack][name]) for epsilon, attack in under if name in at.attacks[attack]]
        if any(name in at.attacks[attack] for _, attack in levels):
            lines.append(_line(name, [x for x, _ in there], [accuracy for _, accuracy in there], 100))
    return Panel(lines, f"accuracy at the end, %, at {_share(at.remaining)} of the weights", limits=_SHARE)


def _distributions(weights: Movement, chosen: Round, recipe: Recipe) -> Iterable[Chart]:
    where = f"the masks of round {chosen.round or 1}"
    began = "initialization" if recipe.prune.rewind == "lr" else "rewind point"
    if weights.moved is not None:
        moved = weights.moved
        yield Chart(
            "movement",
            "How far weights moved in the dense training",
            f"|w_T - w_k| for {where}, from the {began} ({recipe.prune.rewind}) to the end of round 0; each"
            " distribution has area one, and a thousandth of the weights may lie to the right.",
            "distance moved",
            [
                Panel(
                    [
                        Line("pruned", COLORS["reinit"], moved.centers, moved.other, is_area=True),
                        Line("kept", COLORS["ticket"], moved.centers, moved.one, is_area=True),
                    ],
                    "density",
                    has_scale=False,
                )
            ],
        )
    if weights.initial:
        shown = [*weights.initial.items()][:MOST_LAYERS]
        more = len(weights.initial) - len(shown)
        yield Chart(
            "initial",
            "Initial weights of what is kept",
            f"By parameter, for {where}: the weights at the {began}, all of them and those kept, each of area one."
            + (f" {more} further parameters are not shown." if more else ""),
            "weight",
            [
                Panel(
                    [
                        Line("all", COLORS["dense"], each.centers, each.other, is_area=True, is_labeled=not place),
                        Line("kept", COLORS["ticket"], each.centers, each.one, is_area=True, is_labeled=not place),
                    ],
                    _printable(name),
                    has_scale=False,
                )
                for place, (name, each) in enumerate(shown)
            ],
            columns=2,
        )


def _printable(name: str) -> str:
    """Without what an SVG may not hold; no longer than a figure has room for."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return text if len(text) <= 24 else f"{text[:8]}…{text[-15:]}"
