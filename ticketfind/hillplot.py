"""Occam's hill as text: accuracy against weights remaining, in braille dots. No torch.

A few lines of its own: less than a dependency for one plot.
"""

import math
from collections.abc import Sequence

from ticketfind.results import Round

ROWS = 7
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of the dots of a braille character, four rows of two."""


def hill(rounds: Sequence[Round], width: int) -> list[str]:
    """Lines no wider than `width`: mean accuracy at early stop of every round, the dense network's as a level.

    The x axis is logarithmic, 100 % on the left. Nothing for fewer than three rounds, or narrower than 26 columns.
    A round without weights has no place on it.
    """
    rounds = [r for r in rounds if r.remaining]
    columns = min(width, 76) - 9
    if len(rounds) < 3 or columns < 17:
        return []
    shares = [r.remaining for r in rounds]
    heights = [100 * r.stats.accuracy_early.mean for r in rounds]
    low, high = min(heights), max(heights)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    xs = [round(math.log(share) / math.log(shares[-1]) * (2 * columns - 1)) for share in shares]
    ys = [_row(height, low, high) for height in heights]
    dots = {(x, ys[0]) for x in range(0, 2 * columns, 4)}  # the dense network, dotted
    for left, right, start, end in zip(xs, xs[1:], ys, ys[1:], strict=False):
        steps = max(right - left, abs(end - start), 1)
        dots |= {
            (left + round((right - left) * i / steps), start + round((end - start) * i / steps))
            for i in range(steps + 1)
        }
    named = {_row(height, low, high) // 4: f"{height:.2f}" for height in (low, heights[0], high)}
    lines = [f"{named.get(row, ''):>7} {_braille(dots, row, columns)}".rstrip() for row in range(ROWS)]
    return ["accuracy at early stop, %", *lines, " " * 8 + _axis(shares[-1], columns), _below(columns)]


def _row(height: float, low: float, high: float) -> int:
    """The row of dots, from above."""
    return round((high - height) / (high - low) * (4 * ROWS - 1))


def _braille(dots: set[tuple[int, int]], row: int, columns: int) -> str:
    def character(column: int) -> str:
        bits = sum(_DOTS[y][x] for y in range(4) for x in range(2) if (2 * column + x, 4 * row + y) in dots)
        return chr(0x2800 + bits) if bits else " "

    return "".join(map(character, range(columns)))


def _axis(least: float, columns: int) -> str:
    """Shares of the weights where they belong, as far as there is room; the first and the last always."""
    last = f"{100 * least:.3g} %"
    text = "100 %".ljust(columns)
    for percent in (50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1):
        label = f"{percent:g}"
        place = round(math.log(percent / 100) / math.log(least) * (columns - 1))
        end = place + len(label)
        if end + 2 < columns - len(last) and not text[max(place - 2, 0) : end + 2].strip():
            text = text[:place] + label + text[end:]
    return text[: columns - len(last)] + last


def _below(columns: int) -> str:
    return (" " * 8 + "weights remaining; dotted: dense")[: columns + 8].rstrip()
