"""The hill in the terminal: it fits, it shows the numbers, it rises and falls where they do."""

import dataclasses
import io

import pytest
from rich.console import Console

from ticketfind import hillplot, terminal, views
from ticketfind.results import Measured, Round, Stats
from ticketfind.rundir import RunDir


def rounds(*accuracies: float) -> list[Round]:
    def stats(accuracy: float) -> Stats:
        return Stats.of([Measured(early_stop=1, accuracy_early=accuracy, accuracy_end=0, validation_loss=1)])

    return [Round(number, 0.8**number, stats(a), number == 1, 0) for number, a in enumerate(accuracies)]


HILL = rounds(0.95, 0.96, 0.97, 0.975, 0.97, 0.96, 0.94, 0.9)


@pytest.mark.parametrize("width", [26, 40, 80, 120])
def test_it_fits_and_names_the_ends(width: int) -> None:
    lines = hillplot.hill(HILL, width)
    assert max(map(len, lines)) <= min(width, 76)
    text = "\n".join(lines)
    for figure in ("97.50", "95.00", "90.00", "100 %", "21 %"):
        assert figure in text


def test_the_line_is_where_the_numbers_are() -> None:
    plot = [line[8:] for line in hillplot.hill(HILL, 80)[1 : 1 + hillplot.ROWS]]
    tops = [min(row for row in range(hillplot.ROWS) if plot[row][column : column + 1].strip()) for column in (0, 66)]
    top = [column for column, character in enumerate(plot[0]) if (ord(character) & 0x2809) > 0x2800]
    assert abs(sum(top) / len(top) - 66 * 3 / 7) < 2  # round 3 of 7
    assert tops[0] == round((0.975 - 0.95) / 0.075 * 27) // 4  # the dense level
    assert plot[-1][66:67].strip() and not plot[-1][:50].strip()  # it ends at the bottom, on the right


@pytest.mark.parametrize("given", [HILL[:2], rounds()])
def test_no_hill_of_two_points(given: list[Round]) -> None:
    assert hillplot.hill(given, 80) == []


def test_a_round_without_weights_has_no_place_on_it() -> None:
    emptied = dataclasses.replace(HILL[-1], round=len(HILL), remaining=0.0)
    assert hillplot.hill([*HILL, emptied], 80) == hillplot.hill(HILL, 80)


def test_a_flat_hill_is_one() -> None:
    assert any("90.00" in line for line in hillplot.hill(rounds(0.9, 0.9, 0.9), 80))


@pytest.mark.parametrize(("is_terminal", "quiet", "as_json"), [
    (True, False, False), (False, False, False), (True, True, False), (True, False, True),
])  # fmt: skip
def test_search_shows_it_on_a_terminal_only(
    is_terminal: bool, quiet: bool, as_json: bool, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    screen, text = terminal.Screen(quiet=quiet, as_json=as_json), io.StringIO()
    screen.console = Console(file=text, width=80, force_terminal=is_terminal, color_system=None)
    views.show_search(screen, RunDir(tmp_path), HILL, 1.0)  # type: ignore[arg-type]
    assert ("weights remaining" in text.getvalue()) is (is_terminal and not quiet and not as_json)
