"""Charts from plain numbers, drawn with matplotlib: PNG on white, and SVG that reads well on light and on dark.

Colors are safe for the colorblind, after Okabe and Ito. An SVG has those for a light ground written into it, and style
rules that exchange them on a dark one (`DARK_RULES`), in the file and in the page that it stands in alike.
"""

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ticketfind import TicketfindError

INK, FAINT = "#24292f", "#d5dae0"
COLORS = {
    "dense": "#6e7781",
    "ticket": "#0072b2",
    "reinit": "#d55e00",
    "random": "#00805d",
    "one-shot": "#b0568c",
    "init-magnitude": "#8f6a00",
}
"""Of each arm, whatever the figure."""

SERIES = ("#0072b2", "#d55e00", "#00805d", "#b0568c", "#8f6a00", "#6e7781")
"""Of what has no color of its own."""

_DARK = {
    INK: "#e6edf3",
    FAINT: "#3b434c",
    "#6e7781": "#9aa4af",
    "#0072b2": "#56b4e9",
    "#d55e00": "#ff8f4f",
    "#00805d": "#3ecfa0",
    "#b0568c": "#e79fc4",
    "#8f6a00": "#e6b93a",
}

DARK_RULES = "@media (prefers-color-scheme: dark) {{\n{}\n}}".format(
    "\n".join(
        f'svg [style*="{what}: {light}"] {{ {what}: {dark} !important }}'
        for light, dark in _DARK.items()
        for what in ("fill", "stroke")
    )
)


Limits = tuple[float, float] | None
"""Between which y lies, whatever an interval says: bands and bars end there."""


@dataclass(frozen=True)
class Line:
    """A curve. Drawn with a band from low to high, or, `as_points`, with bars; the name stands at its end."""

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    as_points: bool = False
    is_area: bool = False
    """Filled down to zero, and named in a corner: for distributions."""
    is_labeled: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    lines: Sequence[Line]
    y_title: str
    level: float | None = None
    """A dashed line from side to side, for the dense network."""
    is_log: bool = False
    """y on a logarithmic axis, in percent."""
    floor: float | None = None
    """What lies below is not in the picture, but for a word and a number at the line's end."""
    has_scale: bool = True
    """Whether y has numbers."""
    limits: Limits = None


@dataclass(frozen=True)
class Chart:
    """Panels under one another, over one x axis."""

    name: str
    """Of its files."""
    title: str
    caption: str
    """How to read it."""
    x_title: str
    panels: Sequence[Panel]
    by_weights: bool = False
    """x is the weights remaining in percent: logarithmic, 100 on the left."""
    columns: int = 1
    """Panels in a row; more than one if each has its own x axis."""


_STYLE: dict[str, Any] = {
    "font.size": 11,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "text.parse_math": False,  # names come from models: a dollar sign is a dollar sign
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "axes.formatter.use_mathtext": False,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "ytick.left": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "lines.markeredgewidth": 0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "ticketfind",
}
_WIDTH, _HEIGHT = 5.8, 2.75
"""Inches; a panel's height. Narrow, so that the letters can be read on a telephone."""


def check_matplotlib() -> None:
    """Raise TicketfindError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise TicketfindError(
            "report: matplotlib draws the figures and is not installed; pip install 'ticketfind[plots]'"
        ) from None


def render(chart: Chart) -> tuple[str, bytes]:
    """A chart as SVG (a whole file, without references to anything outside it) and as PNG."""
    import matplotlib.style

    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in another script: PNG only
        figure = _draw(chart)
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(png, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return _own(svg.getvalue(), chart.name), png.getvalue()


def _own(svg: str, name: str) -> str:
    """Without prolog and metadata, sized by its surroundings, names made the chart's own, with rules for dark."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    head, _, rest = svg.partition(">")
    font = (
        "svg text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif !important }"
    )
    return f"{head}>\n<style>\n{font}\n{DARK_RULES}\n</style>{rest}"


def _draw(chart: Chart) -> Any:
    from matplotlib.figure import Figure

    rows = -(-len(chart.panels) // chart.columns)
    height = _HEIGHT if chart.columns == 1 else 1.7
    figure = Figure(figsize=(_WIDTH, 0.35 + rows * height))
    grid = figure.subplots(rows, chart.columns, squeeze=False, sharex=chart.columns == 1)
    axes = [*grid.flat]
    for spare in axes[len(chart.panels) :]:
        spare.set_visible(False)
    for place, (panel, ax) in enumerate(zip(chart.panels, axes, strict=False)):
        _panel(ax, panel, place, chart.by_weights)
        if place + chart.columns >= len(chart.panels):
            ax.set_xlabel(chart.x_title)
    names = [line.name for panel in chart.panels for line in panel.lines if line.is_labeled and not line.is_area]
    letters = max(map(len, names), default=0) + 7 * any(panel.floor is not None for panel in chart.panels)
    beside = (6.2 * letters + 10) / (72 * _WIDTH) if names else 0.0  # a letter is about 6 points wide
    figure.tight_layout(rect=(0, 0, 1 - beside, 1), h_pad=1.4)
    for panel, ax in zip(chart.panels, axes, strict=False):
        _name_ends(ax, panel)
    return figure


def _panel(ax: Any, panel: Panel, place: int, by_weights: bool) -> None:
    ax.set_title(panel.y_title, pad=8)
    if panel.is_log:
        ax.set_yscale("log")
    if by_weights:
        ax.set_xscale("log")
    if panel.level is not None:
        ax.axhline(panel.level, color=COLORS["dense"], linewidth=1, dashes=(4, 3), gid=f"level-{place}")
    lines = [_within(line, panel.limits) for line in panel.lines]
    for line in lines:
        _line(ax, line, f"line-{place}-{line.name}")
    if panel.floor is not None:
        bottom = max(panel.floor, ax.get_ylim()[0])
        top = max(y for line in lines for y in (line.high or line.y))
        ax.set_ylim(bottom, top + (top - bottom) / 20)
    if by_weights:
        _weights_axis(ax, [x for line in panel.lines for x in line.x])
    else:
        _plain_ticks(ax.xaxis, at_most=6)
    if panel.is_log:
        _log_ticks(ax.yaxis, *ax.get_ylim())
    else:
        _plain_ticks(ax.yaxis, at_most=5)
    if panel.has_scale:
        ax.grid(axis="y")
    else:
        ax.set_yticks([])
    ax.set_axisbelow(True)
    if any(line.is_area for line in panel.lines):
        ax.set_ylim(bottom=0)


def _within(line: Line, limits: Limits) -> Line:
    """Its band, or bars, no farther than the limits."""
    if limits is None or line.low is None or line.high is None:
        return line
    least, most = limits
    return replace(line, low=[max(y, least) for y in line.low], high=[min(y, most) for y in line.high])


def _line(ax: Any, line: Line, name: str) -> None:
    marker = "o" if len(line.x) <= 30 and not line.is_area else None
    above = 3 if line.as_points else 4
    ax.plot(line.x, line.y, color=line.color, marker=marker, gid=name, zorder=above)
    if line.is_area:
        ax.fill_between(line.x, line.y, color=line.color, alpha=0.16, linewidth=0)
    elif line.low is not None and line.high is not None:
        if line.as_points:
            ax.vlines(line.x, line.low, line.high, color=line.color, linewidth=1, alpha=0.65)
        else:
            ax.fill_between(line.x, line.low, line.high, color=line.color, alpha=0.16, linewidth=0)


def _weights_axis(ax: Any, shares: Sequence[float]) -> None:
    least = min(shares, default=100.0)
    low, high = min(least * 0.9, 90.0), 110.0
    _log_ticks(ax.xaxis, low, high)
    ax.set_xlim(high, low)


def _log_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks at round percentages, as many as there is room for."""
    from matplotlib.ticker import NullLocator

    digits = (1, 1.5, 2, 3, 5, 7) if high / low < 20 else (1, 2, 5) if high / low < 2000 else (1,)
    ticks = [digit * 10.0**power for power in range(-6, 3) for digit in digits]
    axis.set_ticks([tick for tick in ticks if low <= tick <= high])
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g} %")


def _plain_ticks(axis: Any, at_most: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(at_most, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, _: f"{value:,.6g}")


def _name_ends(ax: Any, panel: Panel) -> None:
    """Write each line's name beside its end, in its color, pushed apart where they touch; areas: in the corner."""
    gap = 13.5 / (ax.get_window_extent().height * 72 / ax.figure.dpi)
    for place, line in enumerate(line for line in panel.lines if line.is_labeled and line.is_area):
        height = 1 - gap * place
        ax.text(1, height, line.name, color=line.color, transform=ax.transAxes, ha="right", va="top", fontsize=10)
    named = [(line.x[-1], line.y[-1], line) for line in panel.lines if line.is_labeled and not line.is_area]
    if panel.level is not None:
        named.append((ax.get_xlim()[1], panel.level, Line("dense", COLORS["dense"], (), ())))
    ends = []
    for x, y, line in named:
        height = float(ax.transAxes.inverted().transform(ax.transData.transform((x, y)))[1])
        ends.append((max(height, 0.0), line.name if height >= 0 else f"{line.name} ↓ {y:.3g}", line.color))
    ends.sort(key=lambda end: end[0])
    places = spread_out([height for height, _, _ in ends], gap)
    for height, (_, name, color) in zip(places, ends, strict=True):
        ax.text(1.02, height, name, color=color, transform=ax.transAxes, va="center", fontsize=10)


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved so that they are at least `gap` apart; groups that touch stay around their own middle."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-1], gap) - _top(groups[-2], gap) < gap - 1e-12:
            last = groups.pop()
            groups[-1] = groups[-1] + last
    return [_bottom(group, gap) + gap * place for group in groups for place in range(len(group))]


def _bottom(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2
