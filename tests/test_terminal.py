"""What people see stays whole on any width, and no name from a file steers the terminal."""

import io

import pytest
from rich.console import Console

from ticketfind import answers, terminal
from ticketfind.agreement import Difference
from ticketfind.experiments import Evaluation
from ticketfind.masks import Overlap
from ticketfind.results import Round, Spread, Stats
from ticketfind.verdict import Comparison, Verdict


def shown(width: int) -> tuple[terminal.Screen, io.StringIO]:
    screen, text = terminal.Screen(), io.StringIO()
    screen.console = Console(file=text, width=width, force_terminal=True, color_system=None, emoji=False)
    return screen, text


@pytest.mark.parametrize("width", [20, 50, 80, 200])
def test_tables_never_cut_a_number_or_a_name(width: int) -> None:
    screen, text = shown(width)
    overlap = Overlap(size=1234567, kept_a=765432, kept_b=654321, kept_both=543210, expected_both=405691.2)
    sides = {"a": answers.Side("runs/a", 1, 0), "b": answers.Side("runs/b", 2, 3)}
    found = Difference(False, False, {"layers.10.attention.weight": overlap})
    answers.show_difference(screen, found, None, sides)
    said = text.getvalue().replace("\n", " ")
    for whole in (
        "layers.10.attention.weight",
        "1,234,567",
        "765,432",
        "654,321",
        "543,210",
        "0.620",
        "0.400",
        "0.452",
    ):
        assert whole in said
    assert "…" not in said


@pytest.mark.parametrize("width", [41, 58, 60, 62, 63, 70, 76, 78, 79, 100])
def test_rows_of_rounds_line_up_and_fit(width: int) -> None:
    rows = terminal.RoundRows(width)
    stats = Stats(*(Spread(value, 0.0027, (value,)) for value in (0.9755, 0.976)), Spread(720, 0, (720,)))
    header = rows.header().plain
    lines = [rows.row(Round(number, 0.5**number, stats, True, 0)).plain for number in (0, 1, 12)]
    assert all(line.startswith(" ") and line[: len(header)].rstrip()[-1].isdigit() for line in lines[1:])
    assert "97.55 ± 0.27" in lines[1] and lines[1].endswith("matching")
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize(
    ("difference", "interval", "says"),
    [
        (0.01234, (-0.002, 0.02668), "+1.23 [-0.20, +2.67]"),
        (-1e-17, (-0.00001, 0.00001), "+0.00 [+0.00, +0.00]"),
        (-0.05, None, "-5.00"),
    ],
)
def test_a_difference_has_its_sign_and_zero_none_below(
    difference: float, interval: tuple[float, float] | None, says: str
) -> None:
    screen, text = shown(100)
    stats = Stats(*[Spread(0.5, None, (0.5,))] * 3)
    compared = Comparison("ticket", "dense", difference, interval)
    found = Evaluation(0.5, None, {"dense": stats}, 1, 0, Verdict("winning", 0.0, (compared,)), ())
    answers.show_evaluation(screen, found, {})
    assert text.getvalue().splitlines()[1].endswith(f"  {says}")


def test_control_characters_are_shown_not_obeyed() -> None:
    screen, text = shown(80)
    screen.message("a\x1b]0;pwned\x07b\nwinner: fake :fire:")
    assert text.getvalue().count("\n") == 1
    assert "\x1b]0" not in text.getvalue() and ":fire:" in text.getvalue()
