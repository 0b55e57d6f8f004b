"""How much a file from elsewhere may make a reader do.

A reader takes at most 4 times the file's size and `SPARE` bytes of memory. What a file holds is counted before it is
read, as few bytes can ask for much: values in JSON, compressed arrays, shapes.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

SPARE = 64 * 2**20
"""Bytes that any file may take, however small it is."""
RATIO = 100
"""What compressed data may take, in sizes of its file: MNIST's takes 5, and what is mostly zeros seldom 50."""
MOST_TENSORS = 2**16
"""In one file: a tensor takes a kilobyte, whatever is in it."""
MOST_HEADER = 2**23
"""Bytes of a safetensors file that say what is in it."""
MOST_VALUES = 20_000
"""In a recipe, written out."""
DEEPEST = 50
"""Mappings and lists within one another, in a recipe."""


def inflated(size: int) -> int:
    """The bytes that a compressed file of `size` bytes may hold."""
    return max(SPARE, RATIO * size)


def elements(shape: tuple[int, ...]) -> int | None:
    """The number of elements in an array; None for a shape that no array can have."""
    if len(shape) > 64 or any(side < 0 for side in shape) or math.prod(side or 1 for side in shape) > 2**48:
        return None
    return math.prod(shape)


_COSTS = {b",": 32, b":": 96, b"[": 64, b"{": 160}
"""Bytes that Python takes for what comes with a character of JSON."""


def json_cost(raw: bytes) -> int:
    """Bytes, about, that JSON takes once it is read, texts left out."""
    return sum(cost * raw.count(mark) for mark, cost in _COSTS.items())


def read_json(raw: bytes, *, finite: bool = True) -> Any:
    """What JSON says. Raises ValueError for what is no JSON, nested too deeply, or too much; with `finite` for numbers
    that are none, or infinite, too.
    """
    if json_cost(raw) > 3 * len(raw) + SPARE:
        raise ValueError("it holds more values than so few bytes should")
    try:
        checks: dict[str, Any] = {"parse_constant": _refused, "parse_float": _finite} if finite else {}
        return json.loads(raw.decode("utf-8"), **checks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refused(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large for a number")
    return number


def fault_of(value: Any) -> str | None:
    """What is wrong with the size of plain values (mappings, lists, numbers, texts) put into one another; None if
    nothing is. Looks at no more than `MOST_VALUES` of them, though one that is named often counts as often."""
    for count, (depth, item) in enumerate(_within(value), 1):
        if count > MOST_VALUES:
            return f"more than {MOST_VALUES:,} values"
        if depth > DEEPEST:
            return f"more than {DEEPEST} levels of values within one another"
        if isinstance(item, int) and abs(item) >= 2**1000:
            return "a whole number of more than 1,000 bits"
    return None


def _within(value: Any) -> Iterator[tuple[int, Any]]:
    """Depth and value of each, the outermost first."""
    todo = [(1, iter((value,)))]
    while todo:
        depth, items = todo[-1]
        for item in items:
            yield depth, item
            if isinstance(item, Mapping):
                todo.append((depth + 1, (part for pair in item.items() for part in pair)))
                break
            if isinstance(item, (list, tuple)):
                todo.append((depth + 1, iter(item)))
                break
        else:
            todo.pop()


def shown(value: Any, most: int = 80) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def short(text: str) -> str:
    """A name from a file, in a message: one line of at most 200 characters."""
    return re.sub(r"\s+", " ", text[:200])
