"""What is written after a flag, as values."""

from typing import Any

import typer


def pairs(texts: list[str], flag: str) -> dict[str, Any]:
    """KEY=VALUE texts as a dict, the values read as YAML."""
    from ticketfind.layers import parse_value

    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{flag}: expected KEY=VALUE, found {text!r}")
        found[key] = parse_value(value)
    return found


def attacks(texts: list[str]) -> list[tuple[str, float]]:
    """``fgsm:0.1`` texts as kinds and levels, each once, sorted."""
    found = []
    for text in texts:
        kind, _, level = text.partition(":")
        try:
            epsilon = float(level)
        except ValueError:
            epsilon = -1.0
        if kind not in ("fgsm", "pgd") or not 0 <= epsilon < float("inf"):
            raise typer.BadParameter(f"--attack: expected fgsm:EPS or pgd:EPS with EPS at least 0, found {text!r}")
        found.append((kind, epsilon))
    return sorted({*found})


def fractions(texts: list[str]) -> Any:
    """``0.2`` or ``*=0.2 fc3.*=0.1`` as a recipe has it."""
    from ticketfind.layers import parse_value

    if len(texts) == 1 and "=" not in texts[0]:
        return parse_value(texts[0])
    split = [text.rpartition("=") for text in texts]
    return {glob or "*": parse_value(value) for glob, _, value in split}
