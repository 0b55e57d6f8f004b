"""What the user sees: tables, progress, lines. No torch, no arithmetic beyond percent."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ticketfind.results import Round, Spread, Stats

if TYPE_CHECKING:
    from typing_extensions import Self


class Screen:
    """Where output goes: results to stdout; with --json one object there and the rest to stderr; -q: results only."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.console = _console(stderr=as_json)
        self._stdout = sys.stdout
        if as_json:
            sys.stdout = sys.stderr  # what a user's own code prints

    def print(self, renderable: Any = "") -> None:
        """Something for people."""
        if self.quiet or self.as_json:
            return
        if isinstance(renderable, Text):
            renderable.plain = printable(renderable.plain)
        elif isinstance(renderable, str):
            renderable = printable(renderable)
        self.console.print(renderable, highlight=False, soft_wrap=isinstance(renderable, Text))  # nothing is cut

    def message(self, text: str) -> None:
        """A line about what goes on, escaped; with --json to stderr."""
        if not self.quiet:
            self._line(text.replace("\n", " "))

    def result(self, line: str, data: Mapping[str, Any]) -> None:
        """The outcome: `line` for people (with -q too), `data` with --json."""
        if self.as_json:
            print(dump(data), file=self._stdout, flush=True)
        else:
            self._line(line)

    def _line(self, text: str) -> None:
        self.console.print(escape(printable(text)), soft_wrap=not self.console.is_terminal, highlight=False)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 120, emoji=False)


def printable(text: str) -> str:
    """Without control characters: names from files must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def dump(data: Mapping[str, Any]) -> str:
    """One JSON object on one line."""
    return json.dumps(data, allow_nan=False)


def error(text: str) -> None:
    """An error on stderr, a line each."""
    console = Console(stderr=True, emoji=False)
    for line in printable(text).splitlines():
        console.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=not console.is_terminal, highlight=False)


# ---------------------------------------------------------------------------------------------- numbers


def percent(fraction: float) -> str:
    """``0.0206`` as ``2.06 %``: three digits that count."""
    value = 100 * fraction
    return f"{value:.1f} %" if value >= 10 else f"{value:.2f} %"


def spread(values: Spread) -> str:
    """Percent points, ``97.55 ± 0.27``."""
    return f"{100 * values.mean:.2f}" + (f" ± {100 * values.sd:.2f}" if values.sd is not None else "")


def size(number: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """``75`` as ``1:15``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def brief(seconds: float) -> str:
    """``0.0123`` as ``12.3 ms``; from a second on as `duration`, but for the first minute."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s" if seconds < 60 else duration(seconds)


def plural(number: int, what: str) -> str:
    """``1 round``, ``2 rounds``."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def shape(sides: Sequence[int]) -> str:
    """``300x784``; a tensor without sides is a scalar."""
    return "x".join(map(str, sides)) or "scalar"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> Text:
    """A plain table: the first `left` columns to the left, the rest (numbers) to the right."""
    cells = [columns, *([printable(cell.replace("\n", " ")) for cell in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        blanks = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        pairs = enumerate(zip(row, blanks, strict=True))
        lines.append("  ".join(cell + blank if n < left else blank + cell for n, (cell, blank) in pairs).rstrip())
    head, *body = lines
    return Text.assemble((head, "bold"), *(f"\n{line}" for line in body))


# ---------------------------------------------------------------------------------------------- rounds


class RoundRows:
    """Rounds as rows that line up, one at a time; narrow terminals get fewer columns."""

    def __init__(self, width: int) -> None:
        columns = [
            ("round", 5),
            ("left", 8),
            ("at early stop", 14),
            ("at the end", 14),
            ("stops at", 9),
            ("vs dense", 9),
        ]
        if width < 79:
            columns = [column for column in columns if column[0] != "at the end"]
        if width < 63:
            columns = [column for column in columns if column[0] not in ("stops at", "vs dense")]
        self._columns = columns
        self._dense: Stats | None = None

    def header(self) -> Text:
        """The column heads."""
        return Text("  ".join(name.rjust(width) for name, width in self._columns), style="bold")

    def row(self, finished: Round) -> Text:
        """One round."""
        stats = finished.stats
        self._dense = self._dense or stats
        difference = 100 * (stats.accuracy_early.mean - self._dense.accuracy_early.mean)
        cells = {
            "round": str(finished.round),
            "left": percent(finished.remaining),
            "at early stop": spread(stats.accuracy_early),
            "at the end": spread(stats.accuracy_end),
            "stops at": f"{stats.early_stop.mean:,.0f}",
            "vs dense": f"{difference:+.2f}" if finished.round else "",
        }
        text = Text("  ".join(cells[name].rjust(width) for name, width in self._columns))
        if finished.round:
            text.append(
                "  matching" if finished.matching else "  below",
                style="green" if finished.matching else "yellow",
            )
        else:
            text.append("  dense", style="dim")
        return text


class Progress:
    """One line with a bar, iterations a second and the time left; on a terminal only. Drawn by `tick`, no thread."""

    def __init__(self, screen: Screen, what: str, between: Callable[[], None] = lambda: None) -> None:
        """between: called at every tick, between two iterations."""
        self._screen, self._what, self._between = screen, what, between
        self._total = self._done = self._before = 0
        self._began = self._drawn = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> "Self":
        if self._screen.console.is_terminal and not self._screen.quiet:
            self._live = Live(console=self._screen.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            with suppress(OSError):  # a terminal that has gone
                self._live.stop()
            self._live = None

    def begin(self, total: int, done: int) -> None:
        """Iterations in all, and those done by an earlier process."""
        self._total, self._done, self._before = total, done, done
        self._began = time.monotonic()

    def tick(self, iterations: int) -> None:
        """Iterations done since the last call."""
        self._between()
        self._done += iterations
        now = time.monotonic()
        if self._live is not None and now - self._drawn > 0.1:
            self._drawn = now
            self._live.update(self._line(now), refresh=True)

    def skip(self, iterations: int) -> None:
        """Iterations that will not be done."""
        self._total -= iterations

    def _line(self, now: float) -> Table:
        rate = (self._done - self._before) / max(now - self._began, 1e-9)
        line = Table.grid(padding=(0, 1))
        line.add_row(
            self._what,
            ProgressBar(total=max(self._total, 1), completed=self._done, width=24),
            f"{self._done / max(self._total, 1):.0%}",
            f"{rate:,.0f} it/s" if rate else "",
            f"{duration((self._total - self._done) / rate)} left" if rate else "",
        )
        return line


class SearchWatch(Progress):
    """Shows a search: a row for each finished round, the progress line under them."""

    def __init__(self, screen: Screen, between: Callable[[], None] = lambda: None) -> None:
        super().__init__(screen, "searching", between)
        self._rows = RoundRows(screen.console.width)
        self._shown = False

    def round(self, finished: Round) -> None:
        """A finished round."""
        if self._screen.quiet:
            return
        if not self._shown:
            self._screen.console.print(self._rows.header())
            self._shown = True
        self._screen.console.print(self._rows.row(finished), soft_wrap=True)

    def note(self, text: str) -> None:
        """Something that the user should know."""
        self._screen.message(text)
