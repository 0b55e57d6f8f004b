"""The report as one HTML page: nothing in it from elsewhere, no scripts, everything from files escaped."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ticketfind import figures, intervals, readers, results
from ticketfind.claims import DOES_NOT, HOLDS, NOT_TESTED, UNDECIDED, Claim
from ticketfind.figures import Chart
from ticketfind.recipe import Recipe
from ticketfind.results import Evaluated, Round, Spread
from ticketfind.verdict import Comparison


@dataclass(frozen=True)
class Contents:
    """All that stands on the page."""

    run: str
    is_finished: bool
    recipe: Recipe
    recipe_text: str
    rounds: Sequence[Round]
    evaluated: Sequence[Evaluated]
    verdict: str | None
    """Of the newest evaluation of the winner, or of the last round where there is none."""
    drawn: Sequence[tuple[Chart, str]]
    """Charts and their SVG."""
    claims: Sequence[Claim]
    notes: Sequence[str]
    versions: Mapping[str, str]


def html(found: Contents) -> str:
    """The page."""
    title = _subject(found.recipe)
    parts = [_head(found, title), _outcome(found)]
    parts += [_figure(chart, svg) for chart, svg in found.drawn[:1]]
    parts.append(_rounds(found.rounds, found.recipe.train.metric))
    parts += [_figure(chart, svg) for chart, svg in found.drawn[1:]]
    parts += [f'<p class="note">{_text(note)}</p>' for note in found.notes]
    if found.evaluated:
        parts.append("<h2>Evaluations</h2>")
    parts += [table for at in found.evaluated for table in (_arms(at), _attacks(at))]
    parts += [_claims(found.claims), _recipe(found)]
    return _PAGE.format(title=_text(f"{title}: ticketfind report"), style=_STYLE, body="\n".join(parts))


def _text(value: object) -> str:
    """Escaped, without control characters; numbers are not parted from what belongs to them."""
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return escape(text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}").replace(" %", "\N{NO-BREAK SPACE}%"))


def _subject(recipe: Recipe) -> str:
    model, data = recipe.model.spec, recipe.data.spec
    return f"{model} on {data}" if data else f"{model}"


def _head(found: Contents, title: str) -> str:
    train, prune, run = found.recipe.train, found.recipe.prune, found.recipe.run
    shares = ", ".join(f"{100 * share:g} % of {glob}" for glob, share in _fractions(prune.fraction))
    pruning = f"{shares}; scope" if readers.pattern(prune.scope) is None else "to"
    facts = {
        "Run": found.run + ("" if found.is_finished else " (not finished)"),
        "Replicates": f"{run.replicates}, seed {run.seed}",
        "Training": "a program of its own" if train.is_external else
        f"{int(train.iterations):,} iterations, batch {train.batch_size}, {train.optimizer} ({train.lr:g})",
        "Pruning": f"{pruning} {prune.scope}, by {prune.score}",
        "Rewinding": f"to {prune.rewind}",
        "Device": f"{run.device}, {run.precision}",
    }  # fmt: skip
    rows = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items())
    return f'<header><p class="eyebrow">Lottery ticket report</p><h1>{_text(title)}</h1><dl>{rows}</dl></header>'


def _fractions(given: object) -> Iterable[tuple[str, float]]:
    return given.items() if isinstance(given, Mapping) else [("*", given)]  # type: ignore[list-item]


def _outcome(found: Contents) -> str:
    dense, winner = found.rounds[0], results.winner_of(found.rounds)
    tiles = []
    if winner is None:
        last = found.rounds[-1]
        lead = "No winner: no pruned round matches the dense network" if last.round else "No pruned round was trained"
        lead += "." if found.is_finished else " so far."
        if last.round:
            tiles = [(_share(last.remaining), "of the weights in the sparsest round"), _tile(last, "it reaches")]
    else:
        lead = (
            f"The sparsest matching round is round {winner.round}: {_share(winner.remaining)} of the weights reach"
            f" {_points(winner.stats.accuracy_early)} %, the dense network {_points(dense.stats.accuracy_early)} %."
        )
        tiles = [(_share(winner.remaining), "of the weights in the winner"), _tile(winner, "it reaches, at early stop")]
    tiles.append(_tile(dense, "the dense network reaches"))
    shown = "".join(f"<div><strong>{_text(big)}</strong><span>{_text(small)}</span></div>" for big, small in tiles)
    if found.verdict is None:
        verdict = "Not evaluated: ticketfind eval trains it beside its controls and gives a verdict."
        return (
            f'<section class="outcome"><p>{_text(lead)}</p><div class="tiles">{shown}</div><p>{verdict}</p></section>'
        )
    word, _, rest = found.verdict.partition(":")
    return (
        f'<section class="outcome"><p>{_text(lead)}</p><div class="tiles">{shown}</div>'
        f'<p class="verdict"><b>{_text(word)}</b>{_text(f":{rest}" if rest else "")}</p></section>'
    )


def _tile(finished: Round, what: str) -> tuple[str, str]:
    return f"{100 * finished.stats.accuracy_early.mean:.2f} %", what


def _figure(chart: Chart, svg: str) -> str:
    label = _text(f"{chart.title}. {chart.caption}")
    drawing = re.sub(r"^<svg", f'<svg role="img" aria-label="{label}"', svg, count=1)
    name = _text(chart.name)
    return (
        f'<figure id="{name}"><h2>{_text(chart.title)}</h2>{drawing}<figcaption>{_text(chart.caption)}</figcaption>'
        "</figure>"
    )


# ------------------------------------------------------------------------------------------------ tables


def _share(fraction: float) -> str:
    value = 100 * fraction
    return f"{value:.0f} %" if value >= 99.95 else f"{value:.1f} %" if value >= 10 else f"{value:.2f} %"


def _points(values: Spread) -> str:
    return f"{100 * values.mean:.2f}" + (f" ± {100 * values.sd:.2f}" if values.sd is not None else "")


def _within(values: Spread) -> str:
    found = intervals.of_mean(values.values)
    return "" if found is None else f"{100 * found.low:.2f} to {100 * found.high:.2f}"


def _table(name: str, caption: str, heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """rows: a class, and cells that are HTML already."""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in heads)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for kind, cells in rows
    )
    return (
        (f'<p class="caption">{_text(caption)}</p>' if caption else "")
        + f'<div class="scroll" tabindex="0"><table id="{name}" aria-label="{_text(caption or name)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


_HEADS = ("at early stop, %", "95 % interval", "at the end, %", "stops at")


def _measures(stats: results.Stats) -> list[str]:
    early, end, stop = stats.accuracy_early, stats.accuracy_end, stats.early_stop
    return [_points(early), _within(early), _points(end), f"{stop.mean:,.0f}"]


def _rounds(rounds: Sequence[Round], metric: str | None) -> str:
    winner = results.winner_of(rounds)

    def word(finished: Round) -> str:
        if finished is winner:
            return "winner"
        return "dense" if not finished.round else "matching" if finished.matching else "below"

    rows = [
        (
            "chosen" if finished is winner else "",
            [str(finished.round), _share(finished.remaining), *_measures(finished.stats), word(finished)],
        )
        for finished in rounds
    ]
    measure = "test accuracy" if metric is None else f"test metric ({metric})"
    caption = f"Every round: {measure}, mean ± standard deviation over the replicates, and Student's interval"
    return _table("rounds", caption, ("round", "left", *_HEADS, ""), rows)


def _arms(at: Evaluated) -> str:
    rows = [("", [_text(name), *_measures(stats)]) for name, stats in at.arms.items()]
    caption = f"Evaluated at {_share(at.remaining)} of the weights (round {at.round}), all trained alike"
    return _table(f"eval-{at.round}", caption, ("", *_HEADS), rows)


def _attacks(at: Evaluated) -> str:
    """A row for each attack, a column for each arm, and the ticket's difference; nothing where there was none."""
    if not at.attacks:
        return ""
    arms = [*dict.fromkeys(arm for under in at.attacks.values() for arm in under)]
    rows: list[tuple[str, list[str]]] = []
    for name, under in at.attacks.items():
        found = [_points(under[arm]) if arm in under else "" for arm in arms]
        rows.append(("", [_text(cell) for cell in (name, *found, _above(under, at.examples))]))
    caption = (
        f"Under attack at {_share(at.remaining)} of the weights (round {at.round}): accuracy at the end of training, %,"
        f" on {at.attacked}, mean ± standard deviation over the replicates; the difference with its 95 % interval"
    )
    return _table(f"attacks-{at.round}", caption, ("", *arms, "ticket above dense by"), rows)


def _above(under: Mapping[str, Spread], examples: int | None) -> str:
    """The ticket's accuracy less the dense network's, points, with its 95 % interval (Welch)."""
    if not {"ticket", "dense"} <= under.keys():
        return ""
    found = Comparison.of(under, "ticket", "dense", least=1 / examples if examples else 0.0)
    above, *bounds = (f"{round(100 * x, 2) + 0:+.2f}" for x in (found.difference, *(found.interval or ())))
    return f"{above} ({bounds[0]} to {bounds[1]})" if bounds else above


_SIGNS = {HOLDS: "✓", DOES_NOT: "✗", UNDECIDED: "~", NOT_TESTED: "–"}


def _claims(claims: Sequence[Claim]) -> str:
    rows = [
        (
            "",
            [
                str(claim.number),
                f"{_text(claim.text)}<small>{_text(claim.figures)}</small>",
                f'<span class="{claim.status.replace(" ", "-")}">{_SIGNS[claim.status]}&nbsp;{claim.status}</span>',
            ],
        )
        for claim in claims
    ]
    intro = (
        "Each claim of Frankle and Carbin (2019), held against this run alone. A claim holds where 95 % intervals show"
        " every part of it, and does not where one refutes a part; undecided is what they leave open, often for want of"
        " replicates. The intervals stand for themselves: with twelve claims one may go astray by chance."
    )
    return f"<h2>The claims</h2><p>{intro}</p>" + _table("claims", "", ("", "claim, and this run", "status"), rows)


def _recipe(found: Contents) -> str:
    versions = "; ".join(f"{name}: {version}" for name, version in found.versions.items())
    return (
        f'<h2>The recipe</h2><p>All that is needed to repeat the run.</p><pre class="scroll" tabindex="0" id="recipe">'
        f"{_text(found.recipe_text)}</pre><footer>{_text(versions)}</footer>"
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = (
    """
:root { --ink: #24292f; --soft: #59636e; --faint: #d5dae0; --ground: #fff; --tint: #f4f6f8; --accent: #0072b2;
  --good: #00694c; --bad: #b84a00; --open: #7a5c00 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --faint: #3b434c; --ground: #14181d;
  --tint: #1c2229; --accent: #56b4e9; --good: #3ecfa0; --bad: #ff8f4f; --open: #e6b93a } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width: 46rem; margin: 0 auto; padding: 3.5rem 1.25rem 4rem }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 1.75rem; letter-spacing: -.015em; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 3.5rem 0 .75rem; letter-spacing: -.01em }
p { margin: 0 0 1rem; overflow-wrap: anywhere }
.eyebrow { color: var(--soft); font-size: .85rem; margin: 0 0 .4rem }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem 2rem; margin: 0 }
dt { color: var(--soft); font-size: .85rem } dd { margin: 0; overflow-wrap: anywhere }
.outcome { margin: 2.5rem 0 0; padding: 1.5rem 0 .5rem; border-top: 1px solid var(--faint);
  border-bottom: 1px solid var(--faint) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1.25rem 2rem;
  margin: 1.5rem 0 }
.tiles strong { display: block; font-size: 2.1rem; font-weight: 600; line-height: 1.15; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums } .tiles div:first-child strong { color: var(--accent) }
.tiles span { color: var(--soft); font-size: .9rem }
figure { margin: 0 } figure svg { display: block; width: 100%; max-width: 40rem; height: auto }
figcaption, .note, small, .caption, footer { color: var(--soft); font-size: .875rem }
figcaption { margin-top: .5rem } .caption { margin: 2.5rem 0 .25rem } .scroll { overflow-x: auto; margin: 0 0 2rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th { font-weight: 500; color: var(--soft); text-align: right; border-bottom: 1px solid var(--faint) }
th, td { padding: .4rem .75rem .4rem 0; white-space: nowrap; text-align: right; vertical-align: top }
td { border-bottom: 1px solid var(--tint) } th:first-child, td:first-child { text-align: left }
th:last-child, td:last-child { padding-right: 0 } .chosen td { color: var(--accent); font-weight: 600 }
#claims td:nth-child(2), #claims th:nth-child(2) { text-align: left; white-space: normal; min-width: 15rem }
#claims td { padding-top: .75rem; padding-bottom: .75rem }
small { display: block; margin-top: .25rem; overflow-wrap: anywhere }
.holds { color: var(--good) } .does-not { color: var(--bad) } .undecided { color: var(--open) }
.not-tested { color: var(--soft) } #claims td span { font-weight: 600 }
pre { font: .8rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; background: var(--tint); padding: 1rem 1.25rem;
  border-radius: 6px } .scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
@media (max-width: 36rem) { main { padding-top: 2rem } h1 { font-size: 1.6rem } .tiles strong { font-size: 1.75rem }
  .tiles { gap: .75rem } #claims thead { display: none }
  #claims tr { display: grid; grid-template-columns: 1.75rem 1fr; border-bottom: 1px solid var(--tint) }
  #claims td { border: 0; text-align: left } #claims td:nth-child(3) { grid-column: 2; padding-top: 0 } }
@media print { main { max-width: none; padding: 0 } figure { break-inside: avoid } }
"""
    + figures.DARK_RULES
)
