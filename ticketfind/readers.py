"""Readers of recipe values: a raw value in, a clean one out, or ValueError naming what was expected."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ticketfind.specs import is_code

Reader = Callable[[Any], Any]
"""Raw value -> clean value; raises ValueError, whose text is what was expected."""


@dataclass(frozen=True)
class Duration:
    """A stretch of training: iterations (``500`` or ``500it``), epochs (``2ep``) or a share (``5%``) of it."""

    amount: float
    unit: str = "it"

    def __int__(self) -> int:
        """The iterations of a resolved duration."""
        assert self.unit == "it", f"{self} is not resolved"
        return int(self.amount)

    def __str__(self) -> str:
        return f"{int(self.amount)}it" if self.unit == "it" else f"{str(self.amount).removesuffix('.0')}{self.unit}"

    def resolved(self, per_epoch: float, total: float) -> "Duration":
        """In iterations, rounded; `per_epoch` and `total` are iterations too."""
        factor = {"it": 1.0, "ep": per_epoch, "%": total / 100}[self.unit]
        return Duration(round(self.amount * factor))


def number(low: float, high: float, expected: str, *, open_low: bool = False, open_high: bool = False) -> Reader:
    """A finite number from `low` to `high`, the ends included unless open."""

    def read(value: Any) -> float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value < low or value > high or (open_low and value == low) or (open_high and value == high):
            raise ValueError(expected)
        return float(value)

    return read


def whole(low: int, high: float = math.inf) -> Reader:
    """A whole number of at least `low` and at most `high`."""
    expected = f"a whole number of at least {low}" + (f" and at most {high}" if high < math.inf else "")

    def read(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(expected)
        return value

    return read


def duration(value: Any) -> Duration:
    """``500``, ``500it``, ``2ep``, ``5%``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*(it|ep|%)?\s*", str(value))
    if match is None or isinstance(value, bool):
        raise ValueError("a number of iterations (500), epochs (2ep) or a share of the training (5%)")
    amount, unit = float(match[1]), match[2] or "it"
    if unit == "it" and not amount.is_integer():
        raise ValueError("a whole number of iterations")
    return Duration(amount, unit)


def length(value: Any) -> Duration:
    """A duration of at least one iteration that is no share."""
    found = duration(value)
    if found.unit == "%" or not found.amount:
        raise ValueError("at least one iteration, as iterations (500) or epochs (2ep)")
    return found


def rewind(value: Any) -> Any:
    """A duration or ``lr``."""
    if value == "lr":
        return "lr"
    try:
        return duration(value)
    except ValueError:
        raise ValueError("0it, an iteration (500it), an epoch (2ep), a share (2%) or lr") from None


def pattern(scope: str) -> tuple[int, int] | None:
    """(2, 4) of ``2:4``; None of a scope that is no N:M pattern."""
    match = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", scope)
    found = None if match is None else (int(match[1]), int(match[2]))
    return found if found and found[0] < found[1] else None


def scope(value: Any) -> str:
    """``layer``, ``global`` or ``N:M``."""
    if value not in ("layer", "global") and (not isinstance(value, str) or pattern(value) is None):
        raise ValueError("one of layer, global, or N:M (2:4 keeps two of each four weights along the inputs)")
    return str(value)


def text(value: Any) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    return value


def choice(*choices: str) -> Reader:
    """One of `choices`."""

    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return str(value)

    return read


def choice_or_code(*choices: str) -> Reader:
    """One of `choices`, or a spec of a Python object."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or not (value in choices or is_code(value)):
            raise ValueError(f"one of {', '.join(choices)}, or module:name")
        return value

    return read


def code(value: Any) -> str:
    """A spec of a Python object."""
    if not isinstance(value, str) or not is_code(value):
        raise ValueError("module:name or file.py:name")
    return value


def flag(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def mapping(value: Any) -> dict[str, Any]:
    """A mapping from texts to values that JSON can hold, as the ticket file must."""
    try:
        if isinstance(value, Mapping) and json.loads(json.dumps(value)) == value:
            return dict(value)
    except (TypeError, ValueError):
        pass
    raise ValueError("a mapping from names to plain values")


def list_of(read: Reader, expected: str) -> Reader:
    """A list of what `read` reads, or one such value."""

    def read_list(value: Any) -> tuple[Any, ...]:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise ValueError(expected)
        return tuple(read(item) for item in value)

    return read_list


def or_null(read: Reader) -> Reader:
    """null, or what `read` reads."""
    return lambda value: None if value is None else read(value)


open_fraction = number(
    0, 1, "a fraction between 0 and 1 (0.2 prunes a fifth of what is left)", open_low=True, open_high=True
)
share = number(0, 1, "a number above 0, up to 1", open_low=True)
below_one = number(0, 1, "a fraction from 0 up to, but not including, 1", open_high=True)
positive = number(0, math.inf, "a number above 0", open_low=True)
not_negative = number(0, math.inf, "a number of at least 0")


def fractions(value: Any) -> dict[str, float]:
    """``0.2`` or ``{"*": 0.2, "fc3.*": 0.1}``; a fraction of 0 leaves the matching tensors whole."""
    if not isinstance(value, Mapping):
        return {"*": open_fraction(value)}
    if not value:
        raise ValueError("a fraction, or a mapping from glob to fraction")
    return {str(glob): below_one(fraction) for glob, fraction in value.items()}


def remaining(value: Any) -> float:
    """Weights remaining: ``0.05`` or ``5%``."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*", value)):
        value = float(f"{match[1]}e-2")  # the number nearest to it, which 4.1 / 100 is not
    result: float = number(0, 1, "weights remaining, as 0.05 or 5%", open_low=True, open_high=True)(value)
    return result


def validation(value: Any) -> float | int:
    """A number of examples, or a share."""
    try:
        if isinstance(value, float) and not value.is_integer():
            return float(open_fraction(value))
        return int(whole(1)(value))
    except ValueError:
        raise ValueError("a number of examples (5000) or a fraction of the training set (0.1)") from None
